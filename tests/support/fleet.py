"""Several simulated workers of one core, in virtual time: each takes as long for a step as a model of it says."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tandem.bench.scheduler.device import SimulatedDevice
from tandem.bench.scheduler.harness import describe_model
from tandem.bench.scheduler.loads import FIRST_TOKEN
from tandem.bench.scheduler.step_time import StepTime
from tandem.protocol.messages import StepPlan
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler.core import Core
from tandem.scheduler.events import (
    Deliver,
    Event,
    Expel,
    IntColumn,
    Reject,
    SendPlan,
    StepDone,
    Submitted,
    Trouble,
    WorkerJoined,
    WorkerLimits,
)
from tandem.scheduler.policy import Policy

CLIENT = 5


@dataclass
class Worker:
    device: SimulatedDevice
    slowness: Callable[[], float]
    """By how much longer than its model says the next step takes."""
    plans: deque[StepPlan] = field(default_factory=deque)
    busy: bool = False
    got: int = 0
    """Requests that were placed here, each as often as it was."""


class Fleet:
    """Submissions and results reach the core in the order of their times."""

    def __init__(
        self,
        limits: WorkerLimits,
        slowness: list[Callable[[], float]],
        policy: Policy | None = None,
        step_time: StepTime | None = None,
    ) -> None:
        """One worker for each entry of `slowness`, numbered from 1."""
        self.core = Core(1, policy or Policy())
        self.now = 0.0
        self.first: dict[int, float] = {}
        """By ticket: when its first token came …"""
        self.ended: dict[int, float] = {}
        """… and its last."""
        self.on_end: Callable[[int], None] | None = None
        self._limits = limits
        self._step_time = step_time or StepTime()
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.workers: dict[int, Worker] = {}
        for one in slowness:
            self.join(one)

    def join(self, slowness: Callable[[], float]) -> None:
        number = len(self.workers) + 1
        self.workers[number] = Worker(SimulatedDevice(self._limits.max_num_seqs), slowness)
        self.handle(WorkerJoined(number, describe_model(self._limits.max_model_len), self._limits))

    def submit(self, at: float, ticket: int, prompt: IntColumn, output: int) -> None:
        """At that time, which must not have passed."""
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output)
        event = Submitted(CLIENT, ticket, prompt, np.empty(0, np.int32), sampling)
        self.at(at, lambda: self.handle(event))

    def at(self, time: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time, next(self._order), callback))

    def run(self, until: float = float("inf")) -> None:
        """Until nothing is due, or that time."""
        while self._due and self._due[0][0] <= until:
            self.now, _, callback = heapq.heappop(self._due)
            callback()

    @property
    def next_due(self) -> float:
        """When something happens next; there must be something."""
        return self._due[0][0]

    @property
    def running(self) -> list[int]:
        """Requests on each worker that has not been dismissed."""
        replicas = [self.core.replica(number) for number in self.workers]
        return [replica.rows.owned for replica in replicas if replica is not None]

    def handle(self, *events: Event) -> None:
        for instruction in self.core.handle(events, self.now):
            match instruction:
                case SendPlan():
                    worker = self.workers[instruction.worker]
                    worker.got += len(instruction.plan.join_slot)
                    worker.plans.append(instruction.plan)
                    if not worker.busy:
                        self._start(instruction.worker)
                case Deliver():
                    for ticket in instruction.ticket.tolist():
                        self.first.setdefault(ticket, self.now)
                    for _, ended in instruction.ended:
                        self.ended[ended.ticket] = self.now
                        if self.on_end is not None:
                            self.on_end(ended.ticket)
                case Expel() | Reject() | Trouble():
                    raise AssertionError(f"the core said {instruction!r}")

    def _start(self, number: int) -> None:
        """Begins the worker's oldest plan."""
        worker = self.workers[number]
        plan = worker.plans.popleft()
        worker.busy = True
        done = worker.device.execute(plan)
        seconds = self._step_time.seconds(done.decode_rows, done.context_tokens, done.prefill_tokens)
        seconds *= worker.slowness()
        token = np.full(done.sampled, FIRST_TOKEN, np.int32)

        def finish() -> None:
            worker.busy = False
            if worker.plans:
                self._start(number)
            self.handle(StepDone(number, plan.step, token, round(seconds * 1e6)))

        self.at(self.now + seconds, finish)
