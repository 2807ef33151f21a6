"""The KV cache blocks of one worker: which are free, which rows use the others, and what stands in them.

A block is in exactly one of three places:

    free      nobody uses it and nothing can be found in it; a stack
    owned     used by one row or, if it is cached, by several
    idle      cached and used by nobody: given away, least recently used first, when no free one is left

A *cached* block is full of known tokens and can be found by them. Blocks that were filed one behind the other form a
*run*, which has their tokens byte for byte: filing a prompt costs one entry of the index, whatever its length. Where a
sequence leaves a run, a new one begins, whose key is the place where it begins and its first block's tokens. Two
contents are equal if their bytes are, so that no hash can collide; and a place in a run is never given twice, hence a
chain whose head was given away is never found by a new head.

    PRIVATE   not cached
    PENDING   cached, but no plan sent so far computes all of it; others may wait for it, not use it
    READY     computed once every plan sent so far is done; plans are executed in order, so any later plan may use it
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

from .records import record

BYTES_PER_TOKEN = 4
GONE = -1
"""In a run, instead of a block that was given away."""
EVICTED_AT_ONCE = 256
"""A pool of so many blocks may give one away beyond need when it must give any, one of twice as many two, and so on: it
is cheaper to look for several at once, and to forget at once what became idle together."""
MOST_STALE = 64
"""So many blocks that are idle no more, or as many as are, may stand among those that are."""

Key: TypeAlias = tuple[int | str, int, bytes]
"""By what a run is found: name and place where it leaves another, and its first block's tokens."""


class Run:
    """Cached blocks, each behind the one before it."""

    __slots__ = ("blocks", "closed", "key", "name", "nothing", "shared", "tokens")

    def __init__(self, name: int | str, key: Key, tokens: bytes, blocks: list[int], closed: bool = False) -> None:
        self.name = name
        """A number that no other run of the pool ever has; for the beginning of sequences, the salt."""
        self.key = key
        """In the index, while the first block is there."""
        self.tokens = tokens
        """Of the blocks, int32, as bytes; perhaps of more."""
        self.blocks = blocks
        """With GONE for those that were given away before the last."""
        self.closed = closed
        """It gets no longer, since its end was given away once: places are never used again."""
        self.shared = False
        """Its blocks may have different users. If not, one sequence uses all of them, or nobody any."""
        self.nothing: Match | None = None
        """What is found of most sequences that begin here; one for all, since nobody changes it."""


Place: TypeAlias = tuple[Run, int]
"""A cached block as what others follow: its run, and where in it; -1 for the beginning of a sequence."""


@record
class Match:
    """The longest chain of READY blocks that holds a sequence's first tokens."""

    blocks: list[int]
    place: Place
    """Of the last of them, or the root."""
    pending: bool = False
    """The block that follows is being computed for another row."""
    ends: bool = False
    """Nothing that was looked for follows; else there was nothing more to look for, or it is `pending`."""


@lru_cache(maxsize=1_024)
def root(salt: str) -> Place:
    """The place that sequences begin at. Requests of different salts share nothing."""
    run, twin = (Run(salt, (salt, -1, b""), b"", [], closed=True) for _ in range(2))
    run.nothing = Match([], (twin, -1), False, True)  # not `run`: they would keep each other for ever
    return run, -1


def _unused(block: int) -> ValueError:
    return ValueError(f"block {block} is given back, but nobody uses it")


