"""Ways in which queueing ahead broke elsewhere, one test each, and the scheduler's door."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from tandem.protocol.codec import encode
from tandem.protocol.messages import ModelDescription
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler import core, introductions, rows
from tandem.scheduler.core import Core
from tandem.scheduler.door import LAST_TICKET, is_ordinary
from tandem.scheduler.events import (
    Accept,
    Cancelled,
    Deliver,
    Event,
    Instruction,
    Reject,
    SendPlan,
    StepDone,
    Submitted,
    WorkerJoined,
    WorkerLimits,
)
from tandem.scheduler.policy import Policy

from support.simulated_worker import SimulatedWorker, continuation

VOCAB = 1_000
EOS = 3
CLIENT = 5


def submitted(ticket: int, prompt: list[int], **sampling: Any) -> Submitted:
    return Submitted(
        client=CLIENT,
        ticket=ticket,
        prompt=np.array(prompt, np.int32),
        generated=np.empty(0, np.int32),
        sampling=SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling}),
    )


@dataclass
class Bench:
    """One core and one simulated worker; results come only when asked for."""

    core: Core
    worker: SimulatedWorker
    received: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    refused: dict[int, Reject] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)

    def handle(self, *events: Event) -> None:
        for instruction in self.core.handle(events, 0.0):
            match instruction:
                case SendPlan():
                    self.worker.plans.append(instruction.plan)
                case Accept():
                    self.numbers[instruction.ticket] = instruction.number
                    self.received[instruction.ticket] = []
                    self.ended.pop(instruction.ticket, None)
                case Reject():
                    self.refused[instruction.ticket] = instruction
                case Deliver():
                    for ticket, offset, token in zip(
                        instruction.ticket.tolist(),
                        instruction.offset.tolist(),
                        instruction.token.tolist(),
                        strict=True,
                    ):
                        assert ticket not in self.ended
                        assert offset == len(self.received[ticket])
                        self.received[ticket].append(token)
                    self.ended |= {ended.ticket: ended.reason for _, ended in instruction.ended}
        self.core.check()

    def submit(self, ticket: int, prompt: list[int], **sampling: Any) -> None:
        self.handle(submitted(ticket, prompt, **sampling))

    def step(self) -> None:
        step, tokens = self.worker.compute()
        self.handle(StepDone(1, step, np.array(tokens, np.int32)))

    def run(self) -> None:
        while self.worker.plans:
            self.step()


def bench(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    slots: int = 8,
    max_tokens: int = 64,
    lookahead: int = 1,
    max_len: int = 64,
    max_waiting: int = 100,
    max_waiting_tokens: int = 10_000,
) -> Bench:
    policy = Policy(max_waiting_requests=max_waiting, max_waiting_tokens=max_waiting_tokens, watermark=0.0)
    worker = SimulatedWorker(num_blocks, block_size, slots, max_tokens, VOCAB)
    model = ModelDescription(
        name="m", architecture="a", dtype="d", vocab_size=VOCAB, max_model_len=max_len, eos_token_ids=(EOS,)
    )
    limits = WorkerLimits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=slots,
        max_num_batched_tokens=max_tokens,
        max_model_len=max_len,
        vocab_size=VOCAB,
        lookahead=lookahead,
    )
    made = Bench(Core(1, policy), worker)
    made.handle(WorkerJoined(1, model, limits))
    return made


def expected(prompt: list[int], count: int) -> list[int]:
    return continuation(prompt, len(prompt) + count, frozenset(), VOCAB)[0]


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
def test_a_request_that_ends_by_max_tokens_costs_no_wasted_row(lookahead: int) -> None:
    made = bench(lookahead=lookahead)
    for ticket, count in enumerate([1, 2, 3, 7]):
        made.submit(ticket, [10 + ticket], max_tokens=count)
    made.run()
    assert made.worker.sampled == 1 + 2 + 3 + 7
    assert made.ended == dict.fromkeys(range(4), "length")


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
def test_a_stop_token_wastes_at_most_lookahead_rows(lookahead: int) -> None:
    made = bench(lookahead=lookahead)
    prompt = [20, 21]
    stop = expected(prompt, 3)[-1]
    made.submit(1, prompt, stop_token_ids=(stop,), max_tokens=30)
    made.run()
    assert made.received[1] == expected(prompt, 3)
    assert made.ended == {1: "stop"}
    assert made.worker.sampled == 3 + lookahead


@pytest.mark.parametrize("others", [1, 60])
def test_a_stop_token_ends_only_the_rows_whose_it_is(others: int) -> None:
    """Tokens of a step are compared with everybody's stop tokens at once, in two ways: few of them, and many."""
    made = bench(slots=2)
    prompt = [20, 21]
    stop = expected(prompt, 3)[-1]
    elsewhere = tuple(token for token in range(100, 100 + others) if token not in expected(prompt, 9))
    made.submit(1, prompt, stop_token_ids=(stop, *elsewhere), max_tokens=9)
    made.submit(2, prompt, max_tokens=9)
    made.run()
    assert (made.received[1], made.received[2]) == (expected(prompt, 3), expected(prompt, 9))
    assert made.ended == {1: "stop", 2: "length"}


