"""How the contexts of decoding rows are cut so that all multiprocessors have work until the end.

Rows differ in length, and a step lasts as long as its longest program. So long contexts are cut into pieces of one
length, the shortest with which no more pieces come out than there is room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

TILE: Final = 64
"""Tokens whose keys a program looks at together; pieces begin at multiples of it."""
PIECE_COLUMNS: Final = 5
"""Of a piece: its row (-1: there is none), first token, end, number among its row's pieces, how many those are."""


class Cutting(Protocol):
    """How a backend wants the contexts of decoding rows cut: into what kind of pieces, and how they are told."""

    def room(self, rows: int) -> int:
        """How many int32 values tell the pieces of `rows` contexts; no fewer than for fewer rows."""
        ...

    def write(self, kv_lens: NDArray[np.int32], out: NDArray[np.int32]) -> None:
        """Cuts R contexts of `kv_lens` [R] tokens, all at least 1; fills `out` [room(R)] int32."""
        ...


@dataclass(frozen=True, slots=True)
class EqualPieces:
    """By `share_out`, into up to `spare` more pieces than there are rows, for layers of all kinds alike."""

    spare: int

    def room(self, rows: int) -> int:
        return PIECE_COLUMNS * (rows + self.spare)

    def write(self, kv_lens: NDArray[np.int32], out: NDArray[np.int32]) -> None:
        most = len(kv_lens) + self.spare
        share_out(kv_lens, most, out.reshape(PIECE_COLUMNS, most))


def share_out(kv_lens: NDArray[np.int32], most: int, out: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cuts R contexts of `kv_lens` [R] tokens, all at least 1, into at most `most` >= R pieces.

    Fills and returns `out` [PIECE_COLUMNS, most] int32. A row's pieces follow each other.
    """
    tiles = (kv_lens + (TILE - 1)) // TILE
    low, high = max(1, -(-int(tiles.sum()) // most)), int(tiles.max())
    while low < high:
        middle = (low + high) // 2
        if int((-(-tiles // middle)).sum()) <= most:
            high = middle
        else:
            low = middle + 1
    parts = -(-tiles // low)
    count = int(parts.sum())
    row = np.repeat(np.arange(len(kv_lens), dtype=np.int32), parts)
    starts = np.cumsum(parts) - parts
    part = np.arange(count, dtype=np.int32) - starts[row].astype(np.int32)
    first = part * np.int32(low * TILE)
    out[0, :count], out[0, count:] = row, -1
    out[1, :count] = first
    np.minimum(first + low * TILE, kv_lens[row], out=out[2, :count])
    out[3, :count] = part
    out[4, :count] = parts[row]
    out[1:, count:] = 0
    return out
