"""Greedy output equals transformers' `generate`, token for token, whatever the batch, lookahead, block size or cache.

Real processes over real sockets; every architecture that Tandem claims to serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.identity import Case, cases, check_cell, grid


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    with cases(tmp_path_factory.mktemp) as made:
        yield made


@pytest.mark.parametrize(("arch", "lookahead", "block_size", "cache"), grid())
def test_greedy_equals_transformers(
    case_of: Callable[[str], Case], arch: str, lookahead: int, block_size: int, cache: str
) -> None:
    check_cell(case_of(arch), (arch, lookahead, block_size, cache), device="cpu")
