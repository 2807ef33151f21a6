"""Grammars at the scheduler's door: who waits for a verdict, who is asked, whose turn it is, what a verdict does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.protocol.messages import ModelDescription
from tandem.protocol.sampling import SamplingParams
from tandem.protocol.structured import StructuredOutputsParams
from tandem.scheduler.core import Core
from tandem.scheduler.events import (
    Accept,
    Cancelled,
    Checked,
    ClientLost,
    Deliver,
    Instruction,
    Reject,
    SendCheck,
    SendPlan,
    StepDone,
    Submitted,
    WorkerJoined,
    WorkerLimits,
    WorkerLost,
)
from tandem.scheduler.grammars import MAX_CHECKS, MAX_CHECKS_PER_CLIENT, OUTSTANDING, REFUSED_FOR_S
from tandem.scheduler.policy import Policy

MODEL = ModelDescription(
    name="m", architecture="none", dtype="none", vocab_size=50, max_model_len=64, eos_token_ids=(3,)
)
LIMITS = WorkerLimits(
    num_blocks=64,
    block_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=64,
    vocab_size=50,
    lookahead=1,
)


def grammar(name: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=name)


def submitted(client: int, ticket: int, name: str, **changes: Any) -> Submitted:
    sampling = SamplingParams(temperature=0.0, max_tokens=4, structured_outputs=grammar(name))
    empty = np.empty(0, np.int32)
    event = Submitted(
        client=client, ticket=ticket, prompt=np.array([5, 6], np.int32), generated=empty, sampling=sampling
    )
    return replace(event, **changes)


def of(kind: type, out: list[Instruction]) -> list[Any]:
    return [one for one in out if isinstance(one, kind)]


class Rig:
    def __init__(self, workers: int = 1) -> None:
        self.core = Core(1, Policy())
        self.now = 0.0
        for worker in range(1, workers + 1):
            self.handle(WorkerJoined(worker, MODEL, LIMITS))

    def handle(self, *events: Any) -> list[Instruction]:
        out = self.core.handle(events, self.now)
        self.core.check()
        return out


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_request_is_admitted_once_a_worker_can_follow_its_grammar(rig: Rig) -> None:
    out = rig.handle(submitted(1, 0, "a"))
    (question,) = of(SendCheck, out)
    assert (question.worker, question.grammar) == (1, grammar("a"))
    assert not of(Accept, out)
    assert not of(SendPlan, out)
    out = rig.handle(Checked(1, question.number, ""))
    assert [accept.ticket for accept in of(Accept, out)] == [0]
    plan = of(SendPlan, out)[0]
    assert plan.plan.grammars == (grammar("a"),)
    assert plan.plan.join_grammar.tolist() == [0]
    out = rig.handle(submitted(1, 1, "a"))
    assert of(Accept, out)  # the verdict is known
    assert not of(SendCheck, out)


def test_a_bad_grammar_is_refused_with_the_reason_and_at_once_when_it_comes_again(rig: Rig) -> None:
    (question,) = of(SendCheck, rig.handle(submitted(1, 0, "a"), submitted(2, 7, "a", n=2)))
    rejected = of(Reject, rig.handle(Checked(1, question.number, "it is bad")))
    assert [(one.client, one.ticket) for one in rejected] == [(1, 0), (2, 7), (2, 8)]
    assert {(one.code, one.field) for one in rejected} == {("invalid", "structured_outputs.regex")}
    assert "it is bad" in rejected[0].message
    out = rig.handle(submitted(3, 0, "a"))
    assert of(Reject, out)
    assert not of(SendCheck, out)
    rig.now += REFUSED_FOR_S + 1
    assert of(SendCheck, rig.handle(submitted(3, 1, "a")))


def test_one_plan_carries_each_grammar_once(rig: Rig) -> None:
    out = rig.handle(submitted(1, 0, "a"), submitted(1, 1, "b"), submitted(1, 2, "a"))
    plain = replace(submitted(1, 3, "a"), sampling=SamplingParams(temperature=0.0, max_tokens=4))
    answers = [Checked(1, question.number, "") for question in of(SendCheck, out)]
    plan = of(SendPlan, rig.handle(plain, *answers))[0]
    assert len(plan.plan.grammars) == 2
    names = [plan.plan.grammars[i].regex if i >= 0 else None for i in plan.plan.join_grammar]
    assert names == [None, "a", "a", "b"]


def test_clients_take_turns(rig: Rig) -> None:
    out = rig.handle(*(submitted(1, ticket, f"hostile {ticket}") for ticket in range(50)))
    asked = of(SendCheck, out)
    assert len(asked) == OUTSTANDING
    rig.handle(submitted(2, 0, "mine"))
    out = rig.handle(Checked(1, asked[0].number, "bad"))
    out += rig.handle(Checked(1, asked[1].number, "bad"))
    assert grammar("mine") in [question.grammar for question in of(SendCheck, out)]


def test_more_checks_than_may_wait_are_refused_as_overload(rig: Rig) -> None:
    count = MAX_CHECKS_PER_CLIENT
    out = rig.handle(*(submitted(1, ticket, f"g{ticket}") for ticket in range(count + 1)))
    (rejected,) = of(Reject, out)
    assert (rejected.code, rejected.ticket) == ("overloaded", count)
    out = rig.handle(*(submitted(2 + ticket // 200, ticket, f"h{ticket}") for ticket in range(MAX_CHECKS)))
    assert {one.code for one in of(Reject, out)} == {"overloaded"}


def test_what_waits_counts_as_waiting() -> None:
    core = Core(1, Policy(max_waiting_requests=2))
    core.handle([WorkerJoined(1, MODEL, LIMITS)], 0.0)
    out = core.handle([submitted(1, 0, "a", n=2), submitted(1, 2, "b")], 0.0)
    assert [(one.ticket, one.field) for one in of(Reject, out)] == [(2, "max_waiting_requests")]


def test_a_cancel_before_the_verdict_ends_the_request(rig: Rig) -> None:
    (question,) = of(SendCheck, rig.handle(submitted(1, 0, "a", n=2), submitted(1, 2, "a")))
    assert not rig.handle(Cancelled(1, 1))
    (delivered,) = of(Deliver, rig.handle(Cancelled(1, 0)))
    assert [(end.ticket, end.reason) for _, end in delivered.ended] == [(0, "abort"), (1, "abort")]
    assert [one.ticket for one in of(Accept, rig.handle(Checked(1, question.number, "")))] == [2]


def test_one_of_two_samples_is_cancelled_before_the_verdict(rig: Rig) -> None:
    (question,) = of(SendCheck, rig.handle(submitted(1, 0, "a", n=2)))
    rig.handle(Cancelled(1, 1))
    out = rig.handle(Checked(1, question.number, ""))
    ended = [end.ticket for deliver in of(Deliver, out) for _, end in deliver.ended]
    assert ([one.ticket for one in of(Accept, out)], ended) == ([0, 1], [1])


def test_a_client_that_is_gone_waits_no_more(rig: Rig) -> None:
    (question,) = of(SendCheck, rig.handle(submitted(1, 0, "a")))
    rig.handle(ClientLost(1))
    out = rig.handle(Checked(1, question.number, ""))
    assert not of(Accept, out)
    assert not of(SendPlan, out)


def test_a_ticket_that_waits_for_a_verdict_is_in_use(rig: Rig) -> None:
    rig.handle(submitted(1, 4, "a", n=3))
    (rejected,) = of(Reject, rig.handle(submitted(1, 6, "b")))
    assert (rejected.field, rejected.value) == ("ticket", "6")


def test_time_before_the_verdict_counts(rig: Rig) -> None:
    (question,) = of(SendCheck, rig.handle(submitted(1, 0, "a", timeout_s=5.0)))
    rig.now = 4.0
    rig.handle(Checked(1, question.number, ""))
    assert rig.core.next_deadline == 5.0


def test_another_worker_is_asked_when_one_is_lost_but_not_for_ever() -> None:
    rig = Rig(workers=2)
    (first,) = of(SendCheck, rig.handle(submitted(1, 0, "a")))
    (second,) = of(SendCheck, rig.handle(WorkerLost(first.worker)))
    assert second.worker != first.worker
    assert not rig.handle(Checked(first.worker, first.number, ""))  # a late answer
    out = rig.handle(WorkerLost(second.worker))
    assert not of(SendCheck, out)
    (rejected,) = of(Reject, out)
    assert "lost" in rejected.message


def test_a_check_waits_for_a_worker() -> None:
    rig = Rig()
    rig.handle(WorkerLost(1))
    assert not of(SendCheck, rig.handle(submitted(1, 0, "a")))
    assert of(SendCheck, rig.handle(WorkerJoined(2, MODEL, LIMITS)))


def test_a_row_whose_grammar_fails_ends_with_the_reason_and_what_it_has(rig: Rig) -> None:
    out = rig.handle(submitted(1, 0, "a"), replace(submitted(1, 1, "a"), n=1))
    rig.handle(*(Checked(1, question.number, "") for question in of(SendCheck, out)))
    rig.handle(StepDone(1, 0, np.array([8, 9], np.int32)))
    out = rig.handle(StepDone(1, 1, np.array([10, 11], np.int32), failed=((1, "too complex"),)))
    (delivered,) = of(Deliver, out)
    assert (delivered.ticket.tolist(), delivered.token.tolist()) == ([0], [10])
    ((_, ended),) = delivered.ended
    assert (ended.ticket, ended.reason, ended.error, ended.completion_tokens) == (1, "error", "too complex", 1)


class Machine(RuleBasedStateMachine):
    """Clients, workers and verdicts in any order: every submission gets exactly one answer, and the books balance."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(workers=0)
        self.answered: dict[tuple[int, int], int] = {}
        self.open: set[tuple[int, int]] = set()
        self.questions: list[SendCheck] = []
        self.workers: list[int] = []
        self.next = 0

    def take(self, out: list[Instruction]) -> None:
        self.questions += of(SendCheck, out)
        for one in [*of(Accept, out), *of(Reject, out)]:
            self.note(one.client, one.ticket)
        for deliver in of(Deliver, out):
            for client, end in deliver.ended:
                if (client, end.ticket) in self.open:
                    self.note(client, end.ticket)

    def note(self, client: int, ticket: int) -> None:
        assert (client, ticket) in self.open, "answered twice"
        self.open.remove((client, ticket))

    @rule()
    def join(self) -> None:
        self.next += 1
        self.workers.append(self.next)
        self.take(self.rig.handle(WorkerJoined(self.next, MODEL, LIMITS)))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        self.workers.remove(worker)
        self.take(self.rig.handle(WorkerLost(worker)))

    @precondition(lambda self: self.next)
    @rule(client=st.integers(1, 3), name=st.sampled_from("abcdef"), n=st.integers(1, 2))
    def submit(self, client: int, name: str, n: int) -> None:
        self.next += 2
        self.open |= {(client, self.next + i) for i in range(n)}
        self.take(self.rig.handle(submitted(client, self.next, name, n=n)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.take(self.rig.handle(Cancelled(*data.draw(st.sampled_from(sorted(self.open))))))

    @rule(client=st.integers(1, 3))
    def leave(self, client: int) -> None:
        self.take(self.rig.handle(ClientLost(client)))
        self.open = {one for one in self.open if one[0] != client}

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), error=st.sampled_from(["", "", "bad"]))
    def answer(self, data: st.DataObject, error: str) -> None:
        question = data.draw(st.sampled_from(self.questions))
        self.questions.remove(question)
        self.take(self.rig.handle(Checked(question.worker, question.number, error)))

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """While there is a worker, whoever waits has a question under way, or one in front of it."""
        grammars = self.rig.core._grammars
        asked = [question for question in self.questions if question.worker in self.workers]
        assert grammars.held == len(self.open)
        assert not (self.workers and grammars.held and not asked)

    def teardown(self) -> None:
        """Whatever happened, everybody hears in the end."""
        self.join()
        while self.questions:
            question = self.questions.pop()
            self.take(self.rig.handle(Checked(question.worker, question.number, "")))
        assert not self.open
        assert self.rig.core._grammars.held == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40)