def test_the_short_way_in_takes_and_refuses_as_the_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submissions that are ordinary are looked at once; whatever is not goes the long way, among them and alone."""
    usual: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 5, "ignore_eos": False}
    wanted = [
        submitted(0, [20, 21, 22], **usual),
        submitted(0, [20], **usual),  # its ticket is in use
        submitted(1, [], **usual),
        submitted(2, [1] * 63, **usual),
        submitted(3, [1] * 64, **usual),
        submitted(4, [20, 21], **{**usual, "seed": None}),
        submitted(5, [20, 21], **{**usual, "max_tokens": None, "ignore_eos": True}),
        submitted(6, [20, 21], **usual, stop_token_ids=(expected([20, 21], 2)[-1],)),
        submitted(7, [20, 21], **usual, min_tokens=9),
        submitted(8, [20, 21], **usual, logprobs=2),
        replace(submitted(9, [30, 31], **usual), n=3),
        replace(submitted(12, [30, 31], **usual), sample=2),
        replace(submitted(13, [30, 31], **usual), generated=np.array([5], np.int32), resumed=True),
        replace(submitted(14, [30, 31], **usual), suspicions=1),
        replace(submitted(15, [30, 31], **usual), priority=-1, cache_salt="b", timeout_s=100.0),
        replace(submitted(16, [30, 31], **usual), client=6),
        submitted(LAST_TICKET, [20], **usual),
        submitted(17, [20, 22], **usual),
    ]
    batches = [wanted, [submitted(0, [VOCAB], **usual), *wanted], *([one] for one in wanted)]
    for max_waiting, max_waiting_tokens in ((100, 1_000_000), (4, 1_000_000), (100, 80)):
        for batch in batches:
            told = []
            for ordinary in (is_ordinary, lambda _: False):
                monkeypatch.setattr(core, "is_ordinary", ordinary)
                made = bench(slots=3, max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens)
                told.append(story(made.core.handle(batch, 1.0)))
                told[-1] += [
                    {name: getattr(one, name) for name in one.__slots__ if name not in {"known", "root"}}
                    for one in sorted(made.core._queue, key=lambda one: one.number)
                ]
                made.core.check()
            assert told[0] == told[1]


def story(instructions: list[Instruction]) -> list[Any]:
    """What they say, to be compared."""
    return [encode(one.plan) if isinstance(one, SendPlan) else repr(one) for one in instructions]


def test_stop_tokens_of_rows_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every token that one client has ever named would be looked at in all rows of all others."""
    monkeypatch.setattr(rows, "FALSE_ALARMS", 6)
    made = bench(slots=2)
    (replica,) = made.core._replicas.values()
    heeded = replica.rows._stop_tokens
    prompt = [20, 21]
    made.submit(1, [1], stop_token_ids=tuple(range(100)), max_tokens=1)
    for first in range(100, VOCAB, 100):
        made.submit(1 + first, [1], stop_token_ids=tuple(range(first, first + 100)), max_tokens=1)
    made.run()
    assert len(heeded) == VOCAB
    stop = expected(prompt, 30)[-1]
    made.submit(2, prompt, stop_token_ids=(stop,), max_tokens=40)
    made.submit(3, prompt, max_tokens=8)
    made.run()
    assert heeded == {stop}
    assert made.received[2] == expected(prompt, 1 + expected(prompt, 30).index(stop))
    assert made.ended[2] == "stop"
    assert made.received[3] == expected(prompt, 8)


def test_the_queue_is_as_deep_as_lookahead_while_there_is_work() -> None:
    made = bench(lookahead=2)
    made.submit(1, [1], max_tokens=20)
    for _ in range(10):
        assert len(made.worker.plans) == 3
        made.step()


