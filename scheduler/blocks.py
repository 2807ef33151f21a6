"""The KV cache blocks of one worker: which are free, which rows use the others, and what stands in them.

A block is in exactly one of three places:

    free      nobody uses it and nothing can be found in it; a stack
    owned     used by one row or, if it is cached, by several
    idle      cached and used by nobody: given away, least recently used first, when no free one is left

A *cached* block is full of known tokens and can be found by them. Its key is the key of the block before it, as a
name, and its own tokens, byte for byte: two contents are equal if their keys are, so that no hash can collide. The
names are numbers that are never given twice, hence a chain whose head was given away is never found by a new head.

    PRIVATE   not cached
    PENDING   cached, but no plan sent so far computes all of it; others may wait for it, not use it
    READY     computed once every plan sent so far is done; plans are executed in order, so any later plan may use it
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .events import IntColumn

PRIVATE, PENDING, READY = range(3)
BYTES_PER_TOKEN = 4


def root(salt: str) -> bytes:
    """The name that chains begin with. Requests of different salts share nothing."""
    return b"r" + salt.encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class Match:
    """The longest chain of READY blocks that holds a sequence's first tokens."""

    blocks: list[int]
    name: bytes
    """Of the last of them, or the root."""
    pending: bool
    """The block that follows is being computed for another row."""


class BlockPool:
    """Blocks 0 … total - 1 of `block_size` tokens."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self.evictions = 0
        self.generation = 0
        """Grows whenever the result of `match` may change."""
        self._stack = np.arange(total - 1, -1, -1, dtype=np.int32)
        self._free = total
        self._users = np.zeros(total, np.int32)
        self._state = np.zeros(total, np.uint8)
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}
        self._name: dict[int, bytes] = {}
        self._next_name = 0

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return self._free + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that can be found by their tokens."""
        return len(self._index)

    # --- owners ----------------------------------------------------------------------------------------------------

    def take(self, count: int) -> IntColumn:
        """`count` block ids, int32[count], each with one user. Raises ValueError if fewer are available, and takes
        nothing."""
        if count > self._free:
            if count > self.available:
                raise ValueError(f"{count} blocks asked for, {self.available} of {self.total} are available")
            self._evict(count - self._free)
        self._free -= count
        taken = self._stack[self._free : self._free + count][::-1].copy()
        self._users[taken] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more user for each of these cached blocks."""
        self._users[blocks] += 1
        for block in blocks:
            self._idle.pop(block, None)

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of these nobody uses, and `available` counts."""
        return int(np.count_nonzero(self._users[blocks] == 0)) if blocks else 0

    def give(self, blocks: IntColumn) -> None:
        """One user less for each; in the order of the sequence that they hold, whose tail is then given away first.

        Raises ValueError if nobody uses one of them, and changes nothing then.
        """
        users = self._users[blocks] - 1
        if len(blocks) and int(users.min()) < 0:
            raise ValueError(f"blocks given back that nobody uses: {blocks[users < 0].tolist()}")
        self._users[blocks] = users
        unused = blocks[users == 0]
        state = self._state[unused]
        for block in unused[state == PENDING].tolist():
            self._forget(block)
        idle = unused[state == READY]
        for block in idle[::-1].tolist():
            self._idle[block] = None
        freed = unused[state != READY]
        self._stack[self._free : self._free + len(freed)] = freed
        self._free += len(freed)

    def _evict(self, count: int) -> None:
        self.evictions += count
        for _ in range(count):
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self._stack[self._free] = block
            self._free += 1

    # --- contents --------------------------------------------------------------------------------------------------

    def match(self, tokens: bytes, name: bytes, most: int) -> Match:
        """The longest chain after `name` for `tokens` (int32, as bytes), `most` blocks at most."""
        width = self.block_size * BYTES_PER_TOKEN
        index, state = self._index, self._state
        found: list[int] = []
        for start in range(0, most * width, width):
            block = index.get(name + tokens[start : start + width])
            if block is None:
                break
            if state[block] != READY:
                return Match(found, name, True)
            found.append(block)
            name = self._name[block]
        return Match(found, name, False)

    def enter(self, tokens: bytes, name: bytes, blocks: Sequence[int], state: int) -> bytes:
        """Makes full blocks findable that hold `tokens` (int32, as bytes) after `name`; returns the last one's name.

        Contents that another block holds already stay where they are, and the chain goes on from there.
        """
        width = self.block_size * BYTES_PER_TOKEN
        self.generation += 1
        for start, block in zip(range(0, len(tokens), width), blocks, strict=True):
            key = name + tokens[start : start + width]
            holder = self._index.setdefault(key, block)
            if holder == block:
                self._key[block] = key
                self._name[block] = b"n" + self._next_name.to_bytes(8, "little")
                self._next_name += 1
                self._state[block] = state
            name = self._name[holder]
        return name

    def computed(self, blocks: IntColumn) -> None:
        """A plan was made that completes these blocks: those that are PENDING become READY."""
        pending = blocks[self._state[blocks] == PENDING]
        if len(pending):
            self._state[pending] = READY
            self.generation += 1

    def _forget(self, block: int) -> None:
        del self._index[self._key.pop(block)]
        del self._name[block]
        self._state[block] = PRIVATE
        self.generation += 1

    # --- integrity -------------------------------------------------------------------------------------------------

    def check(self, tables: Sequence[IntColumn]) -> None:
        """Raises AssertionError unless free + idle + owned = all blocks, the users are these rows' block tables, and
        exactly the cached blocks can be found."""
        users = np.zeros(self.total, np.int32)
        for table in tables:
            np.add.at(users, table, 1)
        owned = np.flatnonzero(users)
        idle = np.array(list(self._idle), np.int64)
        places = np.sort(np.concatenate([self._stack[: self._free], idle, owned]))
        findable = np.array(sorted(self._index.values()), np.int64)
        problems = [
            (not np.array_equal(places, np.arange(self.total)), f"free, idle and owned are not all blocks: {places}"),
            (not np.array_equal(users, self._users), "users are miscounted"),
            (not np.array_equal(findable, np.flatnonzero(self._state != PRIVATE)), "cached blocks are misfiled"),
            (bool((self._state[idle] != READY).any()), "an idle block is not READY"),
            (bool((self._state[self._stack[: self._free]] != PRIVATE).any()), "a free block is cached"),
            (bool((self._state[users > 1] != READY).any()), "a block that is not READY has several users"),
            (any(self._index[key] != block for block, key in self._key.items()), "a key leads to another block"),
            (len(self._key) != len(self._index) or self._key.keys() != self._name.keys(), "keys and names differ"),
        ]
        for broken, story in problems:
            if broken:
                raise AssertionError(story)
