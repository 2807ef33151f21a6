"""A process with some simulated workers, which speak the real protocol:

    python -m tandem.bench.scheduler.workers SETTINGS

They compute nothing and their device's time is virtual (see timeline.py), so that several share one process. It asks
the system for the highest ordinary priority, because a GPU does not wait for a processor either. (Real-time priority is
no better: Linux lets ordinary processes go before it for up to 50 ms in a second.)
"""

from __future__ import annotations

import os
import secrets
import select
import sys
import time
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import zmq
from pydantic import TypeAdapter

from ...protocol.codec import decode, encode
from ...protocol.messages import (
    PROTOCOL_VERSION,
    Goodbye,
    Idle,
    Ping,
    StepPlan,
    StepResult,
    UnknownPeer,
    VersionRefused,
    WorkerHello,
    WorkerWelcome,
)
from ...protocol.transport import LINGER_MS, open_dealer
from .device import SimulatedDevice
from .harness import describe_model
from .loads import BLOCK_SIZE, FIRST_TOKEN, VOCAB
from .party import Orders
from .step_time import StepTime
from .timeline import Timeline

CONNECT_MS = 20_000
IDLE_S = 5.0
"""A worker that has had nothing to do for so long says so, and again after as long."""
MOST_LATE_S = 0.002
"""When this process wakes up later than so much after a step's end, its device's clock has stood still."""
HIGHEST_PRIORITY = -20
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Settings:
    endpoint: str
    first: int
    """Number of the first worker, for its name."""
    workers: int
    rows: int
    num_blocks: int
    max_num_batched_tokens: int
    max_model_len: int
    lookahead: int
    step_time: StepTime
    high_priority: bool


@dataclass(frozen=True, slots=True)
class Pending:
    """A step whose result is to be sent when it ends."""

    step: int
    end: float
    sampled: int
    busy_s: float
    waited_s: float


