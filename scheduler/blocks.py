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

import struct
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

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
        # Lists, not columns: most calls are about a handful of blocks.
        self._free = list(range(total - 1, -1, -1))
        self._users = [0] * total
        self._state = bytearray(total)
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}
        """Cached blocks by key."""
        self._pieces = struct.Struct(f"{block_size * BYTES_PER_TOKEN}s")
        """A block's tokens, as bytes."""
        self._key = [b""] * total
        self._name = [b""] * total
        """By block, if it is cached."""
        self._next_name = 0

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that can be found by their tokens."""
        return len(self._index)

    # --- owners ----------------------------------------------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        """`count` block ids, each with one user. Raises ValueError if fewer are available, and takes nothing."""
        free = self._free
        if count > len(free):
            if count > self.available:
                raise ValueError(f"{count} blocks asked for, {self.available} of {self.total} are available")
            self._evict(count - len(free))
        border = len(free) - count
        taken = free[border:]
        del free[border:]
        taken.reverse()
        users = self._users
        for block in taken:
            users[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more user for each of these cached blocks."""
        for block in blocks:
            if not self._users[block]:
                del self._idle[block]
            self._users[block] += 1

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of these nobody uses, and `available` counts."""
        users = self._users
        return sum(not users[block] for block in blocks)

    def give(self, blocks: Sequence[int]) -> None:
        """One user less for each; in the order of the sequence that they hold, whose tail is then given away first.

        Raises ValueError if nobody uses one of them, and changes nothing then.
        """
        users, state = self._users, self._state
        if not all(map(users.__getitem__, blocks)):
            unused = [block for block in blocks if not users[block]]
            raise ValueError(f"blocks given back that nobody uses: {unused}")
        for block in reversed(blocks):
            users[block] -= 1
            if users[block]:
                continue
            if state[block] == READY:
                self._idle[block] = None
                continue
            if state[block] == PENDING:
                self._forget(block)
            self._free.append(block)

    def _evict(self, count: int) -> None:
        self.evictions += count
        oldest = [self._idle.popitem(last=False)[0] for _ in range(count)]
        for block in oldest:
            self._forget(block)
        self._free += oldest

    # --- contents --------------------------------------------------------------------------------------------------

    def match(self, tokens: bytes, name: bytes, most: int) -> Match:
        """The longest chain after `name` for `tokens` (int32, as bytes), `most` blocks at most."""
        index, state = self._index, self._state
        found: list[int] = []
        for (piece,) in self._pieces.iter_unpack(tokens[: most * self._pieces.size]):
            block = index.get(name + piece)
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
        index, keys, names, states = self._index, self._key, self._name, self._state
        self.generation += 1
        for (piece,), block in zip(self._pieces.iter_unpack(tokens), blocks, strict=True):
            key = name + piece
            holder = index.setdefault(key, block)
            if holder == block:
                self._next_name += 1
                names[block] = b"n%d;" % self._next_name
                keys[block] = key
                states[block] = state
            name = names[holder]
        return name

    def computed(self, blocks: Sequence[int]) -> None:
        """A plan was made that completes these blocks: those that are PENDING become READY."""
        state = self._state
        for block in blocks:
            if state[block] == PENDING:
                state[block] = READY
                self.generation += 1

    def _forget(self, block: int) -> None:
        del self._index[self._key[block]]
        self._state[block] = PRIVATE
        self.generation += 1

    # --- integrity -------------------------------------------------------------------------------------------------

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Raises AssertionError unless free + idle + owned = all blocks, the users are these rows' block tables, and
        exactly the cached blocks can be found."""
        users = Counter(block for table in tables for block in table)
        places = sorted([*self._free, *self._idle, *users])
        cached = [block for block in range(self.total) if self._state[block] != PRIVATE]
        problems = [
            (places != list(range(self.total)), f"free, idle and owned are not all blocks: {places}"),
            (self._users != [users[block] for block in range(self.total)], "users are miscounted"),
            (sorted(self._index.values()) != cached, "cached blocks are misfiled"),
            (any(self._state[block] != READY for block in self._idle), "an idle block is not READY"),
            (any(self._state[block] != PRIVATE for block in self._free), "a free block is cached"),
            (any(n > 1 and self._state[block] != READY for block, n in users.items()), "an unfinished block is shared"),
            (any(self._key[block] != key for key, block in self._index.items()), "a key leads elsewhere"),
            (len({self._name[block] for block in cached}) != len(cached), "two blocks have one name"),
        ]
        for broken, story in problems:
            if broken:
                raise AssertionError(story)
