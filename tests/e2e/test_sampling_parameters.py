"""Every sampling parameter through real processes, against a reference in NumPy over transformers' own logits: alone,
in a crowd of requests with other parameters, at lookahead 0 and 1, and after preemptions, of each one's own rows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tandem import AsyncClient, Completion, SamplingParams
from tandem.client.results import PositionLogprobs

from support.observe import run_until_preempted
from support.reference_sampling import continuation, log_softmax, seed_of_sample, shown
from support.systems import embedded
from support.tiny_models import EOS, VOCAB, save_tiny, tiny_tokenizer

PROMPT = [7 + index % 50 for index in range(21)]
COMMON: dict[str, Any] = {"device": "cpu", "threads": 1, "batch_invariant": True, "max_model_len": 128}

A, SPACE = tiny_tokenizer().encode("a ").ids
LETTERS: dict[str, Any] = {"allowed_token_ids": [A, A + 1, A + 2, SPACE], "temperature": 3.0}
BAD_WORDS = ((A, A + 1), (A + 2,))
"""The token sequences of "ab" and "c". With a space before, the first token is the space: no sequence of its own."""

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7, "temperature": 1.5},
    "min_p": {"min_p": 0.05, "temperature": 1.5},
    "all filters": {"min_p": 0.001, "top_k": 40, "top_p": 0.9, "temperature": 2.0},
    "repetition_penalty": {"repetition_penalty": 1.8, "temperature": 0.0},
    "presence_penalty": {"presence_penalty": 1.7, "temperature": 0.0},
    "frequency_penalty": {"frequency_penalty": 1.1, "temperature": 0.0},
    "rewards": {"repetition_penalty": 0.7, "presence_penalty": -1.0, "frequency_penalty": -0.5},
    "penalties, drawn": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "logit_bias": {"logit_bias": {5: 4.0, 9: 3.5, 100: -100.0, VOCAB - 1: 2.0}},
    "forced": {"logit_bias": {33: 100.0}, "temperature": 0.0},
    "allowed_token_ids": {"allowed_token_ids": [4, 31, 32, 63, 64, 95, VOCAB - 1]},
    "bad words": {"bad_words_token_ids": [[5], [6, 7], [9, 9, 9]], "allowed_token_ids": [5, 6, 7, 8, 9]},
    "only bad words": {"bad_words_token_ids": [[5, 5], [6, 5]], "allowed_token_ids": [5, 6], "logit_bias": {5: 9.0}},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": list(range(4, 60)), "ignore_eos": False},
    "everything": {
        "temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {20: 1.0, 21: -1.0}, "min_tokens": 9,
        "stop_token_ids": [30, 31, 32, 33], "bad_words_token_ids": [[40], [41, 42]],
        "allowed_token_ids": list(range(1, 120)),
    },
    "seed": {"seed": 2**63 - 1},
    "n": {"n": 3},
    "max_tokens": {"max_tokens": 13},
    "stop_token_ids": {"stop_token_ids": [17, 18, 19, 20]},
    "end of sequence": {"ignore_eos": False, "logit_bias": {EOS: 6.0}, "min_tokens": 8},
    "end of sequence, ignored": {"logit_bias": {EOS: 9.0}},
    "stop": {"stop": ["ca", "bb"], **LETTERS},
    "stop, included": {"stop": ["c a", "bbb"], "include_stop_str_in_output": True, **LETTERS},
    "stop, after min_tokens": {"stop": ["a", "b"], "min_tokens": 10, **LETTERS},
    "stop token, included": {"stop_token_ids": [A], "include_stop_str_in_output": True, **LETTERS, "min_tokens": 9},
    "special tokens": {"skip_special_tokens": False, "stop": ["<pad><pad>"], "allowed_token_ids": [0, 2, A, A + 1]},
    "bad_words": {"bad_words": ["ab", "c"], **LETTERS},
    "logprobs": {"logprobs": 20},
    "prompt_logprobs": {"prompt_logprobs": 20},
}  # fmt: skip


def sampling_of(name: str) -> dict[str, Any]:
    index = list(PARAMETERS).index(name)
    return {"seed": 40 + index, "max_tokens": 24, "ignore_eos": True, "logprobs": index % 4, **PARAMETERS[name]}


def prompt_of(name: str) -> list[int]:
    index = list(PARAMETERS).index(name)
    return PROMPT[index % 9 :] + PROMPT[: index * 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return save_tiny("llama", folder)


@pytest.fixture(scope="module")
def address(folder: Path, model: PreTrainedModel) -> Iterator[str]:
    with embedded({**COMMON, "model": str(folder), "max_num_seqs": 8}) as system:
        yield system.address


async def alone(address: str) -> dict[str, Completion]:
    async with AsyncClient(address) as client:
        return {name: await client.generate(prompt_of(name), **sampling_of(name)) for name in PARAMETERS}


async def crowd(address: str) -> dict[str, Completion]:
    async with AsyncClient(address) as client:
        names = list(PARAMETERS)
        done = await asyncio.gather(*(client.generate(prompt_of(name), **sampling_of(name)) for name in names))
        return dict(zip(names, done, strict=True))


@pytest.fixture(scope="module")
def undisturbed(address: str) -> dict[str, Completion]:
    return asyncio.run(alone(address))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_does_what_the_reference_does(
    name: str, undisturbed: dict[str, Completion], model: PreTrainedModel
) -> None:
    def logits_of(tokens: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1].numpy()

    values, prompt, tokenizer = sampling_of(name), prompt_of(name), tiny_tokenizer()
    count = values.pop("n", 1)
    for listed in ("allowed_token_ids", "stop_token_ids", "stop"):
        values[listed] = tuple(values[listed]) if listed in values else getattr(SamplingParams(), listed)
    values["bad_words_token_ids"] = tuple(map(tuple, values.get("bad_words_token_ids", ())))
    if values.pop("bad_words", None):
        values["bad_words_token_ids"] = BAD_WORDS
    sampling = SamplingParams(**values)

    def text_of(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=sampling.skip_special_tokens)
        return text

    got = undisturbed[name]
    assert len(got.choices) == count
    for choice in got.choices:
        own = replace(sampling, seed=seed_of_sample(values["seed"], choice.index))
        expected, told = continuation(logits_of, own, prompt, [EOS])
        text, length, *reasons = shown(text_of, own, expected, [EOS])
        assert choice.token_ids == expected[:length]
        assert (choice.text, [choice.finish_reason, choice.stop_reason]) == (text, reasons)
        assert choice.logprobs is not None
        for token, position, logprobs in zip(expected[:length], choice.logprobs, told[:length], strict=True):
            check(position, token, logprobs, values["logprobs"])
    if sampling.prompt_logprobs is None:
        assert got.prompt_logprobs is None
        return
    first, *others = got.prompt_logprobs or []
    assert first is None
    for index, (token, of_prompt) in enumerate(zip(prompt[1:], others, strict=True), 1):
        assert of_prompt is not None
        check(of_prompt, token, log_softmax(logits_of(prompt[:index])), sampling.prompt_logprobs)


def check(position: PositionLogprobs, token: int, expected: NDArray[np.float64], likeliest: int) -> None:
    """Compares what is told of one token with the log-probabilities of the whole vocabulary."""
    assert position.token.token_id == token
    assert position.token.logprob == pytest.approx(expected[token], abs=1e-3)
    assert position.token.rank == int((expected >= expected[token]).sum())
    top = np.argsort(-expected, kind="stable")[:likeliest]
    assert [one.token_id for one in position.top] == top.tolist()
    assert [one.logprob for one in position.top] == pytest.approx(expected[top].tolist(), abs=1e-3)
    assert [one.rank for one in position.top] == list(range(1, len(top) + 1))


def test_a_parameter_has_an_effect(undisturbed: dict[str, Completion]) -> None:
    """Else the tests above would show nothing."""
    assert all(token in PARAMETERS["allowed_token_ids"]["allowed_token_ids"] for token in
               undisturbed["allowed_token_ids"].token_ids)  # fmt: skip
    assert undisturbed["forced"].token_ids == [33] * 24
    assert len(set(undisturbed["frequency_penalty"].token_ids)) > len(set(undisturbed["greedy"].token_ids)) / 2
    early = undisturbed["min_tokens"]
    assert early.finish_reason == "stop"
    assert len(early.token_ids) > 12
    assert 5 not in undisturbed["bad words"].token_ids
    assert len({tuple(choice.token_ids) for choice in undisturbed["n"].choices}) == 3
    assert {EOS} < set(undisturbed["end of sequence, ignored"].token_ids)
    assert undisturbed["end of sequence"].token_ids[-1] == EOS
    for name in ("stop_token_ids", "stop", "stop, included", "stop, after min_tokens", "stop token, included",
                 "special tokens"):  # fmt: skip
        assert undisturbed[name].finish_reason == "stop", name
        assert 6 < len(undisturbed[name].token_ids) < 24, name
    assert "<s>" in undisturbed["special tokens"].text
    assert "ab" not in undisturbed["bad_words"].text
    assert "c" not in undisturbed["bad_words"].text


def test_in_a_crowd_the_bits_are_the_same(address: str, undisturbed: dict[str, Completion]) -> None:
    same(asyncio.run(crowd(address)), undisturbed)


@pytest.mark.thorough
def test_without_lookahead_the_bits_are_the_same(folder: Path, undisturbed: dict[str, Completion]) -> None:
    with embedded({**COMMON, "model": str(folder), "max_num_seqs": 8, "lookahead": 0}) as system:
        same(asyncio.run(alone(system.address)), undisturbed)
        same(asyncio.run(crowd(system.address)), undisturbed)


@pytest.mark.thorough
@pytest.mark.parametrize("lookahead", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_after_preemptions_the_bits_are_the_same(
    folder: Path, undisturbed: dict[str, Completion], lookahead: int
) -> None:
    """All parameters beside each other, and each beside copies of itself, of which one at least is preempted."""

    async def copies(name: str) -> list[Completion]:
        async with AsyncClient(system.address) as client:
            calls = (client.generate(prompt_of(name), **sampling_of(name)) for _ in range(8))
            return await asyncio.gather(*calls)

    def attempt(name: str) -> None:
        for completion in asyncio.run(copies(name)):
            same({name: completion}, {name: undisturbed[name]})

    tight = {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 16, "block_size": 8, "lookahead": lookahead}
    with embedded({**COMMON, "model": str(folder), "max_num_seqs": 8, **tight}) as system:
        run_until_preempted(system.address, lambda: same(asyncio.run(crowd(system.address)), undisturbed))
        for name in PARAMETERS:
            run_until_preempted(system.address, partial(attempt, name))


def same(got: dict[str, Completion], expected: dict[str, Completion]) -> None:
    for name, completion in expected.items():
        assert got[name].choices == completion.choices, name
        assert got[name].prompt_logprobs == completion.prompt_logprobs, name


def test_prompt_logprobs(address: str, folder: Path, model: PreTrainedModel) -> None:
    """Whole, in chunks, with a cached prefix, beside samples; and after preemptions nothing twice and nothing lost."""
    prompt = [(index * 37) % 150 + 4 for index in range(70)]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0].numpy()

    async def ask(where: str, count: int) -> list[Completion]:
        async with AsyncClient(where) as client:
            return await asyncio.gather(*(
                client.generate(prompt, prompt_logprobs=3, max_tokens=20, ignore_eos=True, seed=3, n=1 + index % 2)
                for index in range(count)
            ))  # fmt: skip

    async def prepare(where: str) -> None:
        async with AsyncClient(where) as client:
            await client.generate(prompt, max_tokens=1)

    asyncio.run(prepare(address))
    done = asyncio.run(ask(address, 2))
    first = done[0]
    assert first.usage.cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(prompt)
    assert first.logprobs is None
    for index, position in enumerate(first.prompt_logprobs[1:], 1):
        assert position is not None
        expected = log_softmax(logits[index - 1])
        assert position.token.token_id == prompt[index]
        assert position.token.logprob == pytest.approx(expected[prompt[index]], abs=1e-3)
        assert position.token.rank == int((expected >= expected[prompt[index]]).sum())
        assert [one.token_id for one in position.top] == np.argsort(-expected, kind="stable")[:3].tolist()
    tight = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 24, "block_size": 8}
    with embedded({**COMMON, "model": str(folder), "max_num_seqs": 4, **tight}) as system:
        run_until_preempted(system.address, lambda: done.extend(asyncio.run(ask(system.address, 6))))
    for other in done:
        assert other.prompt_logprobs == first.prompt_logprobs
        assert other.token_ids == first.token_ids
