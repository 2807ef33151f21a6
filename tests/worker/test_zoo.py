"""Architectures that nobody asked for: each gives what transformers gives, or is refused by name. Under `make test` one
of each kind, all of them under `make test-all`."""

from pathlib import Path

import pytest
import torch
from transformers.masking_utils import create_causal_mask
from transformers.models.starcoder2 import modeling_starcoder2

from tandem.worker.config import WorkerConfig
from tandem.worker.describe import choose_max_model_len
from tandem.worker.inspection import PROBE_TOKENS
from tandem.worker.sources import LoadError

from support.paged import Sequences, compute_randomly, load, random_tokens
from support.tiny_models import VOCAB, WINDOW
from support.zoo import REFUSED, ZOO, zoo_model

LENGTHS = (1, PROBE_TOKENS - 3, PROBE_TOKENS + WINDOW, 90)
"""What goes wrong over lengths that the worker itself tries when it loads a model goes wrong here."""
OF_A_KIND = [name for name in ZOO if ":" in name][:8]


@pytest.mark.parametrize(
    "name", [name if name in OF_A_KIND else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
)
def test_random_chunks_and_company_equal_one_forward(name: str, tmp_path: Path) -> None:
    own = zoo_model(ZOO[name]())
    own.save_pretrained(tmp_path)
    sequences = Sequences(load(tmp_path))
    for number, length in enumerate(LENGTHS):
        sequences.add(random_tokens(length, VOCAB, number))
    for tokens, logits in zip(sequences.tokens, compute_randomly(sequences, seed=1), strict=True):
        with torch.no_grad():
            expected = own(torch.tensor([tokens]), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_worker_lacks_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, lacked = REFUSED[name]
    zoo_model(make()).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=lacked):
        load(tmp_path)


def test_windows_that_only_masks_tell_are_found(tmp_path: Path) -> None:
    own = zoo_model(ZOO["phimoe: windows told by masks alone"]())
    own.save_pretrained(tmp_path)
    assert [layer.window for layer in load(tmp_path).kv_spec] == [WINDOW, WINDOW]


def test_a_window_that_masks_deny_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = zoo_model(ZOO["starcoder2"]())
    own.save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_starcoder2, "create_sliding_window_causal_mask", create_causal_mask)
    with pytest.raises(LoadError, match=f"layer 0 hands a window of {WINDOW} tokens to its attention, but its mask"):
        load(tmp_path)


def test_contexts_in_which_rope_never_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond, the frequencies of each sequence would follow the longest one of its batch."""
    zoo_model(ZOO["phi3: longrope"]()).save_pretrained(tmp_path)
    model = load(tmp_path)

    def choose(length: int | None) -> int:
        return choose_max_model_len(WorkerConfig(scheduler="ipc:///x", model="m", max_model_len=length), model)

    assert choose(None) == 96
    assert "96 tokens instead of 1024" in caplog.text
    assert choose(96) == 96
    assert choose(50) == 50
    with pytest.raises(LoadError, match=r"--max-model-len 97 is over 96 tokens, .* 'longrope' .*; give at most 96"):
        choose(97)
    with pytest.raises(LoadError, match="--max-model-len 1025 is over the 1024 positions"):
        choose(1025)


def test_dynamic_rope_may_use_all_its_positions(tmp_path: Path) -> None:
    zoo_model(ZOO["llama: dynamic"]()).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert choose_max_model_len(WorkerConfig(scheduler="ipc:///x", model="m"), model) == 1024
