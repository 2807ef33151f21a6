"""Seeded sampling in batch-invariant mode: a request's tokens and log-probabilities are the same alone, in a crowd, at
any lookahead and block size, and after a preemption."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.exactness import TIGHT, check_systems
from support.grids import one_of, whole_grid
from support.tiny_models import ARCHITECTURES, save_tiny

LOOKAHEADS = (0, 1, 2) if whole_grid() else (0,)
SYSTEMS = {f"tight-{lookahead}": {**TIGHT, "lookahead": lookahead} for lookahead in LOOKAHEADS}


@pytest.mark.parametrize("arch", one_of(ARCHITECTURES, "llama"))
def test_sampled_tokens_do_not_depend_on_the_batch(tmp_path: Path, arch: str) -> None:
    save_tiny(arch, tmp_path)
    check_systems({"model": str(tmp_path), "device": "cpu", "threads": 1, "batch_invariant": True}, SYSTEMS)
