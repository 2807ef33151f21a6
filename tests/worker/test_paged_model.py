"""Every architecture through the paged model gives what transformers gives by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.paged import Sequences, compute_randomly, load_tiny, random_tokens
from support.tiny_models import ARCHITECTURES, EOS, VOCAB, WINDOW

LENGTHS = (1, 2, 15, 16, 17, 41, 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_random_chunks_and_company_equal_one_forward(arch: str, tmp_path: Path) -> None:
    model, own = load_tiny(arch, tmp_path)
    sequences = Sequences(model)
    for number, length in enumerate(LENGTHS):
        sequences.add(random_tokens(length, VOCAB, number))
    for tokens, logits in zip(sequences.tokens, compute_randomly(sequences, seed=1), strict=True):
        with torch.no_grad():
            expected = own(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_equal_generate(arch: str, tmp_path: Path) -> None:
    model, own = load_tiny(arch, tmp_path)
    prompts = [random_tokens(length, VOCAB, length) for length in (1, 9, WINDOW + 3)]
    sequences = Sequences(model, block_size=16)
    for prompt in prompts:
        sequences.add(prompt)
    logits = sequences.step([(s, len(prompt)) for s, prompt in enumerate(prompts)])
    for _ in range(20):
        for sequence, rows in logits.items():
            sequences.tokens[sequence].append(int(rows[-1].argmax()))
        logits = sequences.step([(s, 1) for s in range(len(prompts))])
    generate: Any = own.generate
    for sequence, prompt in enumerate(prompts):
        expected = generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=EOS
        )
        assert sequences.tokens[sequence] == expected[0].tolist()


@pytest.mark.parametrize("arch", ["mistral", "gemma2"])
def test_tiny_windows_matter(arch: str, tmp_path: Path) -> None:
    """The tests above would pass without windows if these let everything through."""
    model, _ = load_tiny(arch, tmp_path)
    windows = [layer.window for layer in model.kv_spec]
    assert WINDOW in windows
    assert (None in windows) == (arch == "gemma2")


def test_kv_cache_sizes(tmp_path: Path) -> None:
    model, _ = load_tiny("llama", tmp_path)
    assert model.kv_bytes_per_block(16) == 2 * 2 * 2 * 16 * 4 * 16  # layers, K and V, heads, dim, bytes, tokens
    assert model.vocab_size == VOCAB
    with pytest.raises(RuntimeError, match="not allocated"):
        _ = model.scratch_block
    model.allocate_kv_cache(5, 16)
    assert model.scratch_block == 5


def test_logits_are_contiguous_where_a_model_cuts_its_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kernels take them, also in float32, whose conversion copies nothing."""
    model, own = load_tiny("llama", tmp_path)
    head = model._head

    def cut(**given: Any) -> Any:
        found = head(**given)
        found.logits = found.logits[..., : VOCAB - 3]
        return found

    monkeypatch.setattr(model, "_head", cut)
    rows = torch.randn(5, own.config.hidden_size)
    with torch.no_grad():
        logits, expected = model.logits(rows), own.lm_head(rows)[:, : VOCAB - 3]
    assert logits.is_contiguous()
    torch.testing.assert_close(logits, expected)


def test_two_models_in_one_process_keep_apart(tmp_path: Path) -> None:
    """One computes between the other's steps, with other layers and other blocks."""
    tokens = random_tokens(30, VOCAB, 3)
    one, own = load_tiny("llama", tmp_path / "one")
    other, _ = load_tiny("gemma2", tmp_path / "other")
    first, second = Sequences(one), Sequences(other, block_size=16)
    first.add(tokens)
    second.add(tokens)
    found = []
    for _ in range(3):
        found.append(first.step([(0, 10)])[0])
        second.step([(0, 10)])
    with torch.no_grad():
        expected = own(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)