def test_an_abort_with_steps_in_flight_frees_once() -> None:
    made = bench(lookahead=3)
    made.submit(1, [1, 2, 3], max_tokens=40)
    made.step()
    assert len(made.worker.plans) == 4
    made.handle(Cancelled(CLIENT, 1))
    assert made.ended == {1: "abort"}
    replica = made.core.replica(1)
    assert replica is not None
    assert replica.pool.available == 64
    made.handle(Cancelled(CLIENT, 1))
    made.run()
    assert replica.pool.available == 64
    assert made.received[1] == expected([1, 2, 3], 1)


def test_cancel_and_resubmission_of_the_same_ticket_with_steps_in_flight() -> None:
    made = bench(lookahead=3, slots=1)
    made.submit(1, [1, 2, 3], max_tokens=40)
    made.step()
    made.handle(Cancelled(CLIENT, 1))
    made.submit(1, [4, 5], max_tokens=5)  # takes the slot that steps in flight still use
    assert made.received[1] == []
    made.run()
    assert made.received[1] == expected([4, 5], 5)
    assert made.ended == {1: "length"}
    assert made.numbers[1] == 1  # a new number, not the first again


def test_an_open_ticket_cannot_be_used_twice() -> None:
    made = bench()
    made.submit(1, [1], max_tokens=9)
    made.submit(1, [2], max_tokens=9)
    assert made.refused[1].field == "ticket"
    made.run()
    assert made.received[1] == expected([1], 9)


def test_a_request_preempted_and_readmitted_to_its_slot_with_steps_in_flight() -> None:
    """Results of the first attempt belong to nobody, though slot and request are the same again."""
    made = bench(num_blocks=12, block_size=1, slots=2, lookahead=3, max_len=12)
    made.submit(0, [9], max_tokens=1)
    made.submit(1, [1, 2, 3, 4], max_tokens=8)
    made.step()
    made.submit(2, [5, 6, 7], max_tokens=8)  # gets slot 0, the lowest, again
    replica = made.core.replica(1)
    assert replica is not None
    while made.core.counters.preemptions == 0:
        made.step()
    assert made.core.waiting == 1
    made.handle(Cancelled(CLIENT, 1))  # its blocks let the preempted request back with the next plan
    made.step()
    owner = replica.rows.request[0]
    assert owner is not None
    assert (owner.ticket, owner.attempt) == (2, 1)
    assert len(made.worker.plans) > 1
    made.run()
    assert made.received[2] == expected([5, 6, 7], 8)
    assert made.ended == {0: "length", 1: "abort", 2: "length"}


def test_preemption_takes_the_newest_and_keeps_the_order_of_arrival() -> None:
    made = bench(num_blocks=10, block_size=2, slots=4, lookahead=1, max_len=20)
    for ticket in range(4):
        made.submit(ticket, [30 + ticket, 31, 32], max_tokens=12)
    finished: list[int] = []
    while made.worker.plans:
        made.step()
        finished += [ticket for ticket in made.ended if ticket not in finished]
    assert made.core.counters.preemptions > 0
    assert finished == [0, 1, 2, 3]
    for ticket in range(4):
        assert made.received[ticket] == expected([30 + ticket, 31, 32], 12)


def test_a_long_prompt_is_cut_to_the_budget_while_others_decode() -> None:
    made = bench(max_tokens=10, lookahead=1)
    made.submit(1, [1], max_tokens=30)
    made.step()
    made.submit(2, list(range(100, 150)), max_tokens=3)
    while 2 not in made.ended:
        before = len(made.received[1])
        made.step()
        assert len(made.received[1]) == before + 1  # the decoding row is in every step
    assert made.worker.largest_step == 10
    assert made.received[2] == expected(list(range(100, 150)), 3)


@pytest.mark.parametrize(("length", "taken"), [(0, False), (1, True), (62, True), (63, True), (64, False), (65, False)])
def test_prompt_lengths_at_the_border(length: int, taken: bool) -> None:
    made = bench(max_len=64)
    prompt = [7] * length
    made.submit(1, prompt, max_tokens=5)
    made.run()
    if taken:
        assert made.received[1] == expected(prompt, min(5, 64 - length))
        assert made.ended == {1: "length"}
    else:
        assert made.refused[1].code == "invalid"
        assert made.refused[1].field == "prompt"
        assert made.refused[1].limit
        assert made.refused[1].value == f"{length} tokens"


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_token_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    made = bench()
    made.submit(1, [1, token, 2], max_tokens=5)
    made.submit(2, [1], max_tokens=5, stop_token_ids=(VOCAB,))
    assert (made.refused[1].field, made.refused[1].value) == ("prompt", str(token))
    assert made.refused[2].field == "stop_token_ids"
    made.submit(4, [1], max_tokens=5, stop=("x",))
    assert made.refused[4].field == "stop"
    made.submit(3, [VOCAB - 1], max_tokens=1)
    made.run()
    assert made.ended == {3: "length"}


