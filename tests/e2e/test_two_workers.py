"""Two real workers of one service: load is shared evenly, and requests go where their prefix is cached."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest

from tandem import AsyncClient
from tandem.client.completion import CompletionStream
from tandem.protocol.messages import Stats

from support.observe import Observer, settled
from support.systems import embedded
from support.tiny_models import VOCAB, save_tiny

SLOTS = 16
BUDGET = 256
"""Tokens of a step: what a full worker's load counts against cached tokens."""
PREFIX = 256


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    options = {
        "model": str(folder),
        "device": "cpu",
        "threads": 1,
        "max_model_len": 1024,
        "max_num_seqs": SLOTS,
        "max_num_batched_tokens": BUDGET,
    }
    with embedded(options, data_parallel_size=2) as system:
        yield system.address


@pytest.fixture
def observer(address: str) -> Iterator[Observer]:
    with contextlib.closing(Observer(address)) as made:
        made.wait_until(idle)
        yield made


def idle(stats: Stats) -> bool:
    """Settled, and no step is in flight whose tokens are still to be counted: a cancelled request leaves some."""
    return settled(stats) and not any(worker.in_flight for worker in stats.workers)


def running(stats: Stats) -> dict[int, int]:
    return {worker.registration: worker.running for worker in stats.workers}


def sampled(before: Stats, after: Stats) -> dict[int, int]:
    """Tokens that each worker sampled between two readings."""
    earlier = {worker.registration: worker.tokens for worker in before.workers}
    return {worker.registration: worker.tokens - earlier[worker.registration] for worker in after.workers}


def prefix(which: int) -> list[int]:
    return [5 + (7 * which + 3 * i + i * i) % (VOCAB - 5) for i in range(PREFIX)]


def test_requests_that_arrive_together_are_shared_evenly(address: str, observer: Observer) -> None:
    """As many as one worker could take alone, whose prompts share nothing and are more than a step of both; three
    times, each after the time before."""
    tokens = 200
    rng = random.Random(0)

    async def run(client: AsyncClient) -> None:
        prompts = [[rng.randrange(5, VOCAB) for _ in range(40)] for _ in range(SLOTS)]
        await client.generate(prompts, temperature=0.0, max_tokens=tokens, ignore_eos=True)

    async def runs() -> None:
        async with AsyncClient(address) as client:
            for _ in range(3):
                before = observer.stats()
                await run(client)
                shares = sampled(before, observer.wait_until(idle))
                assert list(shares.values()) == [SLOTS // 2 * tokens] * 2

    asyncio.run(runs())


def test_a_prefix_stays_where_it_is_cached_until_that_worker_is_full(address: str, observer: Observer) -> None:
    async def begun(client: AsyncClient, which: int) -> CompletionStream:
        """A stream that has its first token, after a prompt that is nothing but the prefix and one token more."""
        stream = client.stream([*prefix(which), 6], temperature=0.0, max_tokens=700, ignore_eos=True)
        await anext(stream)
        return stream

    def ask(which: int, i: int) -> list[int]:
        return [*prefix(which), 7 + i, 9]

    async def run() -> None:
        async with AsyncClient(address) as client:
            # While the first one's worker has it to run, the other prefix goes to the idle worker.
            first = await begun(client, 0)
            home = next(worker for worker, rows in running(observer.stats()).items() if rows)
            second = await begun(client, 1)
            (other,) = [worker for worker, rows in running(observer.stats()).items() if worker != home and rows]
            await first.aclose()
            await second.aclose()
            at = observer.wait_until(idle)

            for i, which in enumerate([1, 0, 0, 1, 1, 1]):  # one at a time: both are idle, and only the prefix tells
                done = await client.generate(ask(which, i), temperature=0.0, max_tokens=2, ignore_eos=True)
                assert done.usage.cached_tokens == PREFIX
                then, at = at, observer.wait_until(idle)
                assert sampled(then, at) == {(home, other)[which]: 2, (other, home)[which]: 0}

            prompts = [ask(i % 2, 20 + i) for i in range(SLOTS)]  # at once, half a worker's rows of each
            answers = await client.generate(prompts, temperature=0.0, max_tokens=20, ignore_eos=True)
            assert {one.usage.cached_tokens for one in answers} == {PREFIX}
            then, at = at, observer.wait_until(idle)
            assert sampled(then, at) == {home: SLOTS // 2 * 20, other: SLOTS // 2 * 20}

            prompts = [ask(0, 40 + i) for i in range(2 * SLOTS)]  # twice what its worker has slots for
            await client.generate(prompts, temperature=0.0, max_tokens=100, ignore_eos=True)
            shares = sampled(at, observer.wait_until(idle))
            assert min(shares.values()) > 0
            assert sum(shares.values()) == 2 * SLOTS * 100

    asyncio.run(run())
