"""What becomes of requests when a worker ends, or is drained: a real service, and workers that a test plays."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tandem.protocol.messages import (
    Accepted,
    AskDrain,
    AskStats,
    Draining,
    Leave,
    Stats,
    StepPlan,
    Suspected,
    WorkerWelcome,
)
from tandem.protocol.process import open_process, started_at
from tandem.scheduler.leases import WorkerLeases

from support.peers import VOCAB, keyed_scene, scene
from support.simulated_worker import continuation

NEVER_S = 3600.0


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Some process of this user's."""
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as made:
        yield made
        made.kill()


def test_a_process_is_told_from_another_of_the_same_id(process: subprocess.Popen[bytes]) -> None:
    started = started_at(process.pid)
    assert started
    descriptor = open_process(process.pid, started)
    assert descriptor is not None
    os.close(descriptor)
    assert open_process(process.pid, started + 1) is None
    assert open_process(process.pid, 0) is None
    process.kill()
    process.wait()
    assert open_process(process.pid, started) is None


def test_a_local_worker_whose_process_ends_is_lost_at_once(process: subprocess.Popen[bytes]) -> None:
    """Its lease would last for an hour. Its request goes on elsewhere, and the client hears what it is suspected of."""

    async def script() -> None:
        async with scene(worker_lease=NEVER_S) as made:
            client = made.client()
            dying = made.worker(1, manual=True, pid=process.pid, started=started_at(process.pid))
            await dying.hello()
            await dying.expect(WorkerWelcome)
            await client.hello()
            await client.submit(1, [1, 2])
            await dying.expect(StepPlan)
            process.kill()
            suspected = await client.expect(Suspected)
            assert (suspected.ticket.tolist(), suspected.count.tolist()) == ([1], [1])
            await made.worker(2).hello()
            end = await client.wait(lambda: client.ended(1))
            assert end.attempts == 2
            assert client.tokens(1) == continuation([1, 2], 7, frozenset(), VOCAB)[0]

    asyncio.run(script())


def test_a_drained_worker_hands_its_request_over_and_is_let_go() -> None:
    async def script() -> None:
        async with scene(worker_lease=NEVER_S) as made:
            client, first = made.client(), made.worker(1, manual=True)
            await first.hello()
            await first.expect(WorkerWelcome)
            await client.hello()
            await client.submit(1, [4, 5], 6)
            await first.expect(StepPlan)
            await client.send(AskDrain(worker="worker-1"))
            told = await client.expect(Draining)
            assert (told.state, told.running) == ("draining", 1)
            await made.worker(2).hello()
            end = await client.wait(lambda: client.ended(1))
            assert end.attempts == 2
            while first.simulated.plans:
                first.compute()  # what was on its way: nobody's any more
            await first.expect(Leave)
            assert client.tokens(1) == continuation([4, 5], 8, frozenset(), VOCAB)[0]
            await client.send(AskDrain(worker="worker-1"))
            assert (await client.expect(Draining, 2)).state == "unknown"

    asyncio.run(script())


def test_what_comes_while_no_worker_is_there_waits_for_one(process: subprocess.Popen[bytes]) -> None:
    """It is accepted, since the model is known; its deadline goes on."""

    async def script() -> None:
        async with scene(worker_lease=NEVER_S) as made:
            client = made.client()
            only = made.worker(1, pid=process.pid, started=started_at(process.pid))
            await only.hello()
            await only.expect(WorkerWelcome)
            await client.hello()
            await client.submit(1, [1, 2])
            await client.wait(lambda: client.ended(1))
            process.kill()
            asked, workers = 0, 1
            while workers:
                asked += 1
                await client.send(AskStats())
                workers = len((await client.expect(Stats, asked)).workers)
            await client.submit(2, [3, 4])
            await client.submit(3, [5, 6], timeout_s=0.2)
            late = await client.wait(lambda: client.ended(3))
            assert (late.reason, late.completion_tokens) == ("timeout", 0)
            assert client.ended(2) is None
            await made.worker(2).hello()
            end = await client.wait(lambda: client.ended(2))
            assert (end.reason, end.attempts) == ("length", 1)
            assert client.tokens(2) == continuation([3, 4], 7, frozenset(), VOCAB)[0]

    asyncio.run(script())


