"""Greedy output equals transformers' `generate`, token for token, whatever the batch, lookahead, block size or cache.

Real processes over real sockets; every architecture that Tandem claims to serve.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tandem import AsyncClient
from tandem.launch.embedded import EmbeddedSystem

from support.observe import Observer, settled
from support.tiny_models import ARCHITECTURES, save_tiny
from support.workload import Wanted, mixed_requests, reference, send_staggered

LOOKAHEADS = (0, 1, 2)
BLOCK_SIZES = (8, 16)
CACHES = ("roomy", "tight")
MAX_MODEL_LEN = 128
TIGHT_TOKENS = 192
"""Of KV cache: two or three requests' worth, so that requests are preempted."""


def grid() -> list[tuple[str, int, int, str]]:
    """The whole grid, or with pairwise coverage: every two values of two parameters meet in some case."""
    whole = list(itertools.product(ARCHITECTURES, LOOKAHEADS, BLOCK_SIZES, CACHES))
    if os.environ.get("TANDEM_TEST_GRID") == "full":
        return whole
    pairs = {pair for case in whole for pair in itertools.combinations(enumerate(case), 2)}
    chosen = []
    while pairs:
        best = max(whole, key=lambda case: len(pairs.intersection(itertools.combinations(enumerate(case), 2))))
        chosen.append(best)
        pairs.difference_update(itertools.combinations(enumerate(best), 2))
    return sorted(chosen, key=whole.index)


@dataclass(frozen=True)
class Case:
    folder: Path
    requests: list[Wanted]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """An architecture's tiny model, its 24 requests and what transformers answers, made once."""
    made: dict[str, Case] = {}

    def case(arch: str) -> Case:
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            model = save_tiny(arch, folder)
            requests = mixed_requests(24, seed=11, longest=80, most=40)
            made[arch] = Case(folder, requests, [reference(model, wanted) for wanted in requests])
        return made[arch]

    yield case
    made.clear()


@pytest.mark.parametrize(("arch", "lookahead", "block_size", "cache"), grid())
def test_greedy_equals_transformers(
    case_of: Callable[[str], Case], arch: str, lookahead: int, block_size: int, cache: str
) -> None:
    case = case_of(arch)
    options = {
        "model": str(case.folder),
        "device": "cpu",
        "threads": 1,
        "lookahead": lookahead,
        "block_size": block_size,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 48,
    }
    if cache == "tight":
        options["num_gpu_blocks_override"] = TIGHT_TOKENS // block_size

    async def run(address: str) -> list[list[int]]:
        async with AsyncClient(address) as client:
            return await send_staggered(client, case.requests)

    with EmbeddedSystem(options) as system:
        got = asyncio.run(run(system.address))
        observer = Observer(system.address)
        stats = observer.wait_until(settled)
        observer.close()
    assert got == case.expected
    assert (stats.preemptions > 0) == (cache == "tight")
