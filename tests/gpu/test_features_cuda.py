"""Sampling parameters, log-probabilities, structured output and 8 bits on CUDA, through whole systems with graphs: what
a CPU gives, alone and in a crowd."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from e2e.test_sampling_parameters import PARAMETERS, alone, crowd

from tandem import AsyncClient, Completion
from tandem.launch.embedded import EmbeddedSystem

from support.observe import run_until_preempted
from support.structured import constrained_requests, reference
from support.tiny_models import save_flashinfer_sized, save_tiny
from support.workload import send_staggered

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "block_size": 8}


def told(completion: Completion) -> list[tuple[int, float]]:
    assert completion.logprobs is not None
    return [(one.token_id, one.logprob) for at in completion.logprobs for one in (at.token, *at.top)]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_sampling_parameters_do_what_they_do_on_a_cpu(lookahead: int, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    found: dict[str, list[dict[str, Completion]]] = {}
    for device in ("cpu", "cuda"):
        options = {**OPTIONS, "model": str(tmp_path), "device": device, "lookahead": lookahead}
        with EmbeddedSystem(options) as system:
            found[device] = [asyncio.run(run(system.address)) for run in (alone, crowd)]
    for name in PARAMETERS:
        expected = found["cpu"][0][name]
        for got in (found["cuda"][0][name], found["cuda"][1][name]):
            assert got.token_ids == expected.token_ids, name
            assert [token for token, _ in told(got)] == [token for token, _ in told(expected)], name
            assert [logprob for _, logprob in told(got)] == pytest.approx(
                [logprob for _, logprob in told(expected)], abs=2e-3
            ), name


@pytest.mark.parametrize("lookahead", [0, 2])
def test_structured_output_is_what_a_plain_loop_gives(lookahead: int, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    requests = constrained_requests(21, seed=3, longest=60, most=40)
    expected = [reference(model, tmp_path, wanted) for wanted in requests]

    async def run(address: str) -> list[list[int]]:
        async with AsyncClient(address) as client:
            return await send_staggered(client, requests)

    options = {**OPTIONS, "model": str(tmp_path), "device": "cuda", "lookahead": lookahead}
    with EmbeddedSystem({**options, "max_num_batched_tokens": 48, "num_gpu_blocks_override": 24}) as system:

        def attempt() -> None:
            assert asyncio.run(run(system.address)) == expected

        run_until_preempted(system.address, attempt)


def test_weights_and_cache_in_8_bits_serve(tmp_path: Path) -> None:
    """Greedy tokens may differ from those in 16 bits; how likely 16 bits find the chosen ones may not, by much."""
    save_flashinfer_sized(tmp_path)
    prompts = [[4 + (7 * index + at) % 90 for at in range(10 + 5 * index)] for index in range(12)]

    async def run(address: str) -> list[Completion]:
        async with AsyncClient(address) as client:
            sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "logprobs": 0}
            return list(await asyncio.gather(*(client.generate(prompt, **sampling) for prompt in prompts)))

    results = {}
    for name, more in {"16": {}, "8": {"quantization": "fp8", "kv_cache_dtype": "fp8"}}.items():
        options = {**OPTIONS, "model": str(tmp_path), "device": "cuda", "dtype": "bfloat16", "block_size": 16, **more}
        with EmbeddedSystem(options) as system:
            results[name] = asyncio.run(run(system.address))
    assert all(len(completion.token_ids) == 20 for completion in results["8"])
    first = [(told(wide)[0][1], told(small)[0][1]) for wide, small in zip(results["16"], results["8"], strict=True)]
    assert sum(abs(wide - small) for wide, small in first) / len(first) < 0.3
