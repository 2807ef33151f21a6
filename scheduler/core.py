"""The scheduler as a pure state machine: events and the time go in, instructions come out. No socket, clock, thread or
torch.

A request is, from its acceptance to its end, in exactly one place: the waiting queue or a slot of one replica. It ends
with exactly one `Ended`, in the `Deliver` that brings its last token. A submission with a grammar that no worker has
seen yet is not accepted before one has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import cast

import numpy as np

from ..protocol.errors import ProtocolError
from ..protocol.messages import NO_INTS, NO_LONGS, Ended, ModelDescription
from ..protocol.structured import StructuredOutputsParams
from .blocks import Match
from .deadlines import Deadlines
from .door import Invalid, find_fault, highest_token, is_ordinary, is_plain
from .events import (
    Accept,
    Cancelled,
    Checked,
    ClientLost,
    Deliver,
    Dismiss,
    DrainWorker,
    Event,
    Expel,
    Instruction,
    Reject,
    SendPlan,
    StepDone,
    Submitted,
    Suspect,
    Trouble,
    WorkerJoined,
    WorkerLost,
)
from .grammars import Grammars, Held
from .metrics import Counters
from .placement import choose
from .policy import Policy
from .quarantine import Quarantine, is_cleared, must_be_alone, suspect
from .queue import WaitingQueue
from .replica import Commit, Replica
from .requests import Request
from .rows import ENDING
from .submissions import Refusals, invalid, make_ordinary, make_request
from .throughput import EndingRate

KEPT_VERDICTS = 16
"""Lost workers that are remembered, for the case that one was not dead."""
POISONOUS = (
    "a worker died while it ran this request and nothing else; it had been suspected of two workers' deaths before, so "
    "it is not tried again"
)
SHORT = 4_096
"""Tokens of prompts that are looked at together, so that nothing large is copied."""
NO_TOKENS: frozenset[int] = frozenset()
NOBODYS: dict[int, Request] = {}
"""The open requests of a client that has none."""
INTERNAL = "an error inside the scheduler; its log has the details"
ADMISSION_WINDOW = 8
"""If the first in the queue finds no room, so many of those behind it are looked at."""
MAX_PASSED = 64
"""A request that so many have passed is passed no more: everything else waits until there is room for it."""


class Core:
    """All requests and all workers of one service, and one life of it (`epoch`)."""

    def __init__(self, epoch: int, policy: Policy, on_end: Callable[[Request, Ended], None] | None = None) -> None:
        """`on_end` is told of each request that ends; it must not call back."""
        self._on_end = on_end
        self._epoch = epoch
        self._policy = policy
        self._queue = WaitingQueue(policy.priority_aging_s)
        self._quarantine = Quarantine(policy.priority_aging_s)
        self._accused: dict[int, list[Request]] = {}
        """By lost worker: whom its loss suspected."""
        self._replicas: dict[int, Replica] = {}
        self._requests: dict[int, dict[int, Request]] = {}
        """Open requests by client and ticket."""
        self._deadlines = Deadlines(self._is_open)
        self._next_number = 0
        self._rate = EndingRate()
        self._grammars = Grammars()
        self.counters = Counters()
        self._refusals = Refusals(policy, self._rate, self.counters)
        self.model: ModelDescription | None = None
        """What the first worker brought; all others bring the same."""

    def handle(self, events: Sequence[Event], now: float) -> list[Instruction]:
        """Takes in events in order, ends what is late, then plans every step that can be planned. `now` is in seconds
        of any monotonic clock. To be called at `next_deadline` too, without events.

        A worker whose result is not due or does not fit is given up, with an Expel.
        """
        out = self.take_in(events, now)
        self.plan(now, out)
        return out

    def take_in(self, events: Sequence[Event], now: float) -> list[Instruction]:
        """The first part of `handle`, to which `plan` must follow."""
        out: list[Instruction] = []
        for kind, of_a_kind in groupby(events, type):
            if kind is Submitted:
                self._take_submissions(cast("list[Submitted]", list(of_a_kind)), now, out)
            else:
                for event in of_a_kind:
                    self._take(event, now, out)
        for request in self._deadlines.passed(now):
            self.counters.timeouts += 1
            self._withdraw(request, "timeout", now, out)
        out.extend(self._grammars.dispatch(self._replicas))
        return out

    def _take(self, event: Event, now: float, out: list[Instruction]) -> None:
        match event:
            case StepDone():
                self._step_done(event, now, out)
            case Cancelled():
                self._cancelled(event.client, event.ticket, now, out)
            case ClientLost():
                self._client_lost(event.client, now)
            case WorkerJoined():
                self._worker_joined(event, out)
            case WorkerLost():
                self._worker_lost(event, now, out)
            case Checked():
                held = self._grammars.settle(event.worker, event.number, event.error, now)
                self._submit_held(held, now, out)
            case DrainWorker():
                if (draining := self._replicas.get(event.worker)) is not None:
                    draining.draining = True

    # --- figures ---------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._queue) + self.suspects

    @property
    def suspects(self) -> int:
        """Requests that wait for a worker of their own."""
        return len(self._quarantine.waiting)

    @property
    def running(self) -> int:
        return sum(replica.rows.owned for replica in self._replicas.values())

    @property
    def next_deadline(self) -> float | None:
        """When the first of the open requests must have ended; None if none has a deadline."""
        return self._deadlines.next()

    @property
    def evicted_blocks(self) -> int:
        return self.counters.lost_evictions + sum(replica.pool.evictions for replica in self._replicas.values())

    def replica(self, worker: int) -> Replica | None:
        """The books of a worker, to be read only."""
        return self._replicas.get(worker)

    # --- clients ---------------------------------------------------------------------------------------------------

    def _take_submissions(self, events: Sequence[Submitted], now: float, out: list[Instruction]) -> None:
        """Most submissions are ordinary and find nothing in their way, which one look at each can tell. All others are
        for `_submitted`, with whatever is wrong with them."""
        model, queue, requests = self.model, self._queue, self._requests
        most_here = self._policy.max_requests_per_client
        short = [event.prompt for event in events if 0 < len(event.prompt) <= SHORT]
        highest = highest_token(short) if short else 0
        longest, max_model_len, eos = 0, 0, NO_TOKENS
        if model is not None and highest < model.vocab_size:
            max_model_len, eos = model.max_model_len, frozenset(model.eos_token_ids)
            longest = min(SHORT, max_model_len - 1)
        roomy = self._has_room_for(events)
        for event in events:
            try:
                length, client, ticket = len(event.prompt), event.client, event.ticket
                open_here = requests.get(client, NOBODYS)
                if not (
                    roomy
                    and 0 < length <= longest
                    and ticket not in open_here
                    and len(open_here) < most_here
                    and is_ordinary(event)
                ):
                    self._submitted(event, now, out, highest if length <= SHORT else None)
                    roomy = self._has_room_for(events)
                    continue
                number = self._next_number
                stops = NO_TOKENS if event.sampling.ignore_eos else eos
                request = make_ordinary(event, max_model_len, stops, number, now)
                if open_here is NOBODYS:
                    open_here = requests[client] = {}
                open_here[ticket] = request
                self._next_number = number + 1
                out.append(Accept(client, ticket, number))
                queue.push(request)
                if event.timeout_s is not None:
                    self._deadlines.add(now + event.timeout_s, request)
            except Exception as error:  # noqa: BLE001 - whatever it is, this request fails alone
                self._fail(event, error, now, out)

    def _has_room_for(self, events: Sequence[Submitted]) -> bool:
        """All of these may wait, if each is one request with a short prompt, and nothing else is to be counted."""
        queue, policy = self._queue, self._policy
        return (
            len(queue.by_number) + len(events) <= policy.max_waiting_requests
            and queue.tokens + SHORT * len(events) <= policy.max_waiting_tokens
            and not self._grammars.held
            and not self._quarantine.active
        )

    def _submitted(self, event: Submitted, now: float, out: list[Instruction], highest: int | None = None) -> None:
        """Whatever the door did not foresee fails this submission, and nothing else. `highest`: see `find_fault`."""
        try:
            model, plain = self.model, is_plain(event.sampling)
            rejected = self._turned_away(event, model, now, plain, highest)
            if rejected is not None or model is None:
                # Refused as a whole: every ticket hears the same.
                out.extend(replace(rejected, ticket=event.ticket + i) for i in range(event.n) if rejected is not None)
                return
            if not plain and event.sampling.structured_outputs is not None:
                unfit = self._grammar_fault(event, event.sampling.structured_outputs, now)
                if unfit is None:
                    return  # it waits for a worker's word
                if unfit:
                    out.extend(replace(fault, ticket=event.ticket + i) for fault in unfit for i in range(event.n))
                    return
            for i in range(event.n):
                self._accept(make_request(event, i, model, self._next_number, now, plain), event, now, out)
                self._next_number += 1
            if event.resumed:
                self.counters.resumptions += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, this request fails alone
            self._fail(event, error, now, out)

    def _fail(self, event: Submitted, error: Exception, now: float, out: list[Instruction]) -> None:
        """Ends whatever a submission has begun, and refuses the rest."""
        out.append(Trouble(f"submission of ticket {event.ticket} by client {event.client} failed: {error!r}"))
        for ticket in range(event.ticket, event.ticket + event.n):
            request = self._requests.get(event.client, {}).get(ticket)
            if request is not None:
                self._withdraw(request, "error", now, out, INTERNAL)
            else:
                out.append(Reject(client=event.client, ticket=ticket, code="internal", message=INTERNAL))

    def _grammar_fault(self, event: Submitted, grammar: StructuredOutputsParams, now: float) -> list[Reject] | None:
        """The refusal of a submission for its grammar, nothing if that is fine; None if the submission has to wait to
        know."""
        error = self._grammars.verdict(grammar, now)
        if error:
            field = f"structured_outputs.{grammar.kind}"
            return [invalid(event, Invalid(f"{field}: {error}", field, "a grammar that can be followed", ""))]
        if error is None:
            over = self._grammars.hold(event, grammar, now)
            if over is None:
                return None
            what, limit = over
            message = f"{limit} {what} wait to be checked, and no more may"
            return [self._refusals.overloaded(event, message, "structured_outputs", limit, limit, now)]
        return []

    def _submit_held(self, submissions: Iterable[Held], now: float, out: list[Instruction]) -> None:
        """Takes in what has waited for a verdict that is known by now, as if it had just come; but time has passed."""
        for held in submissions:
            event = held.event
            if event.timeout_s is not None:
                event = replace(event, timeout_s=event.timeout_s - (now - held.since))
            self._submitted(event, now, out)
            for ticket in held.cancelled:
                self._cancelled(event.client, ticket, now, out)

    def _accept(self, request: Request, event: Submitted, now: float, out: list[Instruction]) -> None:
        open_here = self._requests.get(request.client)
        if open_here is None:
            open_here = self._requests[request.client] = {}
        open_here[request.ticket] = request
        out.append(Accept(request.client, request.ticket, request.number))
        if request.resumed and int(event.generated[-1]) in request.stops:
            self._end(request, "stop", request.length, now, out)
        elif request.prompt_length + request.resumed >= request.limit:
            self._end(request, "length", request.length, now, out)
        else:
            if request.suspicions:
                self._wait(request)
            else:
                self._queue.push(request)
            if event.timeout_s is not None:
                self._deadlines.add(now + event.timeout_s, request)

    def _turned_away(
        self, event: Submitted, model: ModelDescription | None, now: float, plain: bool, highest: int | None
    ) -> Reject | None:
        """The refusal of a submission that is invalid or more than the service may hold."""
        if model is None:
            return self._refusals.overloaded(event, "no worker has joined yet", "workers", 1, 0, now)
        open_here, grammars, queue = self._requests.get(event.client, NOBODYS), self._grammars, self._queue
        waiting, tokens, held_here = len(queue.by_number), queue.tokens, 0
        fault = None
        if event.n > 1 or event.ticket in open_here or grammars.held:
            taken, held_here = self._find_taken(event, open_here)
            waiting += grammars.held
            tokens += grammars.held_tokens
            if taken is not None:
                what = f"ticket {taken} is in use by another open request of this client"
                fault = Invalid(what, "ticket", "unused", str(taken))
        if fault is None:
            fault = find_fault(event, model, self._policy.max_n, plain, highest)
        if fault is not None:
            return invalid(event, fault)
        if self._quarantine.active:
            waiting += self.suspects
            tokens += self._quarantine.waiting.tokens
        return self._refusals.over_limits(event, len(open_here) + held_here, waiting, tokens, now)

    def _find_taken(self, event: Submitted, open_here: dict[int, Request]) -> tuple[int | None, int]:
        """A ticket of a submission that its client uses already, or None; and how many requests of that client wait for
        a verdict on their grammar."""
        taken = next((event.ticket + i for i in range(event.n) if event.ticket + i in open_here), None)
        held_here = 0
        for other in (held.event for held in self._grammars.held_of(event.client)):
            held_here += other.n
            if other.ticket < event.ticket + event.n and event.ticket < other.ticket + other.n:
                taken = max(event.ticket, other.ticket)
        return taken, held_here

    def _cancelled(self, client: int, ticket: int, now: float, out: list[Instruction]) -> None:
        request = self._requests.get(client, {}).get(ticket)
        if request is not None:
            self._withdraw(request, "abort", now, out)
            return
        held = self._grammars.withdraw(client, ticket)
        if held is not None:
            ended = tuple(
                (client, Ended(ticket=one, reason="abort", prompt_tokens=len(held.event.prompt)))
                for one in sorted(held.cancelled)
            )
            out.append(Deliver(NO_LONGS, NO_LONGS, NO_INTS, NO_INTS, ended))
        # else it ended before the cancel arrived

    def _withdraw(self, request: Request, reason: str, now: float, out: list[Instruction], error: str = "") -> None:
        """Ends an open request wherever it is, with what it has."""
        known = request.length
        if not (self._queue.remove(request) or self._quarantine.waiting.remove(request)):
            replica, slot = self._locate(request)
            known = int(replica.rows.known[slot])
            replica.release([slot])
        self._end(request, reason, known, now, out, error)

    def _is_open(self, request: Request) -> bool:
        return self._requests.get(request.client, {}).get(request.ticket) is request

    def _client_lost(self, client: int, now: float) -> None:
        to_nobody: list[Instruction] = []
        self._grammars.forget_client(client)
        for ticket in list(self._requests.get(client, ())):
            self._cancelled(client, ticket, now, to_nobody)

    def _locate(self, request: Request) -> tuple[Replica, int]:
        for replica in self._replicas.values():
            slot = replica.slot_of(request)
            if slot is not None:
                return replica, slot
        raise RuntimeError(f"request {request.number} is open but neither waits nor runs")

    def _end(
        self, request: Request, reason: str, known: int, now: float, out: list[Instruction], error: str = ""
    ) -> None:
        """Ends a request that is nowhere any more, outside a step's own delivery."""
        ended = self._forget([request], [reason], [known], [error], now)
        out.append(Deliver(NO_LONGS, NO_LONGS, NO_INTS, NO_INTS, ended))

    def _forget(
        self,
        requests: Sequence[Request],
        reasons: Sequence[str],
        known: Sequence[int],
        errors: Sequence[str],
        now: float,
    ) -> tuple[tuple[int, Ended], ...]:
        """What their clients are told of requests that are nowhere any more, one at least."""
        ended = []
        for request, reason, tokens, error in zip(requests, reasons, known, errors, strict=True):
            client = request.client
            of_client = self._requests[client]
            del of_client[request.ticket]
            if not of_client:
                del self._requests[client]
            end = request.ended(reason, tokens, now, error)
            if self._on_end is not None:
                self._on_end(request, end)
            ended.append((client, end))
        self.counters.ended(requests, reasons, known, now)
        self._rate.ended(now, len(requests))
        return tuple(ended)

    # --- workers ---------------------------------------------------------------------------------------------------

    def _worker_joined(self, event: WorkerJoined, out: list[Instruction]) -> None:
        self.model = event.model
        self._replicas[event.worker] = Replica(event.worker, event.limits, self._epoch, self._policy)
        if event.lived_on is not None:
            self._acquit(event.lived_on, out)

    def _worker_lost(self, event: WorkerLost, now: float, out: list[Instruction]) -> None:
        """Its requests wait for another attempt, before all that never had one; but what no worker survives is not
        tried on all of them (see quarantine.py)."""
        replica = self._replicas.pop(event.worker, None)
        if replica is None:
            return
        self._submit_held(self._grammars.worker_lost(event.worker, now, died=event.died), now, out)
        self.counters.lost_evictions += replica.pool.evictions
        self.counters.lost_workers += event.died
        launched = replica.launched() if event.died else set()
        accused = []
        for request in replica.evict_all():
            self.counters.moved += 1
            if request.number not in launched:
                self._return(request)
            elif request is replica.alone and not is_cleared(request, request.length):
                launched.remove(request.number)
                self.counters.poisoned += 1
                self._end(request, "error", request.length, now, out, POISONOUS)
            else:
                launched.remove(request.number)
                suspect(request, request.length)
                accused.append(request)
                self._return(request)
        accused += self._suspect_elsewhere(launched)
        if accused:
            self._accused[event.worker] = accused
            if len(self._accused) > KEPT_VERDICTS:
                del self._accused[next(iter(self._accused))]
            self._tell_suspicions(accused, out)

    def _suspect_elsewhere(self, launched: set[int]) -> list[Request]:
        """Suspects those of the requests that were in a dead worker's launched steps, but had been taken away from it
        meanwhile (drained or preempted)."""
        if not launched:
            return []
        found = [one for of_client in self._requests.values() for one in of_client.values() if one.number in launched]
        for request in found:
            if self._queue.remove(request) or self._quarantine.waiting.remove(request):
                suspect(request, request.length)
                self._wait(request)
                continue
            replica, slot = self._locate(request)
            suspect(request, int(replica.rows.known[slot]))
            if must_be_alone(request) and replica.alone is not request:
                self.counters.moved += 1
                self._return(replica.evict(slot))
        return found

    def _acquit(self, worker: int, out: list[Instruction]) -> None:
        """A worker that was taken for dead is back: nobody has killed it."""
        acquitted = [one for one in self._accused.pop(worker, ()) if self._is_open(one) and one.suspicions]
        for request in acquitted:
            waits = self._quarantine.waiting.remove(request)
            request.suspicions -= 1
            if waits:
                self._wait(request)
        self._tell_suspicions(acquitted, out)

    @staticmethod
    def _tell_suspicions(requests: list[Request], out: list[Instruction]) -> None:
        by_client: dict[int, list[Request]] = defaultdict(list)
        for request in requests:
            by_client[request.client].append(request)
        for client, theirs in by_client.items():
            tickets = np.array([request.ticket for request in theirs], np.int64)
            out.append(Suspect(client, tickets, np.array([request.suspicions for request in theirs], np.int32)))

    def _return(self, request: Request) -> None:
        """Back to the queue, through no fault of its own that is proven."""
        request.goes_first = True
        self._wait(request)

    def _wait(self, request: Request) -> None:
        if must_be_alone(request):
            self._quarantine.push(request)
        else:
            self._queue.push(request)

    def _step_done(self, event: StepDone, now: float, out: list[Instruction]) -> None:
        replica = self._replicas.get(event.worker)
        if replica is None:
            return  # a late result of a worker that was given up
        try:
            commit = replica.commit(event.step, event.token, event.busy_us, event.failed, event.told)
        except ProtocolError as error:
            out.append(Expel(event.worker, str(error)))
            self._worker_lost(WorkerLost(event.worker), now, out)
            return
        self.counters.generation_tokens += len(commit.token)
        self.counters.more_tokens(len(commit.token) - len(commit.first), now - replica.committed_at)
        replica.committed_at = now
        if commit.first:
            self.counters.first_tokens(replica.rows.owners(commit.first), now)
        ended = self._finish(replica, commit, now) if commit.finishes else ()
        replica.settle()
        if len(commit.token) or ended or commit.prompts:
            out.append(self._delivery(commit, ended))

    @staticmethod
    def _delivery(commit: Commit, ended: tuple[tuple[int, Ended], ...]) -> Deliver:
        return Deliver(
            commit.client, commit.ticket, commit.offset, commit.token, ended, commit.logprobs, commit.prompts
        )

    def _finish(self, replica: Replica, commit: Commit, now: float) -> tuple[tuple[int, Ended], ...]:
        """Ends the requests whose last token a commit has brought, or that cannot go on."""
        early, over, failed = commit.stopped + [slot for slot, _ in commit.failed], commit.exhausted, commit.failed
        reasons = ["stop"] * len(commit.stopped) + ["error"] * len(failed) + ["length"] * len(over)
        errors = [""] * len(commit.stopped) + [error for _, error in failed] + [""] * len(over)
        slots = early + over
        cell, requests = replica.rows.cells.known, replica.rows.owners(slots)
        known = [cell[slot] for slot in slots]
        replica.release(early, over)
        return self._forget(requests, reasons, known, errors, now)

    # --- planning --------------------------------------------------------------------------------------------------

    def plan(self, now: float, out: list[Instruction]) -> None:
        """Plans for every worker that may have one more step in flight, until nobody can take more."""
        for replica in [r for r in self._replicas.values() if r.draining]:
            self._drain(replica, now, out)
        ready = [r for r in self._replicas.values() if r.in_flight <= r.limits.lookahead]
        while ready:
            self._admit(now, out)
            again = []
            for replica in ready:
                plan, preempted = replica.plan()
                self.counters.preemptions += len(preempted)
                for request in preempted:
                    request.preemptions += 1
                    self._queue.push(request)
                if plan is not None:
                    self.counters.iteration_tokens.observe(replica.newest_step_tokens)
                    out.append(SendPlan(replica.worker, plan))
                    if replica.in_flight <= replica.limits.lookahead:
                        again.append(replica)
            ready = again

    def _drain(self, replica: Replica, now: float, out: list[Instruction]) -> None:
        """Moves the worker's requests, oldest first, as far as there is room for them elsewhere; the others go on here
        meanwhile. Lets the worker go when it has none."""
        rows = replica.rows
        elsewhere = [other for other in self._replicas.values() if not other.draining]
        for slot in rows.oldest_first() if elsewhere else ():
            request = rows.request[slot]
            if request is None or rows.phase[slot] == ENDING:
                continue  # its end is in flight
            request.learn(rows.tokens(slot))
            request.probes = None
            if not must_be_alone(request) and all(other.offer(request) is None for other in elsewhere):
                break
            self.counters.moved += 1
            self._return(replica.evict(slot))
            self._admit(now, out)
        if not rows.owned and not replica.in_flight:
            del self._replicas[replica.worker]
            self._submit_held(self._grammars.worker_lost(replica.worker, now, died=False), now, out)
            self.counters.lost_evictions += replica.pool.evictions
            out.append(Dismiss(replica.worker))

    def _admit(self, now: float, out: list[Instruction]) -> None:
        """Gives waiting requests places. One without room for it is passed by those behind it, but not for ever."""
        if self._quarantine.active:
            self._quarantine.admit(
                self._replicas.values(), now, lambda one, there: self._isolate(one, there, now, out), self._clear
            )
        while (head := self._queue.head()) is not None:
            if self._place(head, now, out):
                continue
            if not any(r.accepts() for r in self._replicas.values()) or not self._place_another(now, out):
                return

    def _place_another(self, now: float, out: list[Instruction]) -> bool:
        """Gives the first that fits, of a few behind the head of the queue, a place; False if there is none."""
        passed: list[Request] = []
        for request in self._queue.in_turn(ADMISSION_WINDOW):
            if passed and self._place(request, now, out):  # the head was tried already
                break
            if request.passed >= MAX_PASSED:
                return False
            passed.append(request)
        else:
            return False
        for request in passed:
            request.passed += 1
        return True

    def _place(self, request: Request, now: float, out: list[Instruction]) -> bool:
        """Gives a request the best place that there is room for; False if there is none, or if the best one is worth
        waiting for, because another row there computes the prompt's next block."""
        offers = []
        for replica in self._replicas.values():
            match = replica.offer(request)
            if match is not None:
                offers.append((replica, match))
        if not offers:
            return False
        replica, match = offers[0]
        if len(self._replicas) > 1:
            replica, match = choose(request, offers, self._replicas.values())
        if match.pending:
            for other, found in offers:
                other.remember(request, found)
            return False
        self._queue.remove(request)
        self._settle_in(request, replica, match, now, out)
        return True

    def _isolate(self, request: Request, replica: Replica, now: float, out: list[Instruction]) -> None:
        """Gives a request that must run alone a place on an empty worker, where everything fits."""
        self._quarantine.waiting.remove(request)
        self._settle_in(request, replica, replica.match(request), now, out)

    def _clear(self, replica: Replica) -> None:
        """Sends a worker's requests back to the queue, before all that never had a place."""
        requests = replica.evict_all()
        self.counters.preemptions += len(requests)
        for request in requests:
            self._return(request)

    def _settle_in(self, request: Request, replica: Replica, match: Match, now: float, out: list[Instruction]) -> None:
        """Gives a request that waits nowhere any more a place; what goes wrong then fails it, and nothing else."""
        request.goes_first = False
        if request.started_at is None:
            request.started_at = now
        request.worker = replica.worker
        try:
            replica.admit(request, match)
        except Exception as error:  # noqa: BLE001 - whatever it is, this request fails alone
            out.append(Trouble(f"{request!r} could not be given a place: {error!r}"))
            self._end(request, "error", request.length, now, out, INTERNAL)
            return
        self.counters.looked_up_tokens += request.length
        if match.blocks:
            self.counters.cached_tokens += len(match.blocks) * replica.limits.block_size

    # --- integrity -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError unless every open request is in exactly one place and every replica's books balance."""
        self._grammars.check()
        places = [request.number for request in self._queue]
        places += [request.number for request in self._quarantine.waiting]
        for replica in self._replicas.values():
            replica.check()
            places += [request.number for request in replica.rows.request if request is not None]
        open_requests = sorted(
            request.number for by_ticket in self._requests.values() for request in by_ticket.values()
        )
        if sorted(places) != open_requests:
            raise AssertionError(f"open requests {open_requests} are at {sorted(places)}")
