"""Contexts of decoding rows as one line, cut into as many equal spans as programs run at once ("stream-K", Osama et al.
2023): the programs of a key head all have the same work, within a tile, and none begins when others have ended.

A span may hold the end of one row, whole rows and the beginning of another. What it holds of one row is a piece, as in
sharing.py: a row's pieces follow each other and are merged in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sharing import PIECE_COLUMNS, TILE


@dataclass(frozen=True, slots=True)
class SpanKind:
    """What layers that are cut alike have in common."""

    spans: int
    window: int | None
    """Tokens that a query sees at most, the latest; None: all."""

    def pieces(self, rows: int) -> int:
        """Most pieces that `rows` contexts come to: each border between spans makes one more."""
        return rows + self.spans


@dataclass(frozen=True, slots=True)
class EvenSpans:
    """By `even_spans`, for each kind of layers on its own."""

    kinds: tuple[SpanKind, ...]

    def room(self, rows: int) -> int:
        return sum(PIECE_COLUMNS * kind.pieces(rows) + kind.spans + 1 for kind in self.kinds)

    def write(self, kv_lens: NDArray[np.int32], out: NDArray[np.int32]) -> None:
        for kind in self.kinds:
            pieces, spans = self.places(kind, len(kv_lens))
            even_spans(kv_lens, kind, out[pieces].reshape(PIECE_COLUMNS, -1), out[spans])

    def places(self, kind: SpanKind, rows: int) -> tuple[slice, slice]:
        """Where a kind's pieces (flat) and spans lie in what is written for `rows` rows."""
        start = EvenSpans(self.kinds[: self.kinds.index(kind)]).room(rows)
        middle = start + PIECE_COLUMNS * kind.pieces(rows)
        return slice(start, middle), slice(middle, middle + kind.spans + 1)


def even_spans(kv_lens: NDArray[np.int32], kind: SpanKind, pieces: NDArray[np.int32], spans: NDArray[np.int32]) -> None:
    """Cuts R contexts of `kv_lens` [R] tokens; one of 0 tokens gets no piece.

    Fills `pieces` [PIECE_COLUMNS, kind.pieces(R)] int32, as `share_out` does, and `spans` [kind.spans + 1] int32: span
    s is the pieces from spans[s] to spans[s + 1]. Counted are only the tiles that a row's window reaches into.
    """
    ends = (kv_lens + (TILE - 1)) // TILE
    begins = np.zeros_like(ends) if kind.window is None else np.maximum(kv_lens - kind.window, 0) // TILE
    line = np.zeros(len(ends) + 1, np.int32)
    np.cumsum(ends - begins, out=line[1:])
    """Where the rows' tiles begin in the line, and the last ones end."""
    total = int(line[-1])
    borders = (np.arange(kind.spans + 1, dtype=np.int64) * total // kind.spans).astype(np.int32)
    starts = np.sort(np.concatenate([line, borders]), kind="stable")
    starts = starts[np.diff(starts, prepend=-1) > 0]  # as np.unique, which takes 20 times as long
    count = len(starts) - 1
    row = np.searchsorted(line, starts[:-1], side="right") - 1
    first = starts[:-1] - line[row] + begins[row]
    of_row = np.flatnonzero(first == begins[row])
    parts = np.diff(of_row, append=count)
    pieces[0, :count], pieces[0, count:] = row, -1
    pieces[1, :count] = first * TILE
    np.minimum((first + np.diff(starts)) * TILE, kv_lens[row], out=pieces[2, :count])
    pieces[3, :count] = np.arange(count) - np.repeat(of_row, parts)
    pieces[4, :count] = np.repeat(parts, parts)
    pieces[1:, count:] = 0
    spans[:] = np.searchsorted(starts, borders)