@pytest.mark.parametrize("bad", [[1, VOCAB], [-1], [], [5] * 64])
def test_of_submissions_that_come_together_only_the_bad_one_is_refused(bad: list[int]) -> None:
    made = bench()
    made.handle(submitted(1, [1], max_tokens=2), submitted(2, bad, max_tokens=2), submitted(3, [2], max_tokens=2))
    made.run()
    assert made.refused.keys() == {2}
    assert made.refused[2].field == "prompt"
    assert (made.received[1], made.received[3]) == (expected([1], 2), expected([2], 2))


def test_prompts_that_are_too_long_to_be_put_together_are_looked_at_one_by_one() -> None:
    made = bench(max_len=10_000, num_blocks=3_000, max_tokens=20_000, max_waiting_tokens=20_000)
    long = [1] * (core.SHORT + 1)
    made.handle(submitted(1, [1, 2], max_tokens=1), submitted(2, [2], max_tokens=1), submitted(3, [*long, VOCAB]))
    made.handle(submitted(4, [1, 2], max_tokens=1), submitted(5, [2], max_tokens=1), submitted(6, long, max_tokens=1))
    made.run()
    assert made.refused.keys() == {3}
    assert made.ended.keys() == {1, 2, 4, 5, 6}


def test_a_sampled_request_without_a_seed_is_refused() -> None:
    made = bench()
    made.submit(1, [1], temperature=1.0)
    assert made.refused[1].field == "seed"


def test_overload_is_answered_at_once_and_says_when_to_come_again() -> None:
    made = bench(slots=1)
    for ticket in range(103):
        made.submit(ticket, [1], max_tokens=3)
    assert sorted(made.refused) == [101, 102]
    assert all(reject.code == "overloaded" and reject.retry_after > 0 for reject in made.refused.values())
    made.run()
    assert len(made.ended) == 101


def test_a_plan_of_a_steady_step_is_small_and_does_not_grow_with_the_output() -> None:
    made = bench(num_blocks=4096, slots=256, max_tokens=512, max_len=256, block_size=16, max_waiting=256)
    for ticket in range(256):
        made.submit(ticket, [ticket], max_tokens=200)
    sizes = []
    for _ in range(150):
        made.step()
        if len(made.worker.rows) == 256:
            sizes.append(len(encode(made.worker.plans[-1])))
    assert max(sizes[10:]) < 4096
    assert sorted(sizes)[len(sizes) // 2] < 100


def test_a_plan_never_introduces_more_than_a_message_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share a cached prompt cost next to no blocks and nothing to compute, so all could join at once; but a
    plan names all tokens of each."""
    monkeypatch.setattr(introductions, "MAX_JOINING_BYTES", 500)
    prompt = list(range(40)) + [1, 2]
    made = bench(num_blocks=256, block_size=4, slots=64, max_tokens=128)
    made.submit(0, prompt, max_tokens=2)
    made.run()
    for ticket in range(1, 40):
        made.submit(ticket, prompt, max_tokens=2)
    joined = []
    while made.worker.plans:
        joined.append(made.worker.plans[0].join_token.nbytes)
        made.step()
    assert max(joined) < 500 + 4 * len(prompt)
    assert len([size for size in joined if size]) >= 10
    assert all(made.received[ticket] == expected(prompt, 2) for ticket in range(40))


def test_a_cancelled_request_leaves_no_block_that_a_step_in_flight_completes() -> None:
    """Its generated blocks can be found, but only where all their tokens are committed."""
    made = bench(block_size=4, lookahead=1, num_blocks=64)
    made.submit(0, [10, 11, 12], max_tokens=30)
    replica = made.core.replica(1)
    assert replica is not None
    while int(replica.rows.planned.max()) < 8:
        made.step()
    assert int(replica.rows.known.max()) == 7  # the step in flight samples the eighth token
    made.handle(Cancelled(CLIENT, 0))
    assert replica.pool.cached == 1  # the first block, and not the one that the step in flight would complete
    made.run()
    assert replica.pool.cached == 1
    made.submit(1, [10, 11, 12], max_tokens=9)
    made.run()
    assert made.received[1] == expected([10, 11, 12], 9)