class Worker:
    """One connection, one device."""

    def __init__(self, settings: Settings, number: int, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._settings = settings
        self._name = f"simulated-{number}"
        self._step_time = settings.step_time
        self._device = SimulatedDevice(settings.rows)
        self._pending: deque[Pending] = deque()
        rng = np.random.default_rng(number)
        # Twice as many as a step can sample: each step takes a window of them.
        self._tokens = rng.integers(FIRST_TOKEN, VOCAB, 2 * settings.rows, np.int32)
        self._next_step = 0
        self._quiet_since = time.monotonic()
        self.timeline = Timeline(settings.lookahead)
        self.sampled = 0
        self.welcome: WorkerWelcome | None = None
        self.socket = open_dealer(context, settings.endpoint)
        self.fd = int(self.socket.get(zmq.FD))

    def hello(self) -> None:
        """Raises TimeoutError if nobody takes it."""
        settings = self._settings
        if not self.socket.poll(CONNECT_MS, zmq.POLLOUT):
            raise TimeoutError(f"no scheduler listens at {settings.endpoint}")
        hello = WorkerHello(
            version=PROTOCOL_VERSION,
            name=self._name,
            pid=os.getpid(),
            instance=secrets.randbits(62),
            model=describe_model(settings.max_model_len),
            num_blocks=settings.num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=settings.rows,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            lookahead=settings.lookahead,
            longest_step_s=self._step_time.seconds(settings.rows, 0, settings.max_num_batched_tokens),
        )
        self.socket.send(encode(hello))

    @property
    def due(self) -> float:
        """When the next result must go out."""
        return self._pending[0].end if self._pending else NEVER

    def receive(self, inbox: list[tuple[Worker, bytes, float]]) -> None:
        """Takes whatever has come, with the time."""
        while True:
            try:
                data = self.socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            inbox.append((self, data, time.monotonic()))

    def handle(self, data: bytes, at: float) -> None:
        message = decode(data, StepPlan, WorkerWelcome, Ping, Goodbye, UnknownPeer, VersionRefused)
        match message:
            case StepPlan():
                self._execute(message, at)
            case WorkerWelcome():
                self.welcome = message
            case Ping():
                return  # it was silent for long, and the scheduler only wants to know whether it can be sent
            case _:
                raise RuntimeError(f"{self._name}: the scheduler says {message!r}")

    def _execute(self, plan: StepPlan, at: float) -> None:
        done = self._device.execute(plan)
        seconds = self._step_time.seconds(done.decode_rows, done.context_tokens, done.prefill_tokens)
        end, waited = self.timeline.plan_arrived(plan.step, at, seconds, plan.after_idle)
        self._pending.append(Pending(plan.step, end, done.sampled, seconds, waited))
        self._next_step = plan.step + 1

    def send_results(self) -> None:
        """Of all steps that have ended by now."""
        late = time.monotonic() - self.due
        if late > MOST_LATE_S:
            self.timeline.stand_still(late)
            self._pending = deque(replace(step, end=step.end + late) for step in self._pending)
        welcome = self.welcome
        while welcome is not None and self._pending and self._pending[0].end <= time.monotonic():
            step = self._pending.popleft()
            first = step.step % self._settings.rows
            result = StepResult(
                epoch=welcome.epoch,
                registration=welcome.registration,
                step=step.step,
                token=self._tokens[first : first + step.sampled],
                busy_us=round(step.busy_s * 1e6),
                gap_us=round(step.waited_s * 1e6),
            )
            data = encode(result)
            self._quiet_since = at = time.monotonic()
            self.socket.send(data, zmq.DONTWAIT)
            self.timeline.result_sent(step.step, step.end, at)
            self.sampled += step.sampled

    def say_if_idle(self, now: float) -> None:
        if self.welcome is not None and not self._pending and now - self._quiet_since > IDLE_S:
            self._quiet_since = now
            idle = Idle(epoch=self.welcome.epoch, registration=self.welcome.registration, step=self._next_step)
            self.socket.send(encode(idle), zmq.DONTWAIT)

    def forget(self) -> None:
        self.timeline.forget()
        self.sampled = 0


class Workers:
    """All workers of this process, in one loop."""

    def __init__(self, settings: Settings, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._orders = Orders()
        numbers = range(settings.first, settings.first + settings.workers)
        self._workers = [Worker(settings, number, context) for number in numbers]
        self._by_fd = {worker.fd: worker for worker in self._workers}
        self._begun = time.monotonic()
        self._cpu_s = time.process_time()
        self._ready = False

    def run(self) -> None:
        """Until the benchmark says that it is over."""
        for worker in self._workers:
            worker.hello()
        stirred = list(self._workers)
        listen = [*self._by_fd, self._orders.fileno()]
        while True:
            self._take_in(stirred)
            now = time.monotonic()
            # ZeroMQ announces what arrives only once, and a send may swallow that: whoever sends looks again.
            stirred = [worker for worker in self._workers if worker.due <= now]
            for worker in stirred:
                worker.send_results()
            timeout = 0.0 if stirred else min(IDLE_S, min(worker.due for worker in self._workers) - now)
            readable, _, _ = select.select(listen, [], [], max(0.0, timeout))
            stirred += [self._by_fd[fd] for fd in readable if fd in self._by_fd and self._by_fd[fd] not in stirred]
            if self._orders.fileno() in readable and not self._obey():
                return
            for worker in self._workers:
                worker.say_if_idle(now)

    def _take_in(self, stirred: list[Worker]) -> None:
        inbox: list[tuple[Worker, bytes, float]] = []
        for worker in stirred:
            worker.receive(inbox)
        for worker, data, at in inbox:
            worker.handle(data, at)
        if not self._ready and all(worker.welcome is not None for worker in self._workers):
            self._ready = True
            self._orders.say("ready")

    def _obey(self) -> bool:
        """False if it is over."""
        for word in self._orders.read():
            if word == "begin":
                self._begun, self._cpu_s = time.monotonic(), time.process_time()
                for worker in self._workers:
                    worker.forget()
            elif word == "end":
                self._report()
                return False
        return True

    def _report(self) -> None:
        self._orders.say(
            "report",
            seconds=time.monotonic() - self._begun,
            cpu_s=time.process_time() - self._cpu_s,
            nice=os.getpriority(os.PRIO_PROCESS, 0),
            workers=[{"sampled": worker.sampled, **worker.timeline.report()} for worker in self._workers],
        )

    def close(self) -> None:
        goodbye = encode(Goodbye(reason="the benchmark is over"))
        for worker in self._workers:
            try:
                worker.socket.send(goodbye, zmq.DONTWAIT)
            except zmq.Again:
                pass  # nobody is there who would miss it
            worker.socket.close(LINGER_MS)


def _ask_for_priority() -> None:
    """For this process and the threads that it will start; where the system refuses, the report says so."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, HIGHEST_PRIORITY)
    except PermissionError:
        return


def main() -> None:
    settings = TypeAdapter(Settings).validate_json(sys.argv[1])
    if settings.high_priority:
        _ask_for_priority()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    workers = Workers(settings, context)
    try:
        workers.run()
    finally:
        workers.close()
        context.term()


if __name__ == "__main__":
    main()
