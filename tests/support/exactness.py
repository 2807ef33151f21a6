"""Seeded requests of every kind, sent one after the other or all at once: what must be the same bits either way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

from tandem import AsyncClient, Completion

from support.observe import run_until_preempted
from support.systems import embedded
from support.tiny_models import VOCAB

MAX_MODEL_LEN = 128

ROOMY: dict[str, Any] = {"lookahead": 1, "block_size": 16, "max_num_batched_tokens": 512}
TIGHT: dict[str, Any] = {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 16, "block_size": 8}


def requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and parameters that exercise every part of the sampler, with up to 3 log-probabilities told."""
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
        sampling = {**kinds[index % len(kinds)], "seed": 900 + index, "max_tokens": 20, "ignore_eos": True}
        if index % 3:
            sampling["logprobs"] = index % 4
        made.append((prompt, sampling))
    return made


def compared(completion: Completion) -> tuple[Any, ...]:
    """What must not depend on the batch."""
    return tuple(completion.token_ids), completion.logprobs


async def alone(address: str) -> list[tuple[Any, ...]]:
    async with AsyncClient(address) as client:
        return [compared(await client.generate(prompt, **sampling)) for prompt, sampling in requests()]


async def crowd(address: str) -> list[tuple[Any, ...]]:
    async with AsyncClient(address) as client:
        done = await asyncio.gather(*(client.generate(prompt, **sampling) for prompt, sampling in requests()))
        return [compared(one) for one in done]


def check_systems(common: Mapping[str, Any], tight: Mapping[str, Mapping[str, Any]]) -> None:
    """One after the other in a roomy system, all at once in it, and all at once in each of the tight ones until
    requests are preempted: all get the same. `common`: options of all systems."""
    common = {**common, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8}
    with embedded({**common, **ROOMY}) as system:
        expected = asyncio.run(alone(system.address))
        assert asyncio.run(crowd(system.address)) == expected
    assert len({tokens for tokens, _ in expected}) == len(expected)
    for name, options in tight.items():
        with embedded({**common, **options}) as system:

            def attempt(name: str = name) -> None:
                assert asyncio.run(crowd(system.address)) == expected, name

            run_until_preempted(system.address, attempt)
