"""The kernels of masks, bad words, biases and penalties without a GPU, in Triton's interpreter."""

from __future__ import annotations

from support import triton_interpreter
from support.grids import whole_grid


def test_logits_and_tables_are_those_of_plain_torch() -> None:
    printed = triton_interpreter.run("support.adjusting_cases", *(["all"] if whole_grid() else []))
    assert "cases equal, interpreted: True" in printed