class BlockPool:
    """Blocks 0 … total - 1 of `block_size` tokens."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self.evictions = 0
        self.generation = 0
        """Grows whenever the result of `match` may change."""
        self.cached = 0
        """Blocks that can be found by their tokens."""
        # No columns of NumPy: most calls are about a handful of blocks.
        self._free = list(range(total - 1, -1, -1))
        self._users = [0] * total
        """By block; if nobody uses it, the negative stamp of its last entry in `_idle`, or 0."""
        self._idle: deque[tuple[int, list[int]]] = deque()
        """What became idle together, with a stamp, least recently used first; each list ends with what shall be given
        away first. A block counts only where `_users` has that stamp."""
        self._num_idle = 0
        self._num_entries = 0
        """Blocks in `_idle`, with those that do not count."""
        self._stamp = 0
        """The last one given; they go down."""
        self._run: list[Run | None] = [None] * total
        """By block: where it can be found; None if it is PRIVATE, or a run that has no blocks any more."""
        self._pending: set[int] = set()
        """Cached blocks that are not READY."""
        self._index: dict[Key, Run] = {}
        """Runs by key, if their first block is still there."""
        self._next_name = 0
        self._piece = block_size * BYTES_PER_TOKEN
        """Bytes of a block's tokens."""

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + self._num_idle

    # --- owners ----------------------------------------------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        """`count` block ids, each with one user. Raises ValueError if fewer are available, and takes nothing."""
        free = self._free
        if count > len(free):
            if count > self.available:
                raise ValueError(f"{count} blocks asked for, {self.available} of {self.total} are available")
            self._evict(count - len(free), count - len(free) + self.total // EVICTED_AT_ONCE)
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
        users, runs = self._users, self._run
        for block in blocks:
            run = runs[block]
            if run is not None:
                run.shared = True
            if users[block] > 0:
                users[block] += 1
            else:
                users[block] = 1
                self._num_idle -= 1

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of these nobody uses, and `available` counts."""
        users = self._users
        return sum(users[block] <= 0 for block in blocks)

    def give(self, *sequences: Sequence[int]) -> None:
        """One user less for each block; in the order of the sequences that they hold, whose tails are then given away
        first, those of the first sequence before all.

        Raises ValueError if nobody uses one of them, and changes nothing of this sequence and those behind it then.
        """
        users, runs, free = self._users, self._run, self._free
        for blocks in sequences:
            if not blocks:
                continue
            if self._pending and not self._pending.isdisjoint(blocks):
                for block in blocks:
                    if users[block] <= 0:
                        raise _unused(block)
                self._give_up([block for block in blocks if block in self._pending])
            stamp = self._stamp - 1
            idle: list[int] = []
            first = blocks[0]
            run = runs[first]
            if run is not None and not run.shared and users[first] == 1 and run.blocks == blocks[: len(run.blocks)]:
                idle += run.blocks  # no need to look at each: as a rule these are all but the last
                for block in idle:
                    users[block] = stamp
            rest = iter(blocks[len(idle) :])
            for block in rest:
                count = users[block]
                if count == 1:
                    run = runs[block]
                    if run is not None and run.blocks:
                        run.shared = True
                        users[block] = stamp
                        idle.append(block)
                    else:
                        users[block] = 0
                        free.append(block)
                elif count > 1:
                    users[block] = count - 1
                else:
                    self._keep(blocks[: len(blocks) - 1 - len(list(rest))], stamp)
                    raise _unused(block)
            if idle:
                self._stamp = stamp
                self._idle.append((stamp, idle))
                self._num_idle += len(idle)
                self._num_entries += len(idle)
        if self._num_entries > 2 * self._num_idle + MOST_STALE:
            self._drop_stale()

    def _keep(self, blocks: Sequence[int], stamp: int) -> None:
        """Undoes that these blocks, of the sequence that is being given back with that stamp, were."""
        users = self._users
        for block in reversed(blocks):
            if users[block] == stamp:
                users[block] = 1
            else:
                users[block] += 1
                if users[block] == 1:
                    self._free.pop()

    def _give_up(self, blocks: list[int]) -> None:
        """These will never be computed. They have one user, who leaves."""
        self._pending.difference_update(blocks)
        self._cut_off(blocks)
        self.cached -= len(blocks)
        self.generation += 1

    def _drop_stale(self) -> None:
        """Keeps of `_idle` what counts."""
        users = self._users
        kept = ((stamp, [block for block in blocks if users[block] == stamp]) for stamp, blocks in self._idle)
        self._idle = deque((stamp, blocks) for stamp, blocks in kept if blocks)
        self._num_entries = self._num_idle

    def idle(self) -> list[int]:
        """Blocks that nobody uses and that can be found, in the order in which they would be given away."""
        users = self._users
        return [block for stamp, blocks in self._idle for block in reversed(blocks) if users[block] == stamp]

    def _evict(self, least: int, most: int) -> None:
        """Makes `least` idle blocks free, or up to `most` where that saves parting what became idle together."""
        users, runs, index, free = self._users, self._run, self._index, self._free
        stale, idle = self._num_entries > self._num_idle, self._idle
        evicted = entries = 0
        while evicted < least or (idle and evicted + len(idle[0][1]) <= most):
            stamp, blocks = idle[0]
            if evicted + len(blocks) > most:
                popped = blocks[evicted - least :]
                del blocks[evicted - least :]
            else:
                popped = blocks
                idle.popleft()
            entries += len(popped)
            if stale:
                popped = [block for block in popped if users[block] == stamp]
                if not popped:
                    continue
            run = runs[popped[0]]
            if run is not None and run.blocks == popped:  # all that there is of it
                del index[run.key]
                run.blocks, run.tokens, run.closed = [], b"", True
            else:
                self._cut_off(popped)
            free += popped
            evicted += len(popped)
        self._num_entries -= entries
        self._num_idle -= evicted
        self.evictions += evicted
        self.cached -= evicted
        self.generation += 1

    # --- contents --------------------------------------------------------------------------------------------------

    def match(self, tokens: bytes, place: Place, most: int) -> Match:
        """The longest chain behind `place` for `tokens` (int32, as bytes), `most` blocks at most."""
        size, pending, index = self._piece, self._pending, self._index
        run, at = place
        nothing = run.nothing
        found: list[int] = []
        for offset in range(0, most * size, size):
            piece = tokens[offset : offset + size]
            blocks, next_at = run.blocks, at + 1
            # As `_behind` does it.
            if next_at < len(blocks) and blocks[next_at] != GONE and run.tokens.startswith(piece, next_at * size):
                at = next_at
            else:
                branch = index.get((run.name, at, piece))
                if branch is None:
                    return Match(found, place, False, True) if found or nothing is None else nothing
                run, at, blocks = branch, 0, branch.blocks
            block = blocks[at]
            if block in pending:
                return Match(found, place, pending=True)
            found.append(block)
            place = run, at
        return Match(found, place)

    def _behind(self, place: Place, piece: bytes) -> Place | None:
        """Where the block stands that holds `piece` behind a place; None if none does."""
        run, at = place
        next_at = at + 1
        blocks = run.blocks
        if next_at < len(blocks) and blocks[next_at] != GONE and run.tokens.startswith(piece, next_at * self._piece):
            return run, next_at
        branch = self._index.get((run.name, at, piece))
        return None if branch is None else (branch, 0)

    def enter(self, tokens: bytes, place: Place, blocks: list[int], ready: bool) -> Place:
        """Makes full blocks findable that hold `tokens` (int32, as bytes) behind `place`, as READY or PENDING; returns
        the last one's place.

        Contents that another block holds already stay where they are, and the chain goes on from there.
        """
        if not blocks:
            return place
        run, at = place
        if not run.closed and at + 1 == len(run.blocks):  # nothing has ever followed
            return self.file(tokens, place, blocks, ready)
        size = self._piece
        for i in range(len(blocks)):
            following = self._behind(place, tokens[i * size : (i + 1) * size])
            if following is None:
                return self.file(tokens[i * size :], place, blocks[i:], ready)
            place = following
            following[0].shared = True  # what is filed behind it belongs to a sequence that does not use it
        return place

    def file(self, tokens: bytes, place: Place, blocks: list[int], ready: bool) -> Place:
        """As `enter` blocks, one at least, of which nothing equals the first, so that nothing equals those behind it
        either: as a match says that `ends` at `place`, if nothing was entered since."""
        run, at = place
        if at + 1 == len(run.blocks) and not run.closed:
            run.tokens += tokens
            run.blocks += blocks
            at += len(blocks)
        else:
            self._next_name += 1
            key = run.name, at, tokens[: self._piece]
            run = self._index[key] = Run(self._next_name, key, tokens, blocks.copy())
            at = len(blocks) - 1
        runs = self._run
        for block in blocks:
            runs[block] = run
        if not ready:
            self._pending.update(blocks)
        self.cached += len(blocks)
        self.generation += 1
        return run, at

    def computed(self, blocks: Sequence[int]) -> None:
        """A plan was made that completes these blocks: those that are PENDING become READY."""
        before = len(self._pending)
        self._pending.difference_update(blocks)
        self.generation += before - len(self._pending)

    def _cut_off(self, blocks: list[int]) -> None:
        """These can be found no more. As a rule they are the end of a run, in its order."""
        runs = self._run
        run = runs[blocks[0]]
        if run is not None and run.blocks[-len(blocks) :] == blocks:
            self._cut(run, len(run.blocks) - len(blocks))
        else:
            for block in reversed(blocks):
                self._cut_out(block)
        for block in blocks:
            runs[block] = None

    def _cut_out(self, block: int) -> None:
        run = self._run[block]
        if run is None:
            raise RuntimeError(f"block {block} is not cached")
        if run.blocks[-1] == block:
            self._cut(run, len(run.blocks) - 1)
            return
        at = run.blocks.index(block)
        run.blocks[at] = GONE
        if not at:
            del self._index[run.key]

    def _cut(self, run: Run, end: int) -> None:
        """The blocks of a run from `end` on are gone."""
        blocks = run.blocks
        while end and blocks[end - 1] == GONE:
            end -= 1
        if not end and blocks[0] != GONE:
            del self._index[run.key]
        del blocks[end:]
        run.closed = True
        if 2 * end * self._piece < len(run.tokens):
            run.tokens = run.tokens[: end * self._piece]

    # --- integrity -------------------------------------------------------------------------------------------------

    def _is_cached(self, block: int) -> bool:
        run = self._run[block]
        return run is not None and bool(run.blocks)

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Raises AssertionError unless free + idle + owned = all blocks, the users are these rows' block tables, and
        exactly the cached blocks stand in runs."""
        users = Counter(block for table in tables for block in table)
        idle = self.idle()
        places = sorted([*self._free, *idle, *users])
        cached = [block for block in range(self.total) if self._is_cached(block)]
        runs = {id(run): run for run in self._run if run is not None and run.blocks}.values()
        filed = [(block, run) for run in runs for block in run.blocks if block != GONE]
        heads = sorted(id(run) for run in runs if run.blocks[0] != GONE)
        problems = [
            (places != list(range(self.total)), f"free, idle and owned are not all blocks: {places}"),
            ([max(0, n) for n in self._users] != [users[b] for b in range(self.total)], "users are miscounted"),
            (self._num_idle != len(idle), f"{self._num_idle} blocks are counted as idle, {len(idle)} are"),
            (self._num_entries != sum(len(blocks) for _, blocks in self._idle), "idle entries are miscounted"),
            (not all(self._is_cached(block) for block in idle), "an idle block cannot be found"),
            (any(self._is_cached(block) for block in self._free), "a free block is cached"),
            (self._pending != self._pending & set(cached) & set(users), "what nobody computes is pending"),
            (any(users[block] > 1 for block in self._pending), "an unfinished block is shared"),
            (any(n > 1 and not self._is_cached(block) for block, n in users.items()), "a private block is shared"),
            (self.cached != len(cached), f"{self.cached} blocks are counted as cached, {len(cached)} are"),
            (sorted(block for block, _ in filed) != cached, "cached blocks are misfiled"),
            (any(self._run[block] is not run for block, run in filed), "a block stands in another run"),
            (sorted(id(run) for run in self._index.values()) != heads, "other runs can be found than begin"),
            (any(run.key != key for key, run in self._index.items()), "a key leads elsewhere"),
            (any(run.blocks[-1] == GONE for run in runs), "a run ends with what is gone"),
            (
                any(len({users[b] for b in run.blocks if b != GONE}) > 1 for run in runs if not run.shared),
                "blocks of a run have different users, and it is not marked for that",
            ),
            (
                any(len(run.tokens) != len(run.blocks) * self._piece for run in runs if not run.closed),
                "a run that may get longer has tokens of more blocks than it has",
            ),
            (any(len(run.tokens) < len(run.blocks) * self._piece for run in runs), "a block has lost its tokens"),
        ]
        for broken, story in problems:
            if broken:
                raise AssertionError(story)
