"""Seeded sampling in batch-invariant mode: a request's tokens are the same alone, in a crowd, at any lookahead and
block size, and after a preemption."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tandem import AsyncClient
from tandem.launch.embedded import EmbeddedSystem

from support.observe import run_until_preempted
from support.tiny_models import ARCHITECTURES, VOCAB, save_tiny

MAX_MODEL_LEN = 128

ROOMY: dict[str, Any] = {"lookahead": 1, "block_size": 16, "max_num_batched_tokens": 512}
TIGHT: dict[str, Any] = {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 16, "block_size": 8}
SYSTEMS = {
    "tight-0": {**TIGHT, "lookahead": 0},
    "tight-1": {**TIGHT, "lookahead": 1},
    "tight-2": {**TIGHT, "lookahead": 2},
}


def requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and parameters that exercise every part of the sampler."""
    rng = random.Random(5)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.8},
        {"temperature": 0.0},
    ]
    made = []
    for index in range(15):
        prompt = [rng.randrange(4, VOCAB) for _ in range(rng.randint(1, 70))]
        made.append((prompt, {**kinds[index % len(kinds)], "seed": 900 + index, "max_tokens": 20, "ignore_eos": True}))
    return made


async def alone(address: str) -> list[list[int]]:
    async with AsyncClient(address) as client:
        return [list((await client.generate(prompt, **sampling)).token_ids) for prompt, sampling in requests()]


async def crowd(address: str) -> list[list[int]]:
    async with AsyncClient(address) as client:
        done = await asyncio.gather(*(client.generate(prompt, **sampling) for prompt, sampling in requests()))
        return [list(one.token_ids) for one in done]


@pytest.mark.parametrize(
    "arch", ["llama", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES if arch != "llama")]
)
def test_sampled_tokens_do_not_depend_on_the_batch(tmp_path: Path, arch: str) -> None:
    save_tiny(arch, tmp_path)
    common = {"model": str(tmp_path), "device": "cpu", "threads": 1, "batch_invariant": True}
    common |= {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8}
    with EmbeddedSystem({**common, **ROOMY}) as system:
        expected = asyncio.run(alone(system.address))
        assert asyncio.run(crowd(system.address)) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for name, options in SYSTEMS.items():
        with EmbeddedSystem({**common, **options}) as system:

            def attempt(name: str = name) -> None:
                assert asyncio.run(crowd(system.address)) == expected, name

            run_until_preempted(system.address, attempt)
