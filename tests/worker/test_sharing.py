"""Contexts are cut into pieces that cover them, in order, and never too many."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tandem.worker.attention.sharing import PIECE_COLUMNS, TILE, share_out


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=80), st.integers(0, 300))
def test_pieces_cover_every_context_once(lengths: list[int], spare: int) -> None:
    most = len(lengths) + spare
    out = np.full((PIECE_COLUMNS, most), 77, np.int32)
    assert share_out(np.array(lengths, np.int32), most, out) is out
    used = out[0] >= 0
    count = int(used.sum())
    assert used[:count].all()
    covered: list[list[tuple[int, int, int, int]]] = [[] for _ in lengths]
    for row, first, end, part, parts in out[:, :count].T.tolist():
        covered[row].append((first, end, part, parts))
    assert sorted(out[0, :count].tolist()) == out[0, :count].tolist()
    longest = 0
    for length, pieces in zip(lengths, covered, strict=True):
        assert [part for _, _, part, _ in pieces] == list(range(len(pieces)))
        assert all(parts == len(pieces) for _, _, _, parts in pieces)
        assert [first for first, _, _, _ in pieces] == [0, *(end for _, end, _, _ in pieces[:-1])]
        assert pieces[-1][1] == length
        assert all(first % TILE == 0 and first < end for first, end, _, _ in pieces)
        longest = max(longest, *(end - first for first, end, _, _ in pieces))
    # Shorter pieces would be too many.
    shorter = math.ceil(longest / TILE) - 1
    if shorter:
        assert sum(math.ceil(math.ceil(length / TILE) / shorter) for length in lengths) > most


def test_a_lone_long_context_is_cut_into_all_the_pieces_there_are() -> None:
    out = np.empty((PIECE_COLUMNS, 10), np.int32)
    share_out(np.array([100 * TILE], np.int32), 10, out)
    assert out[0].tolist() == [0] * 10
    assert (out[2] - out[1]).tolist() == [10 * TILE] * 10
