"""The block pool against a model of sets, lists and dicts, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.scheduler.blocks import BlockPool, Key, Match, Place, Run, root

from support.profiles import examples, most_s

BLOCK = 2
"""Tokens a block. With the tokens 0 and 1 there are four contents, so that near misses are the rule."""

Piece: TypeAlias = tuple[int, ...]


def as_bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, np.int32).tobytes()


class SameHash(tuple[Any, ...]):
    """A key that collides with every other."""

    def __hash__(self) -> int:
        return 1


class CollidingIndex(dict[Key, Run]):
    """A dict in which all keys have one hash."""

    def get(self, key: Key, default: Any = None) -> Any:
        return super().get(SameHash(key), default)

    def __setitem__(self, key: Key, value: Run) -> None:
        super().__setitem__(SameHash(key), value)

    def __getitem__(self, key: Key) -> Run:
        return super().__getitem__(SameHash(key))

    def __delitem__(self, key: Key) -> None:
        super().__delitem__(SameHash(key))

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, tuple)
        return super().__contains__(SameHash(key))


def state_of(pool: BlockPool) -> tuple[Any, ...]:
    """All that a pool remembers, to be compared."""
    runs = {id(run): run for run in pool._run if run is not None}
    return (
        list(pool._free),
        list(pool._users),
        sorted(pool._pending),
        pool.idle(),
        sorted((repr(tuple(key)), repr(run.name)) for key, run in pool._index.items()),
        sorted((repr(run.name), repr(run.key), run.tokens, run.blocks, run.closed) for run in runs.values()),
        pool.evictions,
        pool.cached,
    )


class TwinPools:
    """A pool, and one whose keys all collide, which must do the same."""

    def __init__(self, total: int) -> None:
        self.plain = BlockPool(total, BLOCK)
        self.colliding = BlockPool(total, BLOCK)
        self.colliding._index = CollidingIndex()
        self._twins: dict[Place, Place] = {}
        """Places of the colliding pool by those of the plain one."""

    def call(self, method: str, *arguments: Any) -> Any:
        result = getattr(self.plain, method)(*arguments)
        twin = getattr(self.colliding, method)(
            *(self._twins.get(a, a) if isinstance(a, tuple) else a for a in arguments)
        )
        if isinstance(result, Match):
            assert (twin.blocks, twin.pending, twin.ends) == (result.blocks, result.pending, result.ends)
            self._pair(result.place, twin.place)
        elif isinstance(result, tuple):
            self._pair(result, twin)
        else:
            assert twin == result
        return result

    def _pair(self, plain: Place, colliding: Place) -> None:
        assert (colliding[0].name, colliding[1]) == (plain[0].name, plain[1])
        self._twins[plain] = colliding

    def refused(self, method: str, *arguments: Any) -> None:
        """The call raises ValueError and changes nothing."""
        before = state_of(self.plain)
        for pool in (self.plain, self.colliding):
            with pytest.raises(ValueError, match=r"\d"):
                getattr(pool, method)(*arguments)
        assert state_of(self.plain) == before

    def check(self, tables: list[list[int]]) -> None:
        self.plain.check(tables)
        self.colliding.check(tables)
        assert state_of(self.plain) == state_of(self.colliding)


@dataclass(eq=False)
class Cached:
    """The model of one cached block: what it holds, after what."""

    before: Cached | str
    """The block before it, or the salt."""
    piece: Piece
    block: int
    ready: bool

    def contents(self) -> tuple[str, list[int]]:
        salt, tokens = self.before.contents() if isinstance(self.before, Cached) else (self.before, [])
        return salt, [*tokens, *self.piece]


@dataclass(eq=False)
class Row:
    blocks: list[int]
    pieces: list[Piece]
    """Contents of the full ones; those behind are private and not full."""
    place: Place
    last: Cached | str
    """The model of `place`."""
    filed: int
    computed: int
    """Full blocks that plans have computed."""


@dataclass
class Model:
    """What the pool should hold."""

    free: set[int]
    users: dict[int, int] = field(default_factory=dict)
    idle: list[int] = field(default_factory=list)
    """Least recently used first."""
    cached: dict[tuple[Cached | str, Piece], Cached] = field(default_factory=dict)
    evictions: int = 0

    def match(self, salt: str, pieces: list[Piece]) -> tuple[list[Cached], bool]:
        found: list[Cached] = []
        for piece in pieces:
            block = self.cached.get((found[-1] if found else salt, piece))
            if block is None:
                return found, False
            if not block.ready:
                return found, True
            found.append(block)
        return found, False

    def of_block(self, block: int) -> Cached | None:
        return next((one for one in self.cached.values() if one.block == block), None)

    def forget(self, block: int) -> None:
        self.cached = {key: one for key, one in self.cached.items() if one.block != block}


class BlocksMachine(RuleBasedStateMachine):
    """Rows come with a prompt, have it computed, generate, and leave, in any order, over a pool that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    @initialize(total=st.integers(3, 10))
    def make(self, total: int) -> None:
        self.pools = TwinPools(total)
        self.model = Model(free=set(range(total)))

    pieces = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=4)
    salts = st.sampled_from(["", "a", "b"])

    def flat(self, pieces: list[Piece]) -> list[int]:
        return [token for piece in pieces for token in piece]

    # --- rules -----------------------------------------------------------------------------------------------------

    @rule(salt=salts, pieces=pieces, more=st.integers(0, 5), most=st.integers(0, 5))
    def match(self, salt: str, pieces: list[Piece], more: int, most: int) -> None:
        """`more`: tokens after the full blocks, which must not matter."""
        tokens = as_bytes([*self.flat(pieces), *([1] * (more % BLOCK))])
        most = min(most, len(pieces))
        found: Match = self.pools.call("match", tokens, root(salt), most)
        should, pending = self.model.match(salt, pieces[:most])
        assert (found.blocks, found.pending) == ([one.block for one in should], pending)
        assert found.ends == (len(should) < most and not pending)
        if should:
            assert should[-1].contents() == (salt, self.flat(pieces[: len(should)]))  # so the model is right, too

    @rule(salt=salts, pieces=pieces, rest=st.integers(0, 1))
    def admit(self, salt: str, pieces: list[Piece], rest: int) -> None:
        """A row with these full blocks and perhaps one that is not full."""
        most = len(pieces) if rest else max(0, len(pieces) - 1)
        tokens = as_bytes(self.flat(pieces))
        match: Match = self.pools.call("match", tokens, root(salt), most)
        needed = len(pieces) + rest - len(match.blocks)
        if match.pending or self.pools.plain.available - self.pools.plain.idle_among(match.blocks) < needed:
            return
        self.pools.call("share", match.blocks)
        for block in match.blocks:
            self.model.users[block] = self.model.users.get(block, 0) + 1
            self.model.idle = [one for one in self.model.idle if one != block]
        own = self.take(needed)
        shared, _ = self.model.match(salt, pieces[:most])
        row = Row(match.blocks + own, pieces, match.place, shared[-1] if shared else salt, len(shared), len(shared))
        self.rows.append(row)
        self.enter(row, ready=False, method="file" if match.ends else "enter")

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), blocks=st.integers(0, 3))
    def compute(self, data: st.DataObject, blocks: int) -> None:
        row = data.draw(st.sampled_from(self.rows))
        done = min(len(row.pieces), row.computed + blocks)
        self.pools.call("computed", row.blocks[row.computed : done])
        for block in row.blocks[row.computed : done]:
            cached = self.model.of_block(block)
            if cached is not None:
                cached.ready = True
        row.computed = done

    @precondition(lambda self: any(row.computed == len(row.pieces) == len(row.blocks) for row in self.rows))
    @rule(data=st.data(), piece=st.tuples(st.integers(0, 1), st.integers(0, 1)))
    def generate(self, data: st.DataObject, piece: Piece) -> None:
        """A row whose known tokens are computed fills one more block with tokens of its own."""
        full = [row for row in self.rows if row.computed == len(row.pieces) == len(row.blocks)]
        row = data.draw(st.sampled_from(full))
        if self.pools.plain.available:
            row.blocks = row.blocks + self.take(1)
            row.pieces = [*row.pieces, piece]
            row.computed += 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), file=st.booleans())
    def leave(self, data: st.DataObject, file: bool) -> None:
        """Rows end together, or one is preempted; what they generated is filed, or not."""
        leaving = data.draw(st.lists(st.sampled_from(self.rows), min_size=1, max_size=3, unique_by=id))
        self.rows = [row for row in self.rows if row not in leaving]
        for row in leaving:
            if file and row.computed == len(row.pieces):
                self.enter(row, ready=True)
        self.pools.call("give", *(row.blocks for row in leaving))
        for block in (block for row in leaving for block in reversed(row.blocks)):
            self.model.users[block] -= 1
            if self.model.users[block]:
                continue
            del self.model.users[block]
            cached = self.model.of_block(block)
            if cached is not None and cached.ready:
                self.model.idle.append(block)
            else:
                self.model.forget(block)
                self.model.free.add(block)

    @rule(data=st.data())
    def give_what_nobody_uses(self, data: st.DataObject) -> None:
        unused = sorted(set(range(self.pools.plain.total)) - set(self.model.users))
        if unused:
            used = (
                data.draw(st.lists(st.sampled_from(sorted(self.model.users)), max_size=2)) if self.model.users else []
            )
            self.pools.refused("give", [*used, data.draw(st.sampled_from(unused))])

    @precondition(lambda self: self.model_has_one_user())
    @rule(data=st.data())
    def give_twice_in_one_sequence(self, data: st.DataObject) -> None:
        """Private, cached and shared ones before it are as they were, too."""
        used = data.draw(st.permutations(sorted(self.model.users)))
        once = data.draw(st.sampled_from([block for block in used if self.model.users[block] == 1]))
        if not self.pools.plain._pending.intersection(used):
            self.pools.refused("give", [*used, once])

    def model_has_one_user(self) -> bool:
        return hasattr(self, "model") and 1 in self.model.users.values()

    @rule(more=st.integers(1, 3))
    def take_too_many(self, more: int) -> None:
        self.pools.refused("take", self.pools.plain.available + more)

    # --- the model -------------------------------------------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        taken: list[int] = self.pools.call("take", count)
        model = self.model
        evicted = model.idle[: max(0, count - len(model.free))]
        if evicted:
            assert set(taken) == model.free | set(evicted)
        else:
            assert set(taken) <= model.free  # nothing is forgotten while something is free
        assert len(set(taken)) == count
        model.evictions += len(evicted)
        model.idle = model.idle[len(evicted) :]
        for block in evicted:
            model.forget(block)
        model.free -= set(taken)
        model.users |= dict.fromkeys(taken, 1)
        return taken

    def enter(self, row: Row, ready: bool, method: str = "enter") -> None:
        tokens, blocks = self.flat(row.pieces[row.filed :]), row.blocks[row.filed : len(row.pieces)]
        row.place = self.pools.call(method, as_bytes(tokens), row.place, blocks, ready)
        for piece, block in zip(row.pieces[row.filed :], blocks, strict=True):
            row.last = self.model.cached.setdefault((row.last, piece), Cached(row.last, piece, block, ready))
        row.filed = len(row.pieces)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "pools"):
            return
        self.pools.check([row.blocks for row in self.rows])
        pool, model = self.pools.plain, self.model
        assert pool.available == len(model.free) + len(model.idle)
        assert pool.idle() == model.idle
        assert pool.cached == len(model.cached)
        assert pool.evictions == model.evictions
        assert pool.idle_among(range(pool.total)) == pool.available


