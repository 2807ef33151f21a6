"""The edges of the poison rule: what happens at the very moment at which a request that runs alone is cleared."""

from __future__ import annotations

import numpy as np
import pytest

from tandem.protocol.messages import CLEARING_TOKENS, ModelDescription
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler.core import Core
from tandem.scheduler.events import (
    Deliver,
    Event,
    SendPlan,
    StepDone,
    Submitted,
    Suspect,
    WorkerJoined,
    WorkerLimits,
    WorkerLost,
)
from tandem.scheduler.policy import Policy

from support.simulated_worker import SimulatedWorker, continuation

VOCAB = 50
MODEL = ModelDescription(name="m", architecture="a", dtype="d", vocab_size=VOCAB, max_model_len=64)
LIMITS = WorkerLimits(
    num_blocks=64,
    block_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=64,
    vocab_size=VOCAB,
    lookahead=1,
)
PROMPT = [7, 8]


class Ward:
    """One request, on one worker after the other."""

    def __init__(self, suspicions: int) -> None:
        self.core = Core(1, Policy(max_waiting_requests=9, max_waiting_tokens=999, watermark=0.0))
        self.got: list[int] = []
        self.ended = ""
        self.told: list[int] = []
        self.workers: dict[int, SimulatedWorker] = {}
        self.join(1)
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=50)
        nothing = np.empty(0, np.int32)
        prompt = np.array(PROMPT, np.int32)
        self.handle(Submitted(1, 1, prompt, nothing, sampling, resumed=True, suspicions=suspicions))

    def joined(self, worker: int, lived_on: int | None = None) -> WorkerJoined:
        self.workers[worker] = SimulatedWorker(64, 4, 8, 64, VOCAB)
        return WorkerJoined(worker, MODEL, LIMITS, lived_on)

    def join(self, worker: int) -> None:
        self.handle(self.joined(worker))

    def handle(self, *events: Event) -> None:
        for one in self.core.handle(events, 0.0):
            match one:
                case SendPlan():
                    self.workers[one.worker].plans.append(one.plan)
                case Suspect():
                    self.told += one.count.tolist()
                case Deliver():
                    self.got += one.token.tolist()
                    self.ended += "".join(end.reason for _, end in one.ended)
        self.core.check()

    def step(self, worker: int) -> StepDone:
        step, tokens = self.workers[worker].compute()
        return StepDone(worker, step, np.array(tokens, np.int32))

    def finish(self, worker: int) -> None:
        while self.workers[worker].plans:
            self.handle(self.step(worker))
        assert (self.ended, self.got) == ("length", continuation(PROMPT, 52, frozenset(), VOCAB)[0])


@pytest.mark.parametrize(("tokens", "fails"), [(CLEARING_TOKENS - 1, True), (CLEARING_TOKENS, False)])
def test_a_request_is_cleared_by_its_last_token_even_if_the_worker_dies_at_once(tokens: int, fails: bool) -> None:
    """Result and death come in the same turn of the loop."""
    ward = Ward(suspicions=2)
    for _ in range(tokens - 1):
        ward.handle(ward.step(1))
    ward.handle(ward.step(1), WorkerLost(1))
    assert len(ward.got) == tokens
    if fails:
        assert ward.ended == "error"
        return
    assert ward.told == [1], "suspected anew"
    ward.join(2)
    ward.finish(2)


def test_a_request_that_is_acquitted_is_not_failed_by_a_death_at_once() -> None:
    """The first of its three workers was not dead, as it says in the turn in which the third dies."""
    ward = Ward(suspicions=0)
    ward.handle(WorkerLost(1), ward.joined(2))
    ward.handle(WorkerLost(2), ward.joined(3))
    assert ward.told == [1, 2]
    ward.handle(ward.step(3))
    ward.handle(ward.joined(4, lived_on=1), WorkerLost(3))
    assert (ward.ended, ward.told) == ("", [1, 2, 1, 2])
    ward.finish(4)


def test_a_death_while_it_runs_alone_fails_it() -> None:
    ward = Ward(suspicions=0)
    ward.handle(WorkerLost(1), ward.joined(2))
    ward.handle(WorkerLost(2), ward.joined(3))
    ward.handle(WorkerLost(3))
    assert ward.ended == "error"
