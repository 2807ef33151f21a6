"""The scheduler keeps nothing of the requests that it has served: core and client port, without sockets, in virtual
time."""

from __future__ import annotations

import gc

import numpy as np

from tandem.bench.scheduler.device import SimulatedDevice
from tandem.bench.scheduler.harness import DiscardingSocket, VirtualClock, build_client_port, describe_model
from tandem.protocol.codec import encode
from tandem.protocol.messages import PROTOCOL_VERSION, Cancel, ClientHello, StepPlan, Submit
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler.core import Core
from tandem.scheduler.events import (
    Accept,
    Deliver,
    Event,
    Instruction,
    Reject,
    SendPlan,
    StepDone,
    WorkerJoined,
    WorkerLimits,
)
from tandem.scheduler.policy import Policy

VOCAB = 1_000
ROUTES = [b"\0%03d" % client for client in range(16)]
LIMITS = WorkerLimits(
    num_blocks=512,
    block_size=16,
    max_num_seqs=16,
    max_num_batched_tokens=512,
    max_model_len=256,
    vocab_size=VOCAB,
    lookahead=1,
)
FEW = 500
"""Objects by which a count may differ: what runs and waits at the moment."""


class Overloaded:
    """A small service that gets more than it can hold: requests that end, are refused, cancelled, or late; some have a
    salt."""

    def __init__(self) -> None:
        self.core = Core(1, Policy(max_waiting_requests=32))
        self.clock = VirtualClock()
        self.events: list[Event] = []
        self.port = build_client_port(self.core, self.events.append, self.clock)
        self.port.attach(DiscardingSocket())
        self.core.handle([WorkerJoined(1, describe_model(LIMITS.max_model_len), LIMITS)], 0.0)
        for route in ROUTES:
            self.port.on_message([route, encode(ClientHello(version=PROTOCOL_VERSION))])
        self.device = SimulatedDevice(LIMITS.max_num_seqs)
        self.plans: list[StepPlan] = []
        self.rng = np.random.default_rng(0)
        self.submitted = self.ended = self.refused = 0

    def submit(self) -> None:
        ticket, route = self.submitted, ROUTES[self.submitted % len(ROUTES)]
        self.submitted += 1
        message = Submit(
            ticket=ticket,
            prompt=self.rng.integers(16, VOCAB, int(self.rng.integers(8, 40)), np.int32),
            sampling=SamplingParams(seed=ticket, max_tokens=int(self.rng.integers(1, 12))),
            timeout_s=0.05 if ticket % 5 == 0 else 60.0 if ticket % 5 == 1 else None,
            cache_salt=f"tenant {ticket % 50}" if ticket % 3 == 0 else "",
        )
        self.port.on_message([route, encode(message)])
        if ticket % 11 == 0:
            self.port.on_message([route, encode(Cancel(ticket=ticket))])

    def step(self) -> None:
        self.clock.now += 0.01
        self.clock.run_due()
        for _ in range(int(self.rng.integers(9))):
            self.submit()
        if self.plans:
            plan = self.plans.pop(0)
            tokens = self.rng.integers(16, VOCAB, self.device.execute(plan).sampled, np.int32)
            self.events.insert(0, StepDone(1, plan.step, tokens, 1_000))
        for instruction in self.core.handle(self.events, self.clock.now):
            self.carry_out(instruction)
        self.events.clear()

    def carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case SendPlan():
                self.plans.append(instruction.plan)
            case Deliver():
                self.ended += len(instruction.ended)
                self.port.deliver(instruction)
            case Accept():
                self.port.accept(instruction)
            case Reject():
                self.refused += 1
                self.port.reject(instruction)
            case _:
                raise AssertionError(instruction)

    def objects_after(self, submissions: int) -> int:
        while self.submitted < submissions:
            self.step()
        self.core.check()
        self.core.counters.histograms()  # enters what is kept for the histograms, up to a thousand requests
        gc.collect()
        return len(gc.get_objects())


def test_nothing_is_kept_of_requests_that_were_served_refused_or_cancelled() -> None:
    service = Overloaded()
    before = service.objects_after(2_000)
    assert abs(service.objects_after(8_000) - before) < FEW
    assert service.ended > 3_000
    assert service.refused > 1_000
    assert set(service.core.counters.finished) == {"length", "abort", "timeout"}
