"""Who gets a place first: classes and their ageing, and how often a request that does not fit is passed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.protocol.messages import ModelDescription
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler import core as core_module
from tandem.scheduler.core import ADMISSION_WINDOW, MAX_PASSED, Core
from tandem.scheduler.events import Deliver, Event, SendPlan, StepDone, Submitted, WorkerJoined, WorkerLimits
from tandem.scheduler.policy import Policy
from tandem.scheduler.queue import WaitingQueue
from tandem.scheduler.requests import Request

from support.profiles import examples
from support.simulated_worker import SimulatedWorker

AGING_S = 30.0
VOCAB = 100
BLOCK = 4


# --- the queue alone -----------------------------------------------------------------------------------------------


def request(number: int, now: float, priority: int = 0, *, goes_first: bool = False) -> Request:
    return Request(
        number=number,
        client=1,
        ticket=number,
        known=np.array([1, 2, 3], np.int32),
        prompt_length=3,
        limit=10,
        sampling=SamplingParams(),
        stops=frozenset(),
        now=now,
        priority=priority,
        goes_first=goes_first,
    )


def drained(queue: WaitingQueue) -> list[int]:
    order = []
    while (head := queue.head()) is not None:
        order.append(head.number)
        assert queue.remove(head)
    assert (len(queue), queue.tokens) == (0, 0)
    return order


@pytest.mark.parametrize(
    ("priority", "later_s", "first"),
    [(1, 29.0, 2), (1, 31.0, 1), (1, 30.0, 1), (3, 89.0, 2), (3, 91.0, 1), (-1, 0.0, 1), (0, 0.0, 1)],
)
def test_a_class_is_worth_so_many_seconds_of_waiting(priority: int, later_s: float, first: int) -> None:
    """Request 1 has that priority, 2 comes later and is of class 0; of equals the one that was accepted first goes."""
    queue = WaitingQueue(AGING_S)
    queue.push(request(1, 100.0, priority))
    queue.push(request(2, 100.0 + later_s))
    assert drained(queue)[0] == first


def test_no_class_starves_under_a_stream_of_better_ones() -> None:
    """A request of class 2 waits while, each second, one of class -1 comes and one is served."""
    queue = WaitingQueue(AGING_S)
    queue.push(request(0, 0.0, 2))
    for second in range(1, 1_000):
        queue.push(request(second, float(second), -1))
        head = queue.head()
        assert head is not None
        queue.remove(head)
        if head.number == 0:
            assert second == 3 * AGING_S  # three classes lie between
            return
    pytest.fail("it starved")


def test_what_must_go_first_goes_before_every_class_and_in_its_own_order() -> None:
    queue = WaitingQueue(AGING_S)
    queue.push(request(1, 0.0, -1_000))
    queue.push(request(3, 9.0, 5, goes_first=True))
    queue.push(request(2, 9.0, 4, goes_first=True))
    assert drained(queue) == [2, 3, 1]


ARRIVALS = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, 29.0, 30.0, 31.0, 60.0]), st.integers(-2, 2), st.booleans(), st.booleans()),
    max_size=200,
)


@given(ARRIVALS, st.integers(0, 8))
@settings(max_examples=examples(100, 5_000))
def test_the_order_is_that_of_a_sorted_list_whatever_leaves_meanwhile(
    arrivals: list[tuple[float, int, bool, bool]], window: int
) -> None:
    queue = WaitingQueue(AGING_S)
    requests = [request(i, now, priority, goes_first=first) for i, (now, priority, first, _) in enumerate(arrivals)]
    for one in requests:
        queue.push(one)
    wanted = sorted(
        (one for one, (*_, leaves) in zip(requests, arrivals, strict=True) if not leaves),
        key=lambda one: (not one.goes_first, one.submitted_at + one.priority * AGING_S, one.number),
    )
    for one, (*_, leaves) in zip(requests, arrivals, strict=True):
        if leaves:
            assert queue.remove(one)
            assert not queue.remove(one)
    assert [one.number for one in queue.in_turn(window)] == [one.number for one in wanted[:window]]
    assert queue.tokens == 3 * len(wanted)
    assert drained(queue) == [one.number for one in wanted]


# --- places on a worker --------------------------------------------------------------------------------------------


@dataclass
class Service:
    """One core with one simulated worker that computes when asked."""

    core: Core
    worker: SimulatedWorker
    now: float = 0.0
    first: list[int] = field(default_factory=list)
    """Tickets in the order of their first tokens."""
    ended: list[int] = field(default_factory=list)

    def handle(self, *events: Event) -> None:
        for instruction in self.core.handle(events, self.now):
            match instruction:
                case SendPlan():
                    self.worker.plans.append(instruction.plan)
                case Deliver():
                    self.first += [ticket for ticket in instruction.ticket.tolist() if ticket not in self.first]
                    self.ended += [ended.ticket for _, ended in instruction.ended]
        self.core.check()

    def submit(self, ticket: int, prompt_tokens: int, *, max_tokens: int = 1, priority: int = 0) -> None:
        prompt = np.array([(ticket * 31 + i * 7) % VOCAB for i in range(prompt_tokens)], np.int32)
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
        none = np.empty(0, np.int32)
        self.handle(Submitted(5, ticket, prompt, none, sampling, priority=priority))

    def step(self) -> None:
        step, tokens = self.worker.compute()
        self.handle(StepDone(1, step, np.array(tokens, np.int32)))

    def run(self) -> None:
        while self.worker.plans:
            self.step()


def service(*, num_blocks: int, slots: int) -> Service:
    """One step at a time, and no prefix cache: what fits depends on what runs alone."""
    core = Core(1, Policy(watermark=0.0, enable_prefix_caching=False, priority_aging_s=AGING_S))
    made = Service(core, SimulatedWorker(num_blocks, BLOCK, slots, 64, VOCAB))
    model = ModelDescription(
        name="m", architecture="a", dtype="d", vocab_size=VOCAB, max_model_len=400, eos_token_ids=(3,)
    )
    limits = WorkerLimits(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_num_seqs=slots,
        max_num_batched_tokens=64,
        max_model_len=400,
        vocab_size=VOCAB,
        lookahead=0,
    )
    made.handle(WorkerJoined(1, model, limits))
    return made


def test_places_are_given_by_class_and_age() -> None:
    made = service(num_blocks=64, slots=1)
    made.submit(0, 4, max_tokens=3)
    for ticket, (at, priority) in enumerate([(1.0, 1), (2.0, 0), (30.5, 0), (31.5, 0), (32.0, -1)], start=1):
        made.now = at
        made.submit(ticket, 4, priority=priority)
    made.run()
    # Request 1 is of a lower class by 30 s, 5 of a better one: 2.0, 2.0 (later), 30.5, 31.0, 31.5.
    assert made.first == [0, 2, 5, 3, 1, 4]


LONG, HUGE = 10, 11
"""Tickets: one that keeps its blocks while the huge one waits."""


def crowded() -> Service:
    """16 blocks: a running request holds three of them, and the head of the queue wants 14."""
    made = service(num_blocks=16, slots=4)
    made.submit(LONG, 3 * BLOCK - 3, max_tokens=8)
    made.submit(HUGE, 14 * BLOCK - 1)
    assert made.core.waiting == 1
    return made


def test_small_requests_pass_one_that_does_not_fit() -> None:
    made = crowded()
    for ticket in range(100, 103):
        made.submit(ticket, 4)
    made.run()
    assert made.first[0] == LONG
    assert set(made.first[1:4]) == {100, 101, 102}
    assert made.first[-1] == HUGE
    assert len(made.ended) == 5


def test_only_so_many_behind_the_head_may_pass() -> None:
    """As many huge ones as the window has places hide the small one behind them."""
    made = crowded()
    for i in range(1, ADMISSION_WINDOW):
        made.submit(HUGE + i, 14 * BLOCK - 1)
    made.submit(100, 4)
    assert made.core.waiting == ADMISSION_WINDOW + 1
    made.run()
    assert made.first.index(100) > made.first.index(HUGE)
    assert len(made.ended) == ADMISSION_WINDOW + 2


@pytest.mark.parametrize("most", [3, MAX_PASSED])
def test_after_so_many_have_passed_it_everything_waits_for_it(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others never stop coming. Any one of them leaves no room for the huge one, and they do not end together."""
    monkeypatch.setattr(core_module, "MAX_PASSED", most)
    made = crowded()
    ticket = 100
    while HUGE not in made.first:
        while made.core.waiting < 4:
            made.submit(ticket, 3 * BLOCK - 3, max_tokens=2 + ticket % 3)
            ticket += 1
        made.step()
        assert ticket < 100 + most + 20, "it starves"
    before = made.first[: made.first.index(HUGE)]
    assert len(before) == 1 + most
    made.run()
    assert len(made.ended) == ticket - 100 + 2
