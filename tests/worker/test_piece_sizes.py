"""Which numbers of tokens are captured, and which steps take them."""

from __future__ import annotations

import pytest

from tandem.worker.pieces import LARGEST_FULL, LARGEST_PIECES, piece_size, piece_sizes


@pytest.mark.parametrize("most", [1, 31, 32, 100, 1024, 1025, 2048, 4096, LARGEST_FULL])
def test_a_step_is_filled_up_little_or_launched_kernel_by_kernel(most: int) -> None:
    sizes = piece_sizes(most)
    assert sizes == sorted(set(sizes))
    for tokens in range(1, most + 1):
        size = piece_size(tokens, sizes)
        if size is None:
            assert tokens > max((size for size in sizes if size <= LARGEST_PIECES), default=0)
        else:
            assert tokens <= size <= most
            assert size <= LARGEST_PIECES or size - tokens <= size / 16


def test_a_full_step_is_captured_unless_it_is_very_large() -> None:
    for most in (1025, 4096, LARGEST_FULL):
        assert piece_size(most, piece_sizes(most)) == most
    assert piece_size(LARGEST_FULL + 1, piece_sizes(LARGEST_FULL + 1)) is None
    assert max(piece_sizes(LARGEST_FULL + 1)) == LARGEST_PIECES
