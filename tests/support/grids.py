"""Which cells of a grid run: all under `make test-all`, a choice under `make test`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest


def whole_grid() -> bool:
    """Whether whole grids and slow tests run (`make test-all`, TANDEM_TEST_GRID=full)."""
    return os.environ.get("TANDEM_TEST_GRID") == "full"


def one_of(values: Iterable[Any], always: Any) -> list[Any]:
    """Parameters of which only `always` is not slow. For what meets the other values elsewhere, as lookaheads do in the
    identity grid."""
    return [value if value == always else pytest.param(value, marks=pytest.mark.slow) for value in values]
