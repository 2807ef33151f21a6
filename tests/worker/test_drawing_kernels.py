"""The kernels that draw tokens without a GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest

from support import triton_interpreter
from support.grids import whole_grid

pytestmark = pytest.mark.thorough


def test_tokens_are_those_of_plain_torch() -> None:
    printed = triton_interpreter.run("support.drawing_cases", *(["all"] if whole_grid() else []))
    assert "rows equal, interpreted: True" in printed
