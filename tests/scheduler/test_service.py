"""The scheduler's service with peers that do exactly what a test says, over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgpack
import pytest
import uvloop

from tandem.launch.connect import answers
from tandem.protocol.codec import encode
from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    ClientHello,
    FetchFile,
    FileChunk,
    Goodbye,
    Idle,
    Ping,
    Refused,
    StepPlan,
    UnknownPeer,
    VersionRefused,
    Welcome,
    WorkerWelcome,
)
from tandem.protocol.transport import Address

from support.deadlines import DEADLINE_S
from support.peers import FILES, MODEL, VOCAB, Scene, ScriptedClient, ScriptedWorker, scene, until
from support.simulated_worker import continuation

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as _first:
    _first.run(asyncio.sleep(0))  # uvloop keeps a pipe from its first loop on, which is no test's to close


def expected(prompt: list[int], count: int) -> list[int]:
    return continuation(prompt, len(prompt) + count, frozenset(), VOCAB)[0]


def play(
    script: Callable[[Scene], Awaitable[None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    **options: Any,
) -> None:
    async def run() -> None:
        async with scene(**options) as made:
            await script(made)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def chunk_at(client: ScriptedClient, name: str, offset: int) -> FileChunk | None:
    chunks = (one for one in client.got if isinstance(one, FileChunk))
    return next((one for one in chunks if (one.name, one.offset) == (name, offset)), None)


async def served(made: Scene, client: ScriptedClient, ticket: int, prompt: list[int], count: int = 5) -> None:
    """A request that ends as it should."""
    await client.submit(ticket, prompt, count)
    await client.wait(lambda: client.ended(ticket))
    assert client.tokens(ticket) == expected(prompt, count)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_deadlines_are_kept_however_near_they_are(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A timer that is due at once, or that comes a little early, ends a request all the same."""

    errors: list[dict[str, Any]] = []

    async def script(made: Scene) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        client, worker = made.client(), made.worker()
        await worker.hello()
        await client.hello()
        await client.wait(lambda: any(isinstance(one, Welcome) and one.model is not None for one in client.got))
        for ticket in range(60):
            await client.submit(ticket, [1, 2], 10_000, timeout_s=1e-9 + ticket / 2e3)
        for ticket in range(60):
            await client.wait(partial(client.ended, ticket))
            end = client.ended(ticket)
            assert end is not None
            assert end.reason == "timeout"

    play(script, new_loop)
    assert not errors


def test_a_client_that_comes_first_is_told_when_there_is_a_model_and_gets_its_files() -> None:
    async def script(made: Scene) -> None:
        client, worker = made.client(), made.worker()
        await client.hello()
        assert (await client.expect(Welcome)).model is None
        await client.submit(1, [1, 2])
        assert (await client.expect(Refused)).code == "overloaded"
        await worker.hello()
        welcome = await client.expect(Welcome, 2)
        assert encode(welcome.model) == encode(MODEL)
        for info in welcome.files:
            data = b""
            while len(data) < info.size:
                await client.send(FetchFile(name=info.name, offset=len(data)))
                chunk = await client.wait(partial(chunk_at, client, info.name, len(data)))
                data += chunk.data
            assert hashlib.sha256(data).hexdigest() == info.sha256
            assert data == FILES[info.name]
        await served(made, client, 2, [4, 5, 6])

    play(script)


def test_two_workers_that_come_at_once_both_serve() -> None:
    async def script(made: Scene) -> None:
        workers = [made.worker(1, manual=True), made.worker(2, manual=True)]
        await asyncio.gather(*(worker.hello() for worker in workers))
        for worker in workers:
            await worker.expect(WorkerWelcome)
        client = made.client()
        await client.hello()
        await client.submit(1, [1, 2])
        await client.submit(2, [3, 4])
        for worker in workers:
            await worker.expect(StepPlan)

    play(script)


def test_a_worker_that_says_hello_twice_while_its_files_are_fetched_is_registered() -> None:
    async def script(made: Scene) -> None:
        worker = made.worker()
        worker.answers_files = False
        await worker.hello()
        await worker.expect(FetchFile)
        worker.answers_files = True
        await worker.hello()
        await worker.send(FileChunk(name="tokenizer.json", offset=0, data=FILES["tokenizer.json"][:7]))
        await worker.expect(WorkerWelcome)
        client = made.client()
        await client.hello()
        await client.expect(Welcome)
        await served(made, client, 1, [7])
        assert not [one for one in worker.got if isinstance(one, Goodbye)]

    play(script)


