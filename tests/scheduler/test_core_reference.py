"""The core against random events of clients, and workers that come and go: each accepted request receives exactly what
a reference scheduler says that is too simple to be wrong, and ends once."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
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
    Event,
    Reject,
    SendPlan,
    StepDone,
    Submitted,
    Trouble,
    WorkerJoined,
    WorkerLimits,
    WorkerLost,
)
from tandem.scheduler.policy import Policy

from support.profiles import examples, most_s
from support.reference_scheduler import Key, ReferenceScheduler
from support.simulated_worker import SimulatedWorker

VOCAB = 11
EOS = 3
MAX_LEN = 40
TICK = 0.001
"""Seconds between two events, at least."""


COMMON = [1, 2, 4, 5, 6, 7, 8, 9] * 5
"""Many prompts begin like this."""


@dataclass
class Received:
    """What a client has of one request."""

    tokens: list[int]
    ended: str | None = None


class ReferenceMachine(RuleBasedStateMachine):
    """Up to three workers, four clients, tiny caches."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(7, Policy(max_waiting_requests=12, max_waiting_tokens=300, watermark=0.1))
        self.reference = ReferenceScheduler(VOCAB, MAX_LEN, EOS)
        self.workers: dict[int, SimulatedWorker] = {}
        self.received: dict[Key, Received] = {}
        self.spoken: list[list[int]] = []
        """Prompts and answers of requests that ended."""
        self.next_worker = 1
        self.next_ticket = 0
        self.now = 0.0

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
    def join(self, lookahead: int, block_size: int, spare: int, slots: int, max_tokens: int) -> None:
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
        self.handle(WorkerJoined(number, model, limits))

    @rule(
        client=st.integers(0, 3),
        kind=st.sampled_from(["one", "one", "samples", "resumption", "next turn"]),
        hurried=st.booleans(),
        dice=st.integers(0, 2**32 - 1),
    )
    def submit(self, client: int, kind: str, hurried: bool, dice: int) -> None:
        """A request, several samples of one, a resumption of one, or what follows in a conversation. The rest comes
        from one number: ten draws for each request would take longer than everything else."""
        rng = random.Random(dice)
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 5, 9, MAX_LEN)))]
        if kind == "next turn" and self.spoken:
            prompt = rng.choice(self.spoken) + prompt
        elif rng.random() < 0.5:
            prompt = COMMON[: rng.randrange(MAX_LEN)] + prompt
        n = rng.randint(2, 3) if kind == "samples" else 1
        seed = rng.randrange(4) if n > 1 or rng.random() < 0.5 else None
        event = Submitted(
            client=client,
            ticket=self.next_ticket,
            prompt=np.array(prompt[: MAX_LEN - 1], np.int32),
            generated=np.empty(0, np.int32),
            sampling=SamplingParams(
                temperature=0.0 if seed is None else 1.0,
                seed=seed,
                max_tokens=rng.choice((None, 1, 2, 3, 9, 30)),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice((0, 0, 0, 1, 2)))),
            ),
            n=n,
            sample=rng.randrange(3),
            priority=rng.randint(-1, 1),
            timeout_s=10 ** rng.uniform(-6, -1) if hurried else None,
            cache_salt=rng.choice(("", "", "a")),
        )
        self.next_ticket += n
        self.reference.submit(event, self.now + TICK)
        held: list[int] = []
        if kind == "resumption":
            tokens = self.reference.stories[client, event.ticket].tokens
            held = tokens[: rng.randint(0, len(tokens))]
            event = replace(event, generated=np.array(held, np.int32))
            self.reference.submit(event, self.now + TICK)
        for ticket in range(event.ticket, event.ticket + n):
            self.received[client, ticket] = Received(list(held))
        self.handle(event)

    @precondition(lambda self: self.received)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.received)))
        self.reference.cancel(key)
        self.handle(Cancelled(*key))

    @rule(client=st.integers(0, 3))
    def lose_client(self, client: int) -> None:
        """Nothing is delivered to it any more."""
        self.received = {key: one for key, one in self.received.items() if key[0] != client}
        self.reference.lose(client)
        self.handle(ClientLost(client))

    @rule(seconds=st.floats(0.0, 0.05))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.handle()

    @precondition(lambda self: any(worker.plans for worker in self.workers.values()))
    @rule(data=st.data(), together=st.integers(1, 3))
    def finish_steps(self, data: st.DataObject, together: int) -> None:
        """Results of several steps, of any workers, that the service hands over at once."""
        events: list[Event] = []
        for _ in range(together):
            busy = sorted(number for number, worker in self.workers.items() if worker.plans)
            if busy:
                number = data.draw(st.sampled_from(busy))
                step, tokens = self.workers[number].compute()
                events.append(StepDone(number, step, np.array(tokens, np.int32)))
        self.handle(*events)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def lose_worker(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.workers)))
        lost = self.workers.pop(number)
        self.handle(WorkerLost(number, died=False))
        if lost.plans:
            step, tokens = lost.compute()
            self.handle(StepDone(number, step, np.array(tokens, np.int32)))

    # --- what comes back -------------------------------------------------------------------------------------------

    def handle(self, *events: Event) -> list[Any]:
        self.now += TICK
        instructions = self.core.handle(events, self.now)
        for instruction in instructions:
            match instruction:
                case SendPlan():
                    if instruction.worker in self.workers:
                        self.workers[instruction.worker].plans.append(instruction.plan)
                case Deliver():
                    self.receive(instruction)
                case Reject():
                    assert instruction.code == "overloaded", instruction
                    del self.received[instruction.client, instruction.ticket]
                    self.reference.refused((instruction.client, instruction.ticket))
                case Accept():
                    assert (instruction.client, instruction.ticket) in self.received
                case Trouble():
                    raise AssertionError(instruction.story)
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
            received = self.received[client, ticket]
            assert received.ended is None, "a token after the end"
            assert offset == len(received.tokens), "a gap or a repeat"
            received.tokens.append(token)
        for client, ended in deliver.ended:
            received = self.received[client, ended.ticket]
            story = self.reference.stories[client, ended.ticket]
            assert received.ended is None, "ended twice"
            received.ended = ended.reason
            assert ended.completion_tokens == len(received.tokens)
            assert ended.prompt_tokens == len(story.prompt)
            # One known token is always computed; a resumption's is a generated one, so its whole prompt may be cached.
            known = len(story.prompt) + len(story.held)
            assert 0 <= ended.cached_tokens <= min(len(story.prompt), known - 1)
            assert 0.0 <= ended.queue_s <= ended.total_s
            self.spoken.append(story.prompt + received.tokens)

    @invariant()
    def books_balance(self) -> None:
        self.core.check()

    @invariant()
    def the_reference_agrees(self) -> None:
        for key, received in self.received.items():
            self.reference.agree(key, received.tokens, received.ended, self.now)
            assert received.ended != "error"

    @invariant()
    def lookahead_is_kept(self) -> None:
        for number, worker in self.workers.items():
            replica = self.core.replica(number)
            assert replica is not None
            assert len(worker.plans) == replica.in_flight <= replica.limits.lookahead + 1

    def teardown(self) -> None:
        """Whatever is open now ends, within as many steps as it can need."""
        if not self.workers:
            self.join(lookahead=1, block_size=4, spare=3, slots=4, max_tokens=16)
        for _ in range(5_000):
            busy = [number for number, worker in self.workers.items() if worker.plans]
            if not busy:
                break
            for number in busy:
                step, tokens = self.workers[number].compute()
                self.handle(StepDone(number, step, np.array(tokens, np.int32)))
                self.core.check()
        assert all(received.ended is not None for received in self.received.values()), "a request starved"
        self.the_reference_agrees()
        assert self.core.waiting == self.core.running == 0
        for number in self.workers:
            replica = self.core.replica(number)
            assert replica is not None
            assert replica.pool.available == replica.pool.total


EXAMPLES = examples(ci=500, nightly=20_000)
TestReferenceMachine = pytest.mark.timeout(most_s(EXAMPLES))(ReferenceMachine.TestCase)
TestReferenceMachine.settings = settings(max_examples=EXAMPLES, stateful_step_count=60)
