"""Greedy output on CUDA in float32 equals transformers' `generate` on the CPU, token for token, end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.identity import Case, cases, check_cell, grid

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    with cases(tmp_path_factory.mktemp) as made:
        yield made


@pytest.mark.parametrize(("arch", "lookahead", "block_size", "cache"), grid())
def test_greedy_on_cuda_equals_transformers(
    case_of: Callable[[str], Case], arch: str, lookahead: int, block_size: int, cache: str
) -> None:
    check_cell(case_of(arch), (arch, lookahead, block_size, cache), device="cuda", dtype="float32")
