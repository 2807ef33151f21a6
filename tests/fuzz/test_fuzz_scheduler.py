"""The scheduler's two ports, door and core, under sequences of messages from clients and workers of which some are
right, some nearly and some not at all. Nothing may raise, and the books balance after each.

A real service, whose sockets are replaced by ones that note what is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import strategies as st

from tandem.protocol.codec import decode, encode
from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    AskStats,
    Cancel,
    ClientHello,
    Goodbye,
    Idle,
    Ping,
    StepPlan,
    StepResult,
    WorkerHello,
    WorkerWelcome,
)
from tandem.protocol.transport import LOCAL, Sent
from tandem.scheduler.config import SchedulerConfig
from tandem.scheduler.service import Service

from support.fuzzing import SECONDS, damaged, fuzz, integers, values
from support.peers import EVERYTHING, MODEL, VOCAB
from support.simulated_worker import SimulatedWorker

CLIENTS, WORKERS = 3, 2


class Recorder:
    """Stands where a LoopSocket stood."""

    def __init__(self) -> None:
        self.sender = LOCAL
        self.sent: dict[bytes, deque[bytes]] = {}

    def send(self, frames: list[bytes]) -> Sent:
        self.sent.setdefault(frames[0], deque(maxlen=10_000)).append(frames[1])
        return Sent.QUEUED

    def wire(self) -> None:
        return None

    def close(self, linger_ms: int = 0) -> None:
        """Nothing is open."""


def ints(values: list[int]) -> bytes:
    return np.array(values, np.int64).astype(np.int32).tobytes()


tokens = st.lists(st.integers(-1, VOCAB), max_size=70).map(ints)
sampling = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 1.0]), "seed": st.integers(0, 5)},
    optional={
        "max_tokens": st.integers(0, 20),
        "min_tokens": st.integers(0, 9),
        "stop_token_ids": st.lists(st.integers(0, VOCAB), max_size=12),
        "top_k": integers,
        "top_p": st.sampled_from([0.5, 1.0, 1.5]),
        "ignore_eos": st.booleans(),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB).map(str), st.just(1.0), max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, VOCAB), max_size=3),
        "logprobs": st.integers(-1, 3),
        "prompt_logprobs": st.integers(0, 2),
    },
)
submissions = st.fixed_dictionaries(
    {"ticket": st.integers(0, 6), "prompt": tokens, "sampling": sampling},
    optional={
        "generated": tokens,
        "n": st.integers(0, 5),
        "sample": integers,
        "priority": st.integers(-2, 2),
        "timeout_s": st.sampled_from([0.0, 1e-6, 0.01, 5.0]),
        "cache_salt": st.sampled_from(["", "a"]),
        "suspicions": st.integers(0, 3),
    },
).map(lambda fields: msgpack.packb(["Submit", fields]))

right = st.fixed_dictionaries(
    {
        "ticket": st.integers(0, 6),
        "prompt": st.lists(st.integers(0, 3), min_size=1, max_size=40).map(ints),
        "sampling": st.fixed_dictionaries(
            {"temperature": st.just(0.0), "max_tokens": st.integers(1, 20)},
            optional={"ignore_eos": st.just(True), "stop_token_ids": st.lists(st.integers(0, 49), max_size=12)},
        ),
    },
    optional={
        "n": st.integers(1, 4),
        "priority": st.integers(-2, 2),
        "timeout_s": st.sampled_from([1e-6, 0.01, 5.0]),
        "cache_salt": st.sampled_from(["", "a"]),
        "suspicions": st.integers(0, 3),
    },
).map(lambda fields: msgpack.packb(["Submit", fields]))

HELLO = encode(ClientHello(version=PROTOCOL_VERSION))
RUNNING = msgpack.packb(
    [
        "Submit",
        {"ticket": 7, "prompt": ints([1, 2]), "sampling": {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}},
    ]
)
plain = st.one_of(
    st.builds(lambda ticket: encode(Cancel(ticket=ticket)), st.integers(0, 6)),
    st.sampled_from([HELLO, encode(Ping()), encode(AskStats()), encode(Goodbye())]),
)
anything = st.one_of(
    st.binary(max_size=40),
    st.tuples(st.sampled_from([cls.__name__ for cls in EVERYTHING]), values)
    .filter(lambda pair: _packs(pair))
    .map(msgpack.packb),
)
said = st.one_of(right, right, right, submissions, plain, submissions.flatmap(damaged), anything)
actions = st.one_of(
    st.tuples(st.just("client"), st.integers(0, CLIENTS - 1), said),
    st.tuples(st.just("work"), st.integers(0, WORKERS - 1), st.integers(1, 12)),
    st.tuples(st.just("work"), st.integers(0, WORKERS - 1), st.integers(1, 12)),
    st.tuples(st.just("lie"), st.integers(0, WORKERS - 1), st.integers(0, 7)),
    st.tuples(st.just("worker says"), st.integers(0, WORKERS - 1), st.one_of(anything, plain)),
)


def _packs(value: Any) -> bool:
    try:
        msgpack.packb(value)
    except OverflowError:
        return False
    return True


class Play:
    """One service, and what its peers know."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.clients, self.workers = Recorder(), Recorder()
        for port, recorder in ((service.clients, self.clients), (service.workers, self.workers)):
            assert port._socket is not None
            port._socket.close(0)
            port._socket = recorder  # type: ignore[assignment]
        self.lives = 0
        self.devices: dict[int, tuple[WorkerWelcome, SimulatedWorker] | None] = dict.fromkeys(range(WORKERS))

    def begin(self) -> None:
        """Every peer says hello, workers as new processes, and each client has a request that runs."""
        for worker in range(WORKERS):
            self.join(worker)
        for client in range(CLIENTS):
            self.hear_client(client, HELLO)
            self.hear_client(client, RUNNING)
        for worker in range(WORKERS):
            self.work(worker, 3)

    def end(self) -> None:
        """All go; nothing is left."""
        for client in range(CLIENTS):
            self.hear_client(client, encode(Goodbye()))
        core = self.service._core
        assert core.running == core.waiting == 0
        for worker in range(WORKERS):
            self.hear_worker(worker, encode(Goodbye()))
        self.clients.sent.clear()
        self.workers.sent.clear()

    def hear_client(self, client: int, data: bytes) -> None:
        self.service.clients.on_message([b"\0c%d" % client, data])
        self.settle()

    def hear_worker(self, worker: int, data: bytes) -> None:
        self.service.workers.on_message([b"\0w%d" % worker, data])
        self.settle()

    def settle(self) -> None:
        self.service._flush()
        self.service._core.check()
        for worker in range(WORKERS):
            for data in self.workers.sent.pop(b"\0w%d" % worker, ()):
                self.on_told(worker, decode(data, *EVERYTHING))

    def on_told(self, worker: int, message: Any) -> None:
        match message:
            case WorkerWelcome():
                self.devices[worker] = message, SimulatedWorker(64, 4, 8, 64, VOCAB)
            case StepPlan():
                device = self.devices[worker]
                if device is not None and message.registration == device[0].registration:
                    device[1].plans.append(message)
            case Goodbye():
                self.devices[worker] = None

    def join(self, worker: int) -> None:
        self.lives += 1
        hello = WorkerHello(
            version=PROTOCOL_VERSION, name=f"w{worker}", pid=1, instance=self.lives, model=MODEL, num_blocks=64,
            block_size=4, max_num_seqs=8, max_num_batched_tokens=64, lookahead=1,
        )  # fmt: skip
        self.hear_worker(worker, encode(Goodbye()))
        self.hear_worker(worker, encode(hello))

    def work(self, worker: int, steps: int) -> None:
        for _ in range(steps):
            result = self.result(worker)
            if result is None:
                return
            self.hear_worker(worker, encode(result))

    def result(self, worker: int) -> StepResult | None:
        device = self.devices[worker]
        if device is None:
            self.join(worker)
            return None
        welcome, simulated = device
        if not simulated.plans:
            return None
        step, sampled = simulated.compute()
        return StepResult(
            epoch=welcome.epoch, registration=welcome.registration, step=step, token=np.array(sampled, np.int32)
        )

    def lie(self, worker: int, kind: int) -> None:
        device = self.devices[worker]
        honest = self.result(worker)
        if device is None:
            return
        welcome = device[0]
        ids: dict[str, Any] = {"epoch": welcome.epoch, "registration": welcome.registration}
        lies: list[Any] = [
            StepResult(**ids, step=10**6, token=np.zeros(1, np.int32)),
            Idle(**ids, step=honest.step if honest else 0),
            Idle(**ids, step=2**62),
            StepResult(epoch=1, registration=welcome.registration, step=0),
            StepResult(epoch=welcome.epoch, registration=10**6, step=0),
        ]
        if honest is not None:
            lies += [
                StepResult(**ids, step=honest.step, token=np.full(len(honest.token), VOCAB, np.int32)),
                StepResult(**ids, step=honest.step, token=np.zeros(len(honest.token) + 1, np.int32)),
                StepResult(**ids, step=honest.step, token=honest.token, busy_us=2**31 - 1, gap_us=2**31 - 1),
            ]
        self.hear_worker(worker, encode(lies[kind % len(lies)]))
        if honest is not None:
            self.hear_worker(worker, encode(honest))