def test_files_come_from_another_worker_if_the_first_one_goes() -> None:
    async def script(made: Scene) -> None:
        first, second = made.worker(1), made.worker(2)
        first.answers_files = False
        await first.hello()
        await first.expect(FetchFile)
        await second.hello()
        await first.send(Goodbye(reason="enough"))
        await second.expect(WorkerWelcome)

    play(script)


def test_a_worker_whose_files_are_not_what_it_announced_is_refused() -> None:
    async def script(made: Scene) -> None:
        worker = made.worker()
        worker.answers_files = False
        await worker.hello()
        wanted = await worker.expect(FetchFile)
        await worker.send(FileChunk(name=wanted.name, offset=0, data=bytes(len(FILES[wanted.name]))))
        goodbye = await worker.expect(Goodbye)
        assert goodbye.final
        assert "announced" in goodbye.reason

    play(script)


@pytest.mark.parametrize(
    ("changes", "story"),
    [
        ({"model": replace(MODEL, dtype="other")}, "dtype"),
        ({"model": replace(MODEL, max_model_len=32)}, "max_model_len"),
        ({"num_blocks": 15}, "room for 60 tokens"),
        ({"num_blocks": 0}, "room for 0 tokens"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_num_batched_tokens": 7}, "max_num_batched_tokens"),
        ({"lookahead": 1_000_000}, "lookahead"),
        ({"max_num_seqs": 2**30, "max_num_batched_tokens": 2**30}, "max_num_seqs"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_and_the_others_serve_on(changes: dict[str, Any], story: str) -> None:
    async def script(made: Scene) -> None:
        good, bad = made.worker(1), made.worker(2, **changes)
        await good.hello()
        await good.expect(WorkerWelcome)
        await bad.hello()
        goodbye = await bad.expect(Goodbye)
        assert goodbye.final
        assert story in goodbye.reason
        client = made.client()
        await client.hello()
        await served(made, client, 1, [1, 2, 3])

    play(script)


def test_a_worker_that_connects_again_takes_its_requests_along() -> None:
    """ZeroMQ gives it a new identity; its instance tells who it is, and its requests do not wait for the lease."""

    async def script(made: Scene) -> None:
        before = made.worker(1, manual=True)
        await before.hello()
        client = made.client()
        await client.hello()
        await before.expect(WorkerWelcome)
        await client.submit(1, [1, 2], 6)
        await before.wait(lambda: len(before.simulated.plans) == 2)
        before.compute()
        await client.wait(lambda: client.tokens(1))
        before.close()
        after = made.worker(1)
        await after.hello()
        ended = await client.wait(lambda: client.ended(1))
        assert client.tokens(1) == expected([1, 2], 6)
        assert ended.attempts == 2

    play(script)


def test_a_worker_that_never_got_its_plan_must_register_anew() -> None:
    async def script(made: Scene) -> None:
        worker = made.worker(manual=True)
        await worker.hello()
        welcome = await worker.expect(WorkerWelcome)
        client = made.client()
        await client.hello()
        await client.submit(1, [1, 2])
        await worker.expect(StepPlan)
        idle = Idle(epoch=welcome.epoch, registration=welcome.registration, step=0)
        await worker.send(idle)
        question = await worker.expect(Ping)
        await worker.send(replace(idle, heard=question.number))  # as if the plan had been lost
        await worker.send(idle)
        await worker.expect(UnknownPeer)
        worker.manual = False
        await worker.hello()
        await client.wait(lambda: client.ended(1))
        assert client.tokens(1) == expected([1, 2], 5)

    play(script)


def test_what_a_worker_said_before_its_plan_came_does_not_cost_it_its_registration() -> None:
    """On a busy machine the scheduler may hear only after it has planned that the worker had nothing to do before."""

    async def script(made: Scene) -> None:
        worker = made.worker(manual=True)
        await worker.hello()
        welcome = await worker.expect(WorkerWelcome)
        client = made.client()
        await client.hello()
        await client.submit(1, [1, 2], 6)
        await worker.wait(lambda: len(worker.simulated.plans) == 2)
        idle = Idle(epoch=welcome.epoch, registration=welcome.registration, step=0)
        for count in range(1, 5):
            await worker.send(idle)
            assert (await worker.expect(Ping, count)).number == 1
        worker.compute()
        await client.wait(lambda: client.tokens(1))
        await worker.send(replace(idle, step=1, heard=1))  # the answer to a question about another step
        assert (await worker.expect(Ping, 5)).number == 2
        worker.manual = False
        while worker.simulated.plans:
            worker.compute()
        ended = await client.wait(lambda: client.ended(1))
        assert client.tokens(1) == expected([1, 2], 6)
        assert ended.attempts == 1
        assert not [one for one in worker.got if isinstance(one, UnknownPeer)]

    play(script)


@pytest.mark.parametrize("lie", ["stale", "too many", "vocabulary", "other epoch", "other registration"])
def test_a_lying_worker_changes_nothing(lie: str) -> None:
    async def script(made: Scene) -> None:
        liar, honest = made.worker(1, manual=True), made.worker(2)
        await liar.hello()
        await liar.expect(WorkerWelcome)
        client = made.client()
        await client.hello()
        await client.submit(1, [1, 2], 6)
        await liar.wait(lambda: liar.simulated.plans)
        step, tokens = liar.simulated.compute()
        honest_result = liar.result(step, tokens)
        await liar.send(
            {
                "stale": replace(honest_result, step=7),
                "too many": liar.result(step, [*tokens, 1]),
                "vocabulary": liar.result(step, [VOCAB] * len(tokens)),
                "other epoch": replace(honest_result, epoch=1),
                "other registration": replace(honest_result, registration=99),
            }[lie]
        )
        if lie.startswith("other"):
            await liar.send(honest_result)  # the forged one was dropped, and this one counts
            await client.wait(lambda: client.tokens(1))
            await liar.send(Goodbye(reason="tired"))
        else:
            assert (await liar.expect(Goodbye)).final
        await honest.hello()
        await client.wait(lambda: client.ended(1))
        assert client.tokens(1) == expected([1, 2], 6)

    play(script)


def test_plans_go_out_before_deliveries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand streams must not stand between a result and the next plan."""

    async def script(made: Scene) -> None:
        worker = made.worker(manual=True)
        await worker.hello()
        await worker.expect(WorkerWelcome)
        client = made.client()
        await client.hello()
        await client.expect(Welcome)
        await client.submit(1, [1], 8)
        await worker.wait(lambda: len(worker.simulated.plans) == 2)
        order: list[str] = []
        send_plan, deliver = made.service.workers.send_plan, made.service.clients.deliver

        def noting(name: str, act: Callable[[Any], None]) -> Callable[[Any], None]:
            def noted(instruction: Any) -> None:
                order.append(name)
                act(instruction)

            return noted

        monkeypatch.setattr(made.service.workers, "send_plan", noting("plan", send_plan))
        monkeypatch.setattr(made.service.clients, "deliver", noting("tokens", deliver))
        worker.compute()
        await client.wait(lambda: client.tokens(1))
        assert order == ["plan", "tokens"]

    play(script)


def test_cancelling_an_unknown_ticket_and_twice_is_no_error() -> None:
    async def script(made: Scene) -> None:
        worker, client = made.worker(manual=True), made.client()
        await worker.hello()
        await worker.expect(WorkerWelcome)
        await client.hello()
        await client.send(Cancel(ticket=9))
        await client.submit(1, [1, 2])
        await client.expect(Accepted)
        for _ in range(2):
            await client.send(Cancel(ticket=1))
        ended = await client.wait(lambda: client.ended(1))
        assert ended.reason == "abort"
        stats = await client.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.workers[0].free_blocks == stats.workers[0].num_blocks

    play(script)


def test_a_stranger_is_told_to_say_hello_and_another_version_is_refused_by_name() -> None:
    async def script(made: Scene) -> None:
        stranger = made.client()
        await stranger.submit(1, [1])
        await stranger.expect(UnknownPeer)
        await stranger.send(msgpack.packb(["ClientHello", {"version": 99, "from_the_future": 1}]))
        assert (await stranger.expect(VersionRefused)).version == PROTOCOL_VERSION
        worker = made.worker()
        await worker.send(msgpack.packb(["WorkerHello", {"version": 99}]))
        await worker.expect(VersionRefused)

    play(script)


GARBAGE = [
    b"",
    b"\xc1",
    b"\x90" * 1000,
    encode(ClientHello(version=PROTOCOL_VERSION, name="x" * 256))[:-3],
    msgpack.packb(["Submit", {"ticket": 1, "prompt": b"12345", "sampling": {}}]),
    msgpack.packb(["StepResult", {"epoch": 1, "registration": 1, "step": 1}]),
    msgpack.packb(["Submit", {"ticket": 1, "prompt": bytes(4), "sampling": {"temperature": "hot"}}]),
    msgpack.packb([[-1] * 60_000] * 20),
    msgpack.packb({"a": 1}),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_only_the_connection_that_sent_it(garbage: bytes) -> None:
    async def script(made: Scene) -> None:
        worker, good, bad = made.worker(), made.client(), made.client()
        await worker.hello()
        await worker.expect(WorkerWelcome)
        await good.hello()
        await bad.hello()
        await bad.expect(Welcome)
        await bad.send(garbage)
        await bad.expect(Goodbye)
        evil = made.worker(2)
        await evil.send(garbage)
        await evil.wait(lambda: [one for one in evil.got if isinstance(one, Goodbye | UnknownPeer)])
        await served(made, good, 1, [1, 2, 3])

    play(script)


def test_a_client_that_fetches_without_reading_is_cut_off() -> None:
    async def script(made: Scene) -> None:
        worker, greedy, good = made.worker(), made.client(), made.client()
        await worker.hello()
        await worker.expect(WorkerWelcome)
        await greedy.hello()
        await greedy.expect(Welcome)
        for _ in range(400):
            await greedy.send(FetchFile(name="tokenizer.json"))
        await greedy.expect(Goodbye)
        got = sum(len(one.data) for one in greedy.got if isinstance(one, FileChunk))
        assert got <= 4 * sum(map(len, FILES.values()))
        await good.hello()
        await served(made, good, 1, [1])

    play(script)


def test_a_client_that_goes_or_falls_silent_frees_its_requests() -> None:
    async def script(made: Scene) -> None:
        worker = made.worker(manual=True)
        await worker.hello()
        await worker.expect(WorkerWelcome)
        silent, leaving, observer = made.client(), made.client(), made.client()
        for client in (silent, leaving):
            await client.hello()
            await client.submit(1, [1, 2], 50)
            await client.expect(Accepted)
        await leaving.send(Goodbye(reason="done"))

        await observer.hello()
        async with asyncio.timeout(DEADLINE_S):
            while (await observer.stats()).running:  # asking renews its own lease
                pass

    play(script, client_lease=2.0)


def test_a_silent_worker_loses_its_requests_to_another() -> None:
    async def script(made: Scene) -> None:
        silent: ScriptedWorker = made.worker(1, manual=True)
        await silent.hello()
        await silent.expect(WorkerWelcome)
        client = made.client()
        await client.hello()
        await client.submit(1, [1, 2], 4)
        await silent.expect(StepPlan)
        async with asyncio.timeout(DEADLINE_S):
            while (await client.stats()).workers:
                pass
        await made.worker(2).hello()
        ended = await client.wait(lambda: client.ended(1))
        assert client.tokens(1) == expected([1, 2], 4)
        assert ended.attempts == 2

    play(script, worker_lease=0.5)


def test_clients_are_told_how_many_samples_a_request_may_have() -> None:
    async def script(made: Scene) -> None:
        client = made.client()
        await client.hello()
        assert (await client.expect(Welcome)).max_n == 5

    play(script, max_n=5)


def test_who_only_looks_if_anybody_listens_is_not_complained_of(caplog: pytest.LogCaptureFixture) -> None:
    """Every `tandem generate` and `tandem chat` does."""

    async def script(scene: Scene) -> None:
        assert answers(Address(scene.address))
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: "was closed at once" in caplog.text)

    with caplog.at_level(logging.DEBUG):
        play(script)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(("hard", "connections"), [(64, 16), (200, 50), (1_024, 448)])
def test_a_scheduler_may_have_as_many_connections_as_the_hard_limit_lets_it(hard: int, connections: int) -> None:
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (60, {hard}))
from tandem.scheduler.config import SchedulerConfig
from tandem.scheduler.connections import most_connections
from tandem.scheduler.main import run
assert run(SchedulerConfig(address="ipc:///dev/null/nowhere")) == 2
print(resource.getrlimit(resource.RLIMIT_NOFILE), most_connections())
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout == f"({hard}, {hard}) {connections}\n", done.stderr
