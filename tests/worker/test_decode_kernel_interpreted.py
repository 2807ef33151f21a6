"""The decode kernel in every way without a GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest

from support import triton_interpreter

pytestmark = pytest.mark.thorough


def test_spans_are_exact_and_nothing_is_read_before_it_is_written() -> None:
    assert triton_interpreter.run("support.interpreted_attention").count("exact") == 4
