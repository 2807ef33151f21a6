"""Which KV cache blocks of a worker are free."""

from __future__ import annotations

import numpy as np

from .events import IntColumn


class BlockPool:
    """Free blocks 0 … total - 1 of one worker, as a stack: the block given back last is taken first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._stack = np.arange(total - 1, -1, -1, dtype=np.int32)
        self.free = total

    def take(self, count: int) -> IntColumn:
        """`count` block ids, int32[count]. The caller has checked `free`; raises ValueError otherwise, and takes
        nothing."""
        if count > self.free:
            raise ValueError(f"{count} blocks asked for, {self.free} of {self.total} are free")
        self.free -= count
        return self._stack[self.free : self.free + count][::-1].copy()

    def give(self, blocks: IntColumn) -> None:
        """Takes back blocks that nobody uses any more. Raises ValueError if that is more than there are."""
        end = self.free + len(blocks)
        if end > self.total:
            raise ValueError(f"{len(blocks)} blocks given back, but {self.free} of {self.total} were free already")
        self._stack[self.free : end] = blocks
        self.free = end

    def free_blocks(self) -> IntColumn:
        """The free ids, in no particular order (a view, for integrity checks)."""
        return self._stack[: self.free]
