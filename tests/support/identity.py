"""The identity grid: architectures × lookahead × block size × cache, and one case of it through a whole system."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem import AsyncClient

from support.grids import pairwise, whole_grid
from support.observe import Observer, run_until_preempted, settled
from support.systems import embedded
from support.tiny_models import ARCHITECTURES, save_tiny
from support.workload import Wanted, mixed_requests, reference, send_staggered

LOOKAHEADS = (0, 1, 2)
BLOCK_SIZES = (8, 16)
CACHES = ("roomy", "tight")
MAX_MODEL_LEN = 128
TIGHT_TOKENS = 192
"""Of KV cache: two or three requests' worth, so that requests are preempted."""
ROOMY_TOKENS = 2_048

Cell = tuple[str, int, int, str]


def grid() -> list[Cell]:
    """The whole grid, or with pairwise coverage: every two values of two parameters meet in some cell."""
    whole = list(itertools.product(ARCHITECTURES, LOOKAHEADS, BLOCK_SIZES, CACHES))
    return whole if whole_grid() else pairwise(whole)


@dataclass(frozen=True)
class Case:
    """An architecture's tiny model, its 24 requests and what transformers answers."""

    folder: Path
    requests: list[Wanted]
    expected: list[list[int]]


@contextmanager
def cases(new_folder: Callable[[str], Path]) -> Iterator[Callable[[str], Case]]:
    """Makes each architecture's case once."""
    made: dict[str, Case] = {}

    def case(arch: str) -> Case:
        if arch not in made:
            folder = new_folder(arch)
            model = save_tiny(arch, folder)
            requests = mixed_requests(24, seed=11, longest=80, most=40)
            made[arch] = Case(folder, requests, [reference(model, wanted) for wanted in requests])
        return made[arch]

    yield case


def check_cell(case: Case, cell: Cell, **options: Any) -> None:
    """Runs the case in a system of its own; its tokens must be transformers', and preemptions as the cache suggests."""
    _, lookahead, block_size, cache = cell
    options |= {
        "model": str(case.folder),
        "threads": 1,
        "lookahead": lookahead,
        "block_size": block_size,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 48,
        "num_gpu_blocks_override": (TIGHT_TOKENS if cache == "tight" else ROOMY_TOKENS) // block_size,
    }

    async def run(address: str) -> list[list[int]]:
        async with AsyncClient(address) as client:
            return await send_staggered(client, case.requests)

    with embedded(options) as system:

        def attempt() -> None:
            assert asyncio.run(run(system.address)) == case.expected

        if cache == "tight":
            run_until_preempted(system.address, attempt)
        else:
            attempt()
            with contextlib.closing(Observer(system.address)) as observer:
                assert observer.wait_until(settled).preemptions == 0