@contextlib.contextmanager
def play(loop: asyncio.AbstractEventLoop) -> Iterator[Play]:
    """A service whose loop runs only between examples."""
    folder = Path(tempfile.mkdtemp(prefix="fz-"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    async def made() -> Service:
        config = SchedulerConfig(
            address=f"ipc://{folder}/run",
            max_waiting_requests=40,
            max_requests_per_client=12,
            max_n=4,
            client_lease=3_600,
        )
        return Service(config, context)

    service = loop.run_until_complete(made())
    try:
        yield Play(service)
    finally:

        async def close() -> None:
            service.close()
            await asyncio.sleep(0)

        loop.run_until_complete(close())
        context.term()
        shutil.rmtree(folder)


@pytest.mark.timeout(int(900 + SECONDS))
def test_sequences_of_messages() -> None:
    failures: list[Any] = []
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        loop.set_exception_handler(lambda _, details: failures.append(details))
        with play(loop) as scene:

            def test(sequence: list[tuple[str, int, Any]]) -> None:
                scene.begin()
                for action, who, what in sequence:
                    if action == "client":
                        scene.hear_client(who, what)
                    elif action == "work":
                        scene.work(who, what)
                    elif action == "lie":
                        scene.lie(who, what)
                    else:
                        scene.hear_worker(who, what)
                scene.end()
                loop.run_until_complete(asyncio.sleep(0))
                assert failures == []

            fuzz(st.lists(actions, max_size=30), 400, test)
            # What is fuzzed is more than the door.
            assert scene.service._core.counters.generation_tokens > 100
