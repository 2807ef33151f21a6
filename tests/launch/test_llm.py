"""`LLM`, as programs written for vLLM call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tandem import LLM, ConfigurationError, InvalidRequest, SamplingParams
from tandem.launch.supervisor import ChildDied

from support.remote_code import MARK, save_with_code


def test_llm(capfd: pytest.CaptureFixture[str]) -> None:
    as_vllm_has_it: dict[str, Any] = {"tensor_parallel_size": 1, "tokenizer": None, "tokenizer_mode": "auto"}
    as_vllm_has_it["trust_remote_code"] = False
    with LLM(device="cpu", threads=1, max_model_len=2048, **as_vllm_has_it) as llm:
        prompts_in_order(llm, capfd)
        chats(llm)


def prompts_in_order(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    prompts = ["Once upon a time", [5, 6, 7], {"prompt_token_ids": [5, 6, 7]}]
    found = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8, logprobs=2))  # type: ignore[arg-type]
    assert "3 of 3 prompts answered" in capfd.readouterr().err
    assert [output.request_id for output in found] == ["0", "1", "2"]
    assert [output.prompt for output in found] == prompts
    assert found[1].outputs == found[2].outputs
    (sample,) = found[0].outputs
    assert sample.text
    assert len(sample.token_ids) == 8
    assert sample.finish_reason == "length"
    assert sample.logprobs is not None
    for token, likely in zip(sample.token_ids, sample.logprobs, strict=True):
        assert likely[token].rank == 1
        assert len(likely) == 2
    assert sample.cumulative_logprob == sum(
        likely[token].logprob for token, likely in zip(sample.token_ids, sample.logprobs, strict=True)
    )
    (alone,) = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
    assert alone.outputs[0].token_ids == sample.token_ids
    as_vllm: Any = {"prompt": "Once upon a time"}
    (wrapped,) = llm.generate(as_vllm, temperature=0.0, max_tokens=8, use_tqdm=False)
    assert (wrapped.outputs, wrapped.prompt) == (alone.outputs, "Once upon a time")
    assert capfd.readouterr().err == ""
    assert llm.generate([]) == []


def chats(llm: LLM) -> None:
    def ask(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": text}]

    (one,) = llm.chat(ask("What is 2 + 3?"), use_tqdm=False)
    assert one.outputs[0].text == "2 + 3 = 5"
    several = llm.chat([ask("What is 2 + 3?"), ask("What is 4 + 3?")], SamplingParams(temperature=0.0), use_tqdm=False)
    assert [output.outputs[0].text for output in several] == ["2 + 3 = 5", "4 + 3 = 7"]
    with pytest.raises(InvalidRequest, match="messages"):
        llm.chat(["hello"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_modellen": 5}, "max-model-len"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"trust_remote_code": "perhaps"}, "trust-remote-code"),
        ({"tokenizer": "other"}, "tokenizer: 'other' is not supported; only None is"),
        ({"quantization": "awq"}, "quantization"),
        ({"swap_space": 4}, "swap_space"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"address": "ipc:///x"}, "address"),
        ({"scheduler": "ipc:///x"}, "scheduler"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LLM(**options)


@pytest.mark.thorough
def test_code_of_a_model_runs_only_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))  # the worker keeps a copy of the code there
    folder = tmp_path / "model"
    own = save_with_code(folder)
    options: dict[str, Any] = {"model": str(folder), "device": "cpu", "threads": 1, "max_model_len": 64}
    with pytest.raises(ChildDied, match=r"modeling_doubled\.DoubledForCausalLM.*--trust-remote-code"):
        LLM(**options)
    assert not (folder / MARK).exists()
    with LLM(**options, trust_remote_code=True) as llm:
        prompt = [5, 6, 7, 8]
        (found,) = llm.generate(prompt, temperature=0.0, max_tokens=8, ignore_eos=True, use_tqdm=False)
    assert (folder / MARK).exists()
    known = list(prompt)
    for token in found.outputs[0].token_ids:
        with torch.no_grad():
            logits = own(torch.tensor([known])).logits[0, -1]
        assert token == int(logits.argmax())
        known.append(token)
    assert len(known) == len(prompt) + 8
