"""The core against random events: whatever comes in whatever order, every accepted request gets exactly its tokens,
once, whatever becomes of the workers; and of the requests that kill workers, none kills more than three.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.protocol.messages import ModelDescription
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler.core import Core
from tandem.scheduler.events import (
    Accept,
    Cancelled,
    ClientLost,
    Deliver,
    Dismiss,
    DrainWorker,
    Event,
    Expel,
    Reject,
    SendPlan,
    StepDone,
    Submitted,
    Suspect,
    WorkerJoined,
    WorkerLimits,
    WorkerLost,
)
from tandem.scheduler.policy import Policy

from support.profiles import examples, most_s
from support.simulated_worker import SimulatedWorker, continuation

VOCAB = 11
EOS = 3
MAX_LEN = 60
POISON = [10, 10, 10]
"""A worker that computes a request which begins so dies of it."""


@dataclass
class Expected:
    prompt: list[int]
    tokens: list[int]
    reason: str
    received: list[int] = field(default_factory=list)
    ended: str | None = None
    cancelled: bool = False
    may_fail: bool = False
    """A worker died while it ran this request and nothing else."""
    deaths: int = 0
    """Workers where it had its place that died in a step in which they computed it. One that it had just been moved
    away from may die of it as well."""

    @property
    def is_poison(self) -> bool:
        return self.prompt[:3] == POISON


class CoreMachine(RuleBasedStateMachine):
    """Up to three workers, four clients, tiny caches."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(7, Policy(max_waiting_requests=12, max_waiting_tokens=300, watermark=0.1))
        self.workers: dict[int, SimulatedWorker] = {}
        self.requests: dict[tuple[int, int], Expected] = {}
        self.next_worker = 1
        self.next_ticket = 0
        self.now = 0.0
        self.acquittals = 0
        """Workers that were taken for dead and came back."""

    # --- events ----------------------------------------------------------------------------------------------------

    @initialize(lookahead=st.integers(0, 3), block_size=st.sampled_from([1, 4, 8]), spare=st.integers(0, 12))
    def first_worker(self, lookahead: int, block_size: int, spare: int) -> None:
        self.join(lookahead, block_size, spare, slots=3, max_tokens=7)

    @precondition(lambda self: len(self.workers) < 3)
    @rule(
        lookahead=st.integers(0, 3),
        block_size=st.sampled_from([1, 4, 8]),
        spare=st.integers(0, 30),
        slots=st.integers(1, 6),
        max_tokens=st.integers(6, 50),
    )
    def join(
        self,
        lookahead: int,
        block_size: int,
        spare: int,
        slots: int,
        max_tokens: int,
        lived_on: int | None = None,
    ) -> None:
        number, self.next_worker = self.next_worker, self.next_worker + 1
        num_blocks = -(-MAX_LEN // block_size) + spare
        worker = SimulatedWorker(num_blocks, block_size, slots, max_tokens, VOCAB)
        self.workers[number] = worker
        model = ModelDescription(
            name="simulated",
            architecture="none",
            dtype="none",
            vocab_size=VOCAB,
            max_model_len=MAX_LEN,
            eos_token_ids=(EOS,),
        )
        limits = WorkerLimits(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=slots,
            max_num_batched_tokens=max_tokens,
            max_model_len=MAX_LEN,
            vocab_size=VOCAB,
            lookahead=lookahead,
        )
        self.handle(WorkerJoined(number, model, limits, lived_on))

    @rule(
        client=st.integers(0, 3),
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_LEN - 1),
        max_tokens=st.one_of(st.none(), st.integers(1, 30)),
        ignore_eos=st.booleans(),
        stops=st.sets(st.integers(0, VOCAB - 1), max_size=2),
        resume=st.integers(0, 5),
        suspicions=st.sampled_from([0, 0, 0, 1, 2]),
        poison=st.sampled_from([False, False, False, False, True]),
    )
    def submit(
        self,
        client: int,
        prompt: list[int],
        max_tokens: int | None,
        ignore_eos: bool,
        stops: set[int],
        resume: int,
        suspicions: int,
        poison: bool,
    ) -> None:
        if poison:
            prompt = [*POISON, *prompt[3:]]
        elif prompt[:3] == POISON:
            prompt = [0, *prompt]
            prompt = prompt[: MAX_LEN - 1]
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        limit = min(MAX_LEN, len(prompt) + (max_tokens or MAX_LEN))
        ending = frozenset(stops if ignore_eos else stops | {EOS})
        tokens, reason = continuation(prompt, limit, ending, VOCAB)
        held = [] if poison else tokens[:resume]
        expected = Expected(prompt, tokens, reason, received=list(held))
        self.requests[client, ticket] = expected
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=tuple(sorted(stops))
        )
        event = Submitted(
            client=client,
            ticket=ticket,
            prompt=np.array(prompt, np.int32),
            generated=np.array(held, np.int32),
            sampling=sampling,
            suspicions=suspicions,
        )
        self.handle(event)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        client, ticket = data.draw(st.sampled_from(sorted(self.requests)))
        self.requests[client, ticket].cancelled = True
        self.handle(Cancelled(client, ticket))

    @rule(client=st.integers(0, 3))
    def lose_client(self, client: int) -> None:
        """Nothing is delivered to it any more."""
        self.requests = {key: expected for key, expected in self.requests.items() if key[0] != client}
        self.handle(ClientLost(client))

    @precondition(lambda self: any(worker.plans for worker in self.workers.values()))
    @rule(data=st.data(), together=st.integers(1, 3))
    def finish_steps(self, data: st.DataObject, together: int) -> None:
        """Results of several steps, of any workers, that the service hands over at once."""
        events: list[Event] = []
        for _ in range(together):
            busy = sorted(number for number, worker in self.workers.items() if worker.plans)
            if busy:
                event = self.compute(data.draw(st.sampled_from(busy)))
                events.append(event)
                if isinstance(event, WorkerLost):
                    break
        self.handle(*events)

    def compute(self, number: int) -> StepDone | WorkerLost:
        """The worker's next result, or its death of what it computes."""
        worker = self.workers[number]
        step, tokens = worker.compute()
        killers = [known for known in worker.touched if known[:3] == POISON]
        if not killers:
            return StepDone(number, step, np.array(tokens, np.int32))
        replica = self.core.replica(number)
        assert replica is not None
        placed = {(request.client, request.ticket) for request in replica.rows.request if request is not None}
        for key, expected in self.requests.items():
            expected.deaths += key in placed and [*expected.prompt, *expected.received] in killers
        self.die(number)
        return WorkerLost(number)

    def die(self, number: int) -> None:
        del self.workers[number]
        replica = self.core.replica(number)
        assert replica is not None
        if replica.alone is not None and (replica.alone.client, replica.alone.ticket) in self.requests:
            self.requests[replica.alone.client, replica.alone.ticket].may_fail = True

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), died=st.booleans(), returns=st.booleans(), lookahead=st.integers(0, 3))
    def lose_worker(self, data: st.DataObject, died: bool, returns: bool, lookahead: int) -> None:
        """For good, or it comes back and turns out to have been alive. What it sends late changes nothing."""
        number = data.draw(st.sampled_from(sorted(self.workers)))
        lost = self.workers[number]
        if died:
            self.die(number)
        else:
            del self.workers[number]
        self.handle(WorkerLost(number, died))
        if lost.plans:
            step, tokens = lost.compute()
            self.handle(StepDone(number, step, np.array(tokens, np.int32)))
        if returns and len(self.workers) < 3:
            self.acquittals += died
            self.join(lookahead, lost.block_size, 3, lost.slots, lost.max_tokens, lived_on=number if died else None)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        """It moves its requests to others, if there are any, and is dismissed when it has none."""
        self.handle(DrainWorker(data.draw(st.sampled_from(sorted(self.workers)))))

    @precondition(lambda self: len(self.workers) > 1)
    @rule(data=st.data(), lie=st.sampled_from(["stale", "short", "vocabulary"]))
    def lying_worker(self, data: st.DataObject, lie: str) -> None:
        """A result that is not due or does not fit: the worker is expelled, its requests go on elsewhere."""
        number = data.draw(st.sampled_from(sorted(self.workers)))
        worker = self.workers[number]
        if not worker.plans:
            event = StepDone(number, 10**6, np.zeros(1, np.int32))
        else:
            step, tokens = worker.compute()
            tokens = {"stale": tokens, "short": [*tokens, 0], "vocabulary": [VOCAB] * max(1, len(tokens))}[lie]
            event = StepDone(number, step + (lie == "stale"), np.array(tokens, np.int32))
        self.die(number)
        expelled = [one for one in self.handle(event) if isinstance(one, Expel)]
        assert [one.worker for one in expelled] == [number]

    # --- what comes back -------------------------------------------------------------------------------------------

    def handle(self, *events: Event) -> list[Any]:
        self.now += 0.001
        instructions = self.core.handle(events, self.now)
        for instruction in instructions:
            match instruction:
                case SendPlan():
                    if instruction.worker in self.workers:
                        self.workers[instruction.worker].plans.append(instruction.plan)
                case Deliver():
                    self.receive(instruction)
                case Reject():
                    expected = self.requests.pop((instruction.client, instruction.ticket))
                    assert instruction.code == "overloaded", instruction
                    assert not expected.cancelled
                case Dismiss():
                    gone = self.workers.pop(instruction.worker)
                    assert not gone.plans
                    assert self.core.replica(instruction.worker) is None
                case Suspect():
                    assert len(instruction.ticket) == len(instruction.count) > 0
                    assert all(0 <= count <= 2 for count in instruction.count.tolist())
                case Accept():
                    assert (instruction.client, instruction.ticket) in self.requests
        return instructions

    def receive(self, deliver: Deliver) -> None:
        rows = zip(
            deliver.client.tolist(),
            deliver.ticket.tolist(),
            deliver.offset.tolist(),
            deliver.token.tolist(),
            strict=True,
        )
        for client, ticket, offset, token in rows:
            expected = self.requests[client, ticket]
            assert expected.ended is None, "a token after the end"
            assert offset == len(expected.received), "a gap or a repeat"
            expected.received.append(token)
        for client, ended in deliver.ended:
            expected = self.requests[client, ended.ticket]
            assert expected.ended is None, "ended twice"
            expected.ended = ended.reason
            assert ended.completion_tokens == len(expected.received)
            assert ended.prompt_tokens == len(expected.prompt)
            assert 0.0 <= ended.queue_s <= ended.total_s

    @invariant()
    def books_balance(self) -> None:
        self.core.check()

    @invariant()
    def received_is_a_prefix(self) -> None:
        for expected in self.requests.values():
            assert expected.received == expected.tokens[: len(expected.received)]
            if expected.ended in ("stop", "length"):
                assert (expected.received, expected.ended) == (expected.tokens, expected.reason)
            elif expected.ended == "error":
                assert expected.may_fail
            elif expected.ended is not None:
                assert expected.ended == "abort"
                assert expected.cancelled

    @invariant()
    def poison_is_found_out(self) -> None:
        for expected in self.requests.values():
            assert expected.deaths <= 3 + self.acquittals
            assert not (expected.is_poison and expected.received)

    @invariant()
    def lookahead_is_kept(self) -> None:
        for number, worker in self.workers.items():
            replica = self.core.replica(number)
            assert replica is not None
            assert len(worker.plans) == replica.in_flight <= replica.limits.lookahead + 1

    def teardown(self) -> None:
        """Whatever is open now ends, within as many steps as it can need; workers that die of it are replaced."""
        for _ in range(20_000):
            if not any(self.serves(number) for number in self.workers):
                self.join(lookahead=1, block_size=4, spare=3, slots=4, max_tokens=16)
            busy = [number for number, worker in self.workers.items() if worker.plans]
            if not busy:
                break
            for number in busy:
                if number in self.workers:  # else it was dismissed meanwhile
                    self.handle(self.compute(number))
                    self.core.check()
        assert all(expected.ended is not None for expected in self.requests.values())
        self.received_is_a_prefix()
        assert self.core.waiting == self.core.running == 0
        for number in self.workers:
            replica = self.core.replica(number)
            assert replica is not None
            assert replica.pool.available == replica.pool.total

    def serves(self, number: int) -> bool:
        replica = self.core.replica(number)
        return replica is not None and not replica.draining


EXAMPLES = examples(ci=100, nightly=20_000)
TestCoreMachine = pytest.mark.timeout(most_s(EXAMPLES))(CoreMachine.TestCase)
TestCoreMachine.settings = settings(max_examples=EXAMPLES, stateful_step_count=60)
