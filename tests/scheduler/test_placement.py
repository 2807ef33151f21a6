"""Which worker a request goes to: equal ones get equal shares, whatever ran before and however their steps fall."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.bench.scheduler.loads import FIRST_TOKEN, VOCAB
from tandem.scheduler.events import Cancelled, DrainWorker, IntColumn, WorkerLimits
from tandem.scheduler.policy import Policy

from support.fleet import CLIENT, Fleet
from support.profiles import examples

BUDGET = 512
SLOTS = 128
NO_CACHE = Policy(enable_prefix_caching=False)


def limits(budget: int = BUDGET, lookahead: int = 1) -> WorkerLimits:
    return WorkerLimits(
        num_blocks=SLOTS * 64,
        block_size=16,
        max_num_seqs=SLOTS,
        max_num_batched_tokens=budget,
        max_model_len=16_384,
        vocab_size=VOCAB,
        lookahead=lookahead,
    )


def even() -> float:
    return 1.0


def uneven(slowness: float, seed: int) -> Callable[[], float]:
    """Steps take up to a tenth longer than usual, at random, on a worker that is slower by a factor."""
    rng = random.Random(seed)
    return lambda: slowness * (1.0 + rng.random() / 10)


class Load:
    """Prompts that share nothing, and tickets in order."""

    def __init__(self, fleet: Fleet, seed: int = 0) -> None:
        self.fleet = fleet
        self.rng = np.random.default_rng(seed)
        self.tickets = itertools.count()

    def prompt(self, tokens: int) -> IntColumn:
        return self.rng.integers(FIRST_TOKEN, VOCAB, tokens, np.int32)

    def submit(self, prompt: int | IntColumn, output: int, after: float = 0.0) -> int:
        ticket = next(self.tickets)
        tokens = self.prompt(prompt) if isinstance(prompt, int) else prompt
        self.fleet.submit(self.fleet.now + after, ticket, tokens, output)
        return ticket

    def shares(self, requests: int, prompt: int, output: int, within_s: float) -> list[int]:
        """How many of so many equal requests, which arrive within that time and run to their end, each worker got."""
        before = [worker.got for worker in self.fleet.workers.values()]
        for i in range(requests):
            self.submit(prompt, output, within_s * i / requests)
        self.fleet.run()
        return [worker.got - earlier for worker, earlier in zip(self.fleet.workers.values(), before, strict=True)]


@given(
    workers=st.integers(2, 4),
    requests=st.integers(2, SLOTS),
    prompt=st.integers(1, 300),
    before=st.lists(st.tuples(st.integers(1, 2_000), st.integers(1, 60)), max_size=20),
    within_s=st.sampled_from([0.0, 0.001, 0.02]),
    slowness=st.lists(st.floats(1.0, 1.03), min_size=4, max_size=4),
    lookahead=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
@example(
    workers=2, requests=64, prompt=256, before=[(256, 8)] * 20, within_s=0.004, slowness=[1.0] * 4, lookahead=1, seed=0
)
@settings(max_examples=examples(40, 2_000), deadline=None)
def test_equal_requests_are_spread_evenly_over_equal_workers(
    workers: int,
    requests: int,
    prompt: int,
    before: list[tuple[int, int]],
    within_s: float,
    slowness: list[float],
    lookahead: int,
    seed: int,
) -> None:
    """Whatever requests ran before and wherever they ended; three times, each when the time before is over. Steps are
    of different lengths by chance, and some workers take a little longer for each."""
    requests = min(requests, 12 * BUDGET * workers // prompt)  # so that nobody falls PASSING_STEPS behind
    speeds = [uneven(slow, seed + i) for i, slow in enumerate(slowness[:workers])]
    fleet = Fleet(limits(lookahead=lookahead), speeds, NO_CACHE)
    load = Load(fleet, seed)
    for length, output in before:
        load.submit(length, output)
    fleet.run()
    for _ in range(3):
        shares = load.shares(requests, prompt, 80, within_s)
        assert sum(shares) == requests
        assert max(shares) - min(shares) <= 1
    fleet.core.check()


def test_not_all_that_waits_for_a_step_goes_to_the_worker_whose_step_ends_first() -> None:
    """There are prompts for a dozen steps of each worker. When one is done with a step, only it would take more, and as
    much goes to the other."""
    fleet = Fleet(limits(), [even, lambda: 1.02], NO_CACHE)
    load = Load(fleet)
    for _ in range(24 * 8):
        load.submit(BUDGET // 8, 1_000)
    fleet.run(until=0.0)
    while fleet.core.waiting:
        fleet.run(until=fleet.next_due)
        assert max(fleet.running) - min(fleet.running) <= 1
    assert fleet.running == [12 * 8, 12 * 8]


@pytest.mark.parametrize("slowness", [1.5, 2.0, 3.0])
def test_a_slower_worker_gets_less_for_as_long_as_the_load_lasts(slowness: float) -> None:
    """64 requests are open at any time, 1,000 in all. Both workers run as many at a time."""
    fleet = Fleet(limits(2_048), [uneven(1.0, 1), uneven(slowness, 2)], NO_CACHE)
    load = Load(fleet)

    def follow(ticket: int) -> None:
        if ticket + 64 < 1_000:
            load.submit(256, 64, 0.001)

    fleet.on_end = follow
    for _ in range(64):
        load.submit(256, 64)
    fleet.run()
    fast, slow = (worker.got for worker in fleet.workers.values())
    assert fast + slow == 1_000
    assert 0.85 * slowness < fast / slow < 1.15 * slowness


def test_a_worker_far_behind_with_prompts_gets_less_of_a_burst() -> None:
    """Of 100 requests at once with 400 prompt tokens each, which are 40 steps of prompts for each of equal workers."""
    fleet = Fleet(limits(), [even, lambda: 2.0], NO_CACHE)
    fast, slow = Load(fleet).shares(100, 400, 400, 0.0)
    assert fast > slow + 10


def test_short_prompts_keep_away_from_a_long_one() -> None:
    """Until it is computed to its end, whose last piece is no longer than others; afterwards rows alone count."""
    fleet = Fleet(limits(), [even, even], NO_CACHE)
    load = Load(fleet)
    load.submit(10 * BUDGET, 1_000)
    fleet.run(until=0.0)
    assert fleet.running == [1, 0]
    for _ in range(5):
        load.submit(10, 1_000)
    replica = fleet.core.replica(1)
    assert replica is not None
    while replica.long_prompts:
        fleet.run(until=fleet.next_due)
        fleet.core.check()
    assert fleet.running == [1, 5]
    for _ in range(4):
        load.submit(10, 1_000)
    fleet.run(until=fleet.now + 0.1)
    assert fleet.running == [5, 5]


def test_a_long_prompt_that_is_cancelled_keeps_nobody_away() -> None:
    fleet = Fleet(limits(), [even, even], NO_CACHE)
    load = Load(fleet)
    load.submit(10 * BUDGET, 1_000)
    fleet.run(until=0.0)
    fleet.handle(Cancelled(CLIENT, 0))
    fleet.core.check()
    for _ in range(6):
        load.submit(10, 1_000)
    fleet.run(until=0.1)
    assert fleet.running == [3, 3]


def test_rows_count_alike_only_where_about_as_many_blocks_are_in_use() -> None:
    """An eighth of one worker's blocks is held by one request. Short ones go to the other until they hold half as many
    of its slots, which is NEAR; then rows alone count."""
    fleet = Fleet(limits(16_384), [even, even], NO_CACHE)
    load = Load(fleet)
    load.submit(16_000, 300)
    fleet.run(until=0.5)  # its prompt is computed
    for _ in range(8):
        load.submit(64, 1_000)
    fleet.run(until=0.8)
    assert fleet.running == [1, 8]
    for _ in range(4):
        load.submit(64, 1_000)
    fleet.run(until=1.0)
    assert fleet.running == [5, 8]


def test_a_prefix_stays_where_it_is_cached_until_the_rows_there_weigh_more() -> None:
    """A slot weighs BUDGET / SLOTS tokens, so that 64 tokens of a prefix weigh as much as 16 rows."""
    fleet = Fleet(limits(), [even, even])
    load = Load(fleet)
    prefix = load.prompt(64)
    load.submit(np.concatenate([prefix, load.prompt(16)]), 1)
    fleet.run()
    for rows in range(1, 17):
        load.submit(np.concatenate([prefix, load.prompt(1)]), 1_000)
        fleet.run(until=fleet.now + 0.05)  # no prompt is left when the next one comes
        assert fleet.running == [rows, 0]
    for _ in range(4):
        load.submit(np.concatenate([prefix, load.prompt(1)]), 1_000)
        fleet.run(until=fleet.now + 0.05)
    assert fleet.running[1] >= 2


def test_who_joins_is_filled_up_first_and_who_drains_gets_none() -> None:
    fleet = Fleet(limits(), [even, even], NO_CACHE)
    load = Load(fleet)
    for _ in range(12):
        load.submit(64, 2_000)
    fleet.run(until=0.5)
    assert fleet.running == [6, 6]
    fleet.join(even)
    for _ in range(9):
        load.submit(64, 2_000)
    fleet.run(until=fleet.now + 0.5)
    assert fleet.running == [7, 7, 7]
    fleet.handle(DrainWorker(1))
    fleet.run(until=fleet.now + 1.0)
    assert fleet.running == [11, 10]
    for _ in range(5):
        load.submit(64, 2_000)
    fleet.run(until=fleet.now + 0.5)
    assert fleet.running == [13, 13]
