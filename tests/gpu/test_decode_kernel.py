"""The decode kernel against attention in float64, with contexts cut in every way, and caches in 16 and in 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.decode_cases import SHAPES, WAYS, Shape, make_case, worst_error

pytestmark = pytest.mark.gpu

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 128, 700, 3001)
MOST = 60


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bfloat16", "float8"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", WAYS)
def test_attention_is_exact_however_contexts_are_cut(name: str, shape: Shape, cache_dtype: torch.dtype) -> None:
    way = WAYS[name] if cache_dtype == torch.bfloat16 else replace(WAYS[name], warps=2)
    rows = len(LENGTHS)
    case = make_case(LENGTHS, shape, cache_dtype, torch.device("cuda"), MOST)
    expected = case.expected()
    for cut in (None, 1, 7, MOST) if way.even else (None, rows, rows + 3, rows + MOST):
        got = case.attended(way, cut)
        assert worst_error(got, expected) < 1e-2, cut
        # Pieces arrive in any order and are merged in one.
        assert all(torch.equal(case.attended(way, cut), got) for _ in range(5))
        assert not case.scratch.arrived.any()
    assert torch.equal(case.attended(way, None, own_lines=True), case.attended(way, None))