def test_a_worker_whose_connection_has_ended_is_lost_before_its_lease() -> None:
    """Over TCP there is no process to watch, and nothing is due to be sent to a worker with all its steps in flight."""

    async def script() -> None:
        async with keyed_scene(worker_lease=NEVER_S) as made:
            client = made.client(made.peer_keys("clients"))
            dying = made.worker(1, manual=True, keys=made.peer_keys("workers"))
            await dying.hello()
            await dying.expect(WorkerWelcome)
            await client.hello()
            await client.submit(1, [1, 2], 6)
            await dying.expect(StepPlan, 2)  # as many as it takes
            dying.close()
            await client.expect(Suspected)
            await made.worker(2, keys=made.peer_keys("workers")).hello()
            assert (await client.wait(lambda: client.ended(1))).attempts == 2
            assert client.tokens(1) == continuation([1, 2], 8, frozenset(), VOCAB)[0]

    asyncio.run(script())


def test_a_step_that_was_interrupted_does_not_make_the_lease_endless() -> None:
    """A step of a few tokens that took half an hour says nothing of how long the next one may take: none takes longer
    than the largest that the worker tried."""

    async def script() -> None:
        async with scene(worker_lease=0.5) as made:
            client, worker = made.client(), made.worker(1, manual=True, longest_step_s=0.05)
            await worker.hello()
            await worker.expect(WorkerWelcome)
            await client.hello()
            await client.submit(1, [1, 2], 6)
            await worker.expect(StepPlan, 2)  # the prompt, and a token: as many as it takes
            await client.submit(2, list(range(4, 24)), 6)
            await client.expect(Accepted, 2)
            for i, busy_s in enumerate((2_000.0, 0.001)):
                step, tokens = worker.simulated.compute()
                await worker.send(replace(worker.result(step, tokens), busy_us=int(busy_s * 1e6)))
                await worker.expect(StepPlan, 3 + i)
            assert len(worker.simulated.plans[0].chunk_slot) == 1  # what is computed now is like the first
            await client.expect(Suspected)
            await made.worker(2).hello()
            await client.wait(lambda: client.ended(1) and client.ended(2))

    asyncio.run(script())


@pytest.mark.parametrize(
    ("longest", "expected", "lease"),
    [
        (0.0, 0.0, 10.0),
        (0.5, 0.0, 10.0),
        (0.5, 0.02, 10.2),
        (0.5, None, 15.0),
        (0.5, 2_000.0, 15.0),  # no step takes longer than the largest
        (20.0, 0.0, 40.0),  # never less than two of these
        (30.0, None, 120.0),
        (600.0, None, 120.0),
    ],
)
def test_leases(longest: float, expected: float | None, lease: float) -> None:
    leases = WorkerLeases(least_s=10.0, limit_s=120.0)
    assert leases.seconds(longest, expected) == pytest.approx(lease)
    assert leases.cut(longest) == (longest > 60)
    assert WorkerLeases(200.0, 120.0).seconds(longest, expected) == 200.0


def test_no_worker_hangs_longer_than_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    """What it measured on a starved machine would give it a hundred minutes."""

    async def script() -> None:
        async with scene(worker_lease=0.2, worker_lease_limit=0.5) as made:
            client, worker = made.client(), made.worker(1, manual=True, longest_step_s=600.0)
            await worker.hello()
            await worker.expect(WorkerWelcome)
            await client.hello()
            await client.send(AskStats())
            (before,) = (await client.expect(Stats)).workers
            assert before.lease_s == 0.5
            await client.submit(1, [1, 2], 6)
            await worker.expect(StepPlan, 2)  # and nothing comes of them
            await client.expect(Suspected)
            await made.worker(2).hello()
            assert (await client.wait(lambda: client.ended(1))).attempts == 2

    asyncio.run(script())
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("raise --worker-lease-limit" in message for message in told)