EXAMPLES = examples(ci=200, nightly=20_000)
TestBlocks = pytest.mark.timeout(most_s(EXAMPLES))(BlocksMachine.TestCase)
TestBlocks.settings = settings(max_examples=EXAMPLES, stateful_step_count=40)


# ---------------------------------------------------------------------------------------------------------------------


def cached_chain(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """Blocks that hold `tokens`, computed and used by nobody."""
    blocks = pool.take(len(tokens) // BLOCK)
    pool.enter(as_bytes(tokens), root(salt), blocks, True)
    pool.give(blocks)
    return blocks


def found(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    return pool.match(as_bytes(tokens), root(salt), len(tokens) // BLOCK).blocks


def test_contents_that_differ_in_one_token_match_up_to_there_and_no_further() -> None:
    pool = BlockPool(8, BLOCK)
    tokens = [5, 6, 7, 8, 9, 10]
    blocks = cached_chain(pool, tokens)
    for position in range(len(tokens)):
        for other in (tokens[position] + 1, tokens[position] - 1, tokens[position] + 256, -1, 0):
            changed = [*tokens[:position], other, *tokens[position + 1 :]]
            assert found(pool, changed) == blocks[: position // BLOCK]


def test_equal_pieces_after_different_beginnings_are_different() -> None:
    pool = BlockPool(8, BLOCK)
    cached_chain(pool, [1, 1, 7, 7])
    assert found(pool, [7, 7]) == []
    assert found(pool, [2, 2, 7, 7]) == []
    second = cached_chain(pool, [2, 2])
    assert found(pool, [2, 2, 7, 7]) == second


def test_salts_share_nothing_even_if_one_looks_like_a_name_or_like_tokens() -> None:
    pool = BlockPool(16, BLOCK)
    salts = ["", "a", "n1;", "\ud800", as_bytes([1, 1]).decode("latin-1"), "a" * 256]
    chains = [cached_chain(pool, [1, 1, 2, 2], salt) for salt in salts]
    assert len({block for chain in chains for block in chain}) == 2 * len(salts)
    for salt, chain in zip(salts, chains, strict=True):
        assert found(pool, [1, 1, 2, 2], salt) == chain
    assert found(pool, [1, 1, 2, 2], "b") == []


def test_the_tail_is_given_away_first_and_the_least_recently_used_chain_before_it() -> None:
    pool = BlockPool(4, BLOCK)
    old = cached_chain(pool, [1, 1, 2, 2])
    new = cached_chain(pool, [3, 3, 4, 4])
    assert pool.take(1) == [old[1]]
    assert found(pool, [1, 1, 2, 2]) == old[:1]
    pool.share(old[:1])
    pool.give(old[:1])  # used now, so the other is the older one
    assert sorted(pool.take(2)) == sorted(new)
    assert found(pool, [1, 1, 2, 2]) == old[:1]
    assert pool.evictions == 3


def test_a_chain_whose_head_was_given_away_is_not_found_by_an_equal_new_head() -> None:
    pool = BlockPool(4, BLOCK)
    head = pool.take(1)
    name = pool.enter(as_bytes([1, 1]), root(""), head, True)
    twin = pool.take(1)  # a second row computed the same head, and its next block was filed behind the first one's
    rest = pool.take(1)
    behind = pool.enter(as_bytes([1, 1]), root(""), twin, True)
    assert behind == name
    pool.enter(as_bytes([2, 2]), behind, rest, True)
    pool.give(head)
    pool.give(twin)
    assert found(pool, [1, 1, 2, 2]) == [head[0], rest[0]]
    taken = pool.take(3)  # two were free, the head is the only idle one
    assert pool.evictions == 1
    assert head[0] in taken
    assert found(pool, [1, 1, 2, 2]) == []
    new = [taken[0]]
    pool.enter(as_bytes([1, 1]), root(""), new, True)
    assert found(pool, [1, 1, 2, 2]) == new
    pool.check([taken, rest])


def test_what_was_never_computed_is_never_found_and_forgotten_with_its_row() -> None:
    pool = BlockPool(4, BLOCK)
    blocks = pool.take(2)
    pool.enter(as_bytes([1, 1, 2, 2]), root(""), blocks, False)
    waiting = pool.match(as_bytes([1, 1, 2, 2]), root(""), 2)
    assert (waiting.blocks, waiting.pending) == ([], True)
    pool.computed(blocks[:1])
    half = pool.match(as_bytes([1, 1, 2, 2]), root(""), 2)
    assert (half.blocks, half.pending) == (blocks[:1], True)
    pool.give(blocks)
    left = pool.match(as_bytes([1, 1, 2, 2]), root(""), 2)
    assert (left.blocks, left.pending) == (blocks[:1], False)
    assert (pool.cached, pool.available) == (1, 4)
    pool.check([])


def test_a_match_has_no_more_blocks_than_asked_for() -> None:
    pool = BlockPool(4, BLOCK)
    blocks = cached_chain(pool, [1, 1, 2, 2, 3, 3])
    for most in range(4):
        assert pool.match(as_bytes([1, 1, 2, 2, 3, 3]), root(""), most).blocks == blocks[:most]


def test_the_generation_grows_whenever_a_match_changes() -> None:
    pool = BlockPool(3, BLOCK)
    query = as_bytes([1, 1, 2, 2])

    def after(change: Any) -> None:
        before, generation = pool.match(query, root(""), 2), pool.generation
        change()
        assert pool.match(query, root(""), 2) != before
        assert pool.generation > generation

    blocks = pool.take(2)
    after(lambda: pool.enter(query, root(""), blocks, False))
    after(lambda: pool.computed(blocks[:1]))
    after(lambda: pool.computed(blocks[1:]))
    pool.give(blocks)
    after(lambda: pool.take(2))
