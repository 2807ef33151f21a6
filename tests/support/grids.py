"""Which cells of a grid run: all under `make test-all`, a choice under `make test`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

_Cell = TypeVar("_Cell", bound=tuple[Any, ...])


def whole_grid() -> bool:
    """Whether whole grids and slow tests run (`make test-all`, TANDEM_TEST_GRID=full)."""
    return os.environ.get("TANDEM_TEST_GRID") == "full"


def one_of(values: Iterable[Any], always: Any) -> list[Any]:
    """Parameters of which only `always` is not slow. For what meets the other values elsewhere, as lookaheads do in the
    identity grid."""
    return [value if value == always else pytest.param(value, marks=pytest.mark.slow) for value in values]


def pairwise(whole: list[_Cell]) -> list[_Cell]:
    """Of the cells of a grid so few, in their order, that every two values of two parameters that meet in any cell meet
    in one of these."""
    pairs = {pair for cell in whole for pair in itertools.combinations(enumerate(cell), 2)}
    chosen = []
    while pairs:
        best = max(whole, key=lambda cell: len(pairs.intersection(itertools.combinations(enumerate(cell), 2))))
        chosen.append(best)
        pairs.difference_update(itertools.combinations(enumerate(best), 2))
    return sorted(chosen, key=whole.index)
