"""Drives a core, a client port and a simulated device through a load, and times each piece of each step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...protocol.codec import decode, encode
from ...protocol.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    FileChunk,
    Goodbye,
    Idle,
    StepPlan,
    StepResult,
    Submit,
    WorkerHello,
)
from ...protocol.sampling import SamplingParams
from ...scheduler.events import Accept, Deliver, Event, Instruction, Reject, SendPlan, StepDone, Trouble, WorkerJoined
from .device import SimulatedDevice
from .harness import EPOCH, DiscardingSocket, VirtualClock, build_client_port, build_core, describe_model
from .loads import FIRST_TOKEN, VOCAB, Load, Wanted
from .step_time import StepTime

CLIENTS = 64
WORKER = 1
LOOKAHEAD = 1
PIECES = ("intake", "decode", "handle", "encode", "deliver")
MOST_STEPS_TO_FILL = 5_000

Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Steps:
    """Columns with one entry a step."""

    pieces: dict[str, Column]
    """ns"""
    plan_bytes: Column
    rows: Column
    """Tokens that the step's result brought."""
    joined: Column
    chunk_tokens: Column
    client_messages: Column
    cached_share: float
    """Of the prompt tokens of requests that ended meanwhile."""

    @property
    def step(self) -> Column:
        """Plan + commit + encode, ns."""
        return self.pieces["handle"] + self.pieces["encode"]


class Driver:
    """A load on one worker. The device has always finished the oldest step when the scheduler looks."""

    def __init__(self, load: Load, max_model_len: int, clients: int, prefix_caching: bool) -> None:
        self._load = load
        limits = load.limits(max_model_len, LOOKAHEAD)
        self._clock = VirtualClock()
        self._core = build_core(prefix_caching)
        self._events: list[Event] = []
        self._port = build_client_port(self._core, self._events.append, self._clock)
        self._socket = DiscardingSocket()
        self._port.attach(self._socket)
        self._device = SimulatedDevice(limits.max_num_seqs)
        self._step_time = StepTime()
        self._rng = np.random.default_rng(1)
        self._plans: deque[StepPlan] = deque()
        self._submissions: list[list[bytes]] = []
        """Messages of clients that the next step finds."""
        self._next_ticket = 0
        self._prompt_tokens = self._cached_tokens = 0
        self._routes = [b"\0%03d" % client for client in range(clients)]
        for route in self._routes:
            self._port.on_message([route, encode(ClientHello(version=PROTOCOL_VERSION, name="bench"))])
        self._record: list[tuple[int, ...]] = []
        for wanted in load.first():
            self._submit(wanted, self._next_ticket % clients)
        self._core.handle([WorkerJoined(WORKER, describe_model(max_model_len), limits)], self._clock.now)

    def warm_up(self, steps: int) -> None:
        """Until hardly any request waits that the load does not want to wait, and `steps` more."""
        for _ in range(MOST_STEPS_TO_FILL):
            self._step()
            if self._core.waiting <= self._load.waiting + self._load.running // 50:
                break
        else:
            raise RuntimeError(f"{self._core.waiting} requests still wait after {MOST_STEPS_TO_FILL} steps")
        for _ in range(steps):
            self._step()

    def run(self, steps: int) -> Steps:
        """Measures `steps` steps."""
        self._record.clear()
        self._prompt_tokens = self._cached_tokens = 0
        for _ in range(steps):
            self._step()
        columns = np.array(self._record, np.int64).T
        return Steps(
            pieces=dict(zip(PIECES, columns, strict=False)),
            plan_bytes=columns[5],
            rows=columns[6],
            joined=columns[7],
            chunk_tokens=columns[8],
            client_messages=columns[9],
            cached_share=self._cached_tokens / max(1, self._prompt_tokens),
        )

    def _submit(self, wanted: Wanted, client: int) -> None:
        sampling = SamplingParams(temperature=0.8, seed=self._next_ticket, max_tokens=wanted.max_tokens)
        message = Submit(ticket=self._next_ticket, prompt=wanted.prompt, sampling=sampling)
        self._next_ticket += 1
        self._submissions.append([self._routes[client], encode(message)])

    def _result(self) -> tuple[bytes, int]:
        """The oldest plan's result as bytes, and how many tokens it has. The first step has no plan and no result."""
        if not self._plans:
            if self._record:
                raise RuntimeError("the core left the worker without a plan")
            return b"", 0
        plan = self._plans.popleft()
        done = self._device.execute(plan)
        seconds = self._step_time.seconds(done.decode_rows, done.context_tokens, done.prefill_tokens)
        self._clock.now += seconds
        token = self._rng.integers(FIRST_TOKEN, VOCAB, done.sampled, np.int32)
        result = StepResult(
            epoch=EPOCH, registration=WORKER, step=plan.step, token=token, busy_us=round(seconds * 1e6), gap_us=2
        )
        return encode(result), done.sampled

    def _step(self) -> None:
        result, sampled = self._result()
        submissions, self._submissions = self._submissions, []
        sent_before = self._socket.messages
        clock = time.perf_counter_ns
        t0 = clock()
        for frames in submissions:
            self._port.on_message(frames)
        t1 = clock()
        if result:
            message = decode(result, StepResult, Idle, WorkerHello, FileChunk, Goodbye)
            self._events.insert(0, StepDone(WORKER, message.step, message.token, message.busy_us))
        t2 = clock()
        instructions = self._core.handle(self._events, self._clock.now)
        t3 = clock()
        data = [encode(one.plan) for one in instructions if isinstance(one, SendPlan)]
        t4 = clock()
        self._tell_clients(instructions)
        t5 = clock()
        self._events.clear()
        plans = [one.plan for one in instructions if isinstance(one, SendPlan)]
        self._plans += plans
        joined = sum(len(plan.join_slot) for plan in plans)
        chunk_tokens = sum(int(plan.chunk_length.sum()) for plan in plans)
        sizes = (sum(map(len, data)), sampled, joined, chunk_tokens, self._socket.messages - sent_before)
        self._record.append((t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4, *sizes))
        self._replace_ended(instructions)

    def _tell_clients(self, instructions: Sequence[Instruction]) -> None:
        self._clock.run_due()
        for instruction in instructions:
            match instruction:
                case Deliver():
                    self._port.deliver(instruction)
                case Accept():
                    self._port.accept(instruction)
                case SendPlan():
                    continue
                case _:
                    raise RuntimeError(_complaint(instruction))

    def _replace_ended(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            for client, ended in instruction.ended if isinstance(instruction, Deliver) else ():
                self._prompt_tokens += ended.prompt_tokens
                self._cached_tokens += ended.cached_tokens
                self._submit(self._load.next(), client)


def _complaint(instruction: Instruction) -> str:
    if isinstance(instruction, Trouble):
        return f"the core reports trouble: {instruction.story}"
    if isinstance(instruction, Reject):
        return f"a request of the load was refused: {instruction.message}"
    return f"the load led to {instruction!r}"
