"""The scheduler as a pure state machine: events and the time go in, instructions come out. No socket, clock, thread or
torch.

A request is, from its acceptance to its end, in exactly one place: the waiting queue or a slot of one replica. It ends
with exactly one `Ended`, in the `Deliver` that brings its last token.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..protocol.errors import ProtocolError
from ..protocol.messages import NO_INTS, NO_LONGS, Ended, ModelDescription
from .door import find_fault
from .events import (
    Accept,
    Cancelled,
    ClientLost,
    Deliver,
    Event,
    Expel,
    Instruction,
    Reject,
    SendPlan,
    StepDone,
    Submitted,
    WorkerJoined,
    WorkerLost,
)
from .queue import WaitingQueue
from .replica import Commit, Replica
from .requests import Request
from .throughput import EndingRate

MAX_LOSSES = 5
"""A request that ran when so many workers were lost fails."""


class Core:
    """All requests and all workers of one service, and one life of it (`epoch`)."""

    def __init__(self, epoch: int, *, max_waiting_requests: int, max_waiting_tokens: int, watermark: float) -> None:
        self._epoch = epoch
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._watermark = watermark
        self._queue = WaitingQueue()
        self._replicas: dict[int, Replica] = {}
        self._requests: dict[int, dict[int, Request]] = {}
        """Open requests by client and ticket."""
        self._next_number = 0
        self._rate = EndingRate()
        self.preemptions = 0
        self.model: ModelDescription | None = None
        """What the first worker brought; all others bring the same."""

    def handle(self, events: Iterable[Event], now: float) -> list[Instruction]:
        """Takes in events in order, then plans every step that can be planned. `now` is in seconds of any monotonic
        clock.

        A worker whose result is not due or does not fit is given up, with an Expel.
        """
        out: list[Instruction] = []
        for event in events:
            match event:
                case StepDone():
                    self._step_done(event, now, out)
                case Submitted():
                    self._submitted(event, now, out)
                case Cancelled():
                    self._cancelled(event.client, event.ticket, now, out)
                case ClientLost():
                    self._client_lost(event.client, now)
                case WorkerJoined():
                    self._worker_joined(event)
                case WorkerLost():
                    self._worker_lost(event, now, out)
        self._plan(now, out)
        return out

    # --- figures ---------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return sum(replica.rows.owned for replica in self._replicas.values())

    def replica(self, worker: int) -> Replica | None:
        """The books of a worker, to be read only."""
        return self._replicas.get(worker)

    # --- clients ---------------------------------------------------------------------------------------------------

    def _submitted(self, event: Submitted, now: float, out: list[Instruction]) -> None:
        model = self.model
        rejected = self._turned_away(event, model, now)
        if rejected is not None or model is None:
            out.extend([rejected] if rejected is not None else [])
            return
        sampling = event.sampling
        known = np.concatenate([event.prompt, event.generated]) if len(event.generated) else event.prompt
        limit = model.max_model_len
        if sampling.max_tokens is not None:
            limit = min(limit, len(event.prompt) + sampling.max_tokens)
        stops = sampling.stop_token_ids if sampling.ignore_eos else (*model.eos_token_ids, *sampling.stop_token_ids)
        request = Request(
            number=self._next_number,
            client=event.client,
            ticket=event.ticket,
            known=known,
            prompt_length=len(event.prompt),
            limit=limit,
            sampling=sampling,
            stops=stops,
            now=now,
        )
        self._next_number += 1
        self._requests.setdefault(event.client, {})[event.ticket] = request
        out.append(Accept(event.client, event.ticket, request.number))
        if len(event.generated) and int(event.generated[-1]) in stops:
            self._end(request, "stop", len(known), now, out)
        elif len(known) >= limit:
            self._end(request, "length", len(known), now, out)
        else:
            self._queue.push(request)

    def _turned_away(self, event: Submitted, model: ModelDescription | None, now: float) -> Reject | None:
        """The refusal of a request that is invalid or more than the queue may hold."""

        def overloaded(message: str, field: str, limit: int, value: int) -> Reject:
            return Reject(
                client=event.client,
                ticket=event.ticket,
                code="overloaded",
                message=message,
                field=field,
                limit=str(limit),
                value=str(value),
                retry_after=self._rate.retry_after(now),
            )

        if model is None:
            return overloaded("no worker has joined yet", "workers", 1, 0)
        if event.ticket in self._requests.get(event.client, ()):
            message = f"ticket {event.ticket} is in use by another open request of this client"
            field, limit, value = "ticket", "unused", str(event.ticket)
        else:
            fault = find_fault(event, model)
            if fault is None:
                waiting, tokens = len(self._queue), self._queue.tokens + len(event.prompt) + len(event.generated)
                if waiting >= self._max_waiting_requests:
                    return overloaded(
                        f"{waiting} requests wait already", "max_waiting_requests", self._max_waiting_requests, waiting
                    )
                if tokens > self._max_waiting_tokens:
                    return overloaded(
                        f"{tokens} tokens would wait", "max_waiting_tokens", self._max_waiting_tokens, tokens
                    )
                return None
            message, field, limit, value = fault.message, fault.field, fault.limit, fault.value
        return Reject(
            client=event.client,
            ticket=event.ticket,
            code="invalid",
            message=message,
            field=field,
            limit=limit,
            value=value,
        )

    def _cancelled(self, client: int, ticket: int, now: float, out: list[Instruction]) -> None:
        request = self._requests.get(client, {}).get(ticket)
        if request is None:
            return  # it ended before the cancel arrived
        known = len(request.known)
        if not self._queue.remove(request):
            replica, slot = self._locate(request)
            known = int(replica.rows.known[slot])
            replica.release(slot)
        self._end(request, "abort", known, now, out)

    def _client_lost(self, client: int, now: float) -> None:
        to_nobody: list[Instruction] = []
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
        ended = self._forget(request, reason, known, now, error)
        out.append(Deliver(NO_LONGS, NO_LONGS, NO_INTS, NO_INTS, ((request.client, ended),)))

    def _forget(self, request: Request, reason: str, known: int, now: float, error: str = "") -> Ended:
        of_client = self._requests[request.client]
        del of_client[request.ticket]
        if not of_client:
            del self._requests[request.client]
        self._rate.ended(now)
        return request.ended(reason, known, now, error)

    # --- workers ---------------------------------------------------------------------------------------------------

    def _worker_joined(self, event: WorkerJoined) -> None:
        self.model = event.model
        self._replicas[event.worker] = Replica(event.worker, event.limits, self._epoch, self._watermark)

    def _worker_lost(self, event: WorkerLost, now: float, out: list[Instruction]) -> None:
        """Its requests wait for another attempt, but not for ever: what no worker survives is not tried on all of
        them."""
        replica = self._replicas.pop(event.worker, None)
        for request in () if replica is None else replica.evict_all():
            request.losses += 1
            if request.losses < MAX_LOSSES:
                self._queue.push(request)
            else:
                error = f"the worker was lost {request.losses} times while it ran this request"
                self._end(request, "error", len(request.known), now, out, error)

    def _step_done(self, event: StepDone, now: float, out: list[Instruction]) -> None:
        replica = self._replicas.get(event.worker)
        if replica is None:
            return  # a late result of a worker that was given up
        try:
            commit = replica.commit(event.step, event.token)
        except ProtocolError as error:
            out.append(Expel(event.worker, str(error)))
            self._worker_lost(WorkerLost(event.worker), now, out)
            return
        for slot in commit.first:
            request = replica.rows.request[slot]
            if request is not None and request.first_token_at is None:
                request.first_token_at = now
        ended = tuple(
            self._finish(replica, int(slot), reason, now)
            for reason, slots in (("stop", commit.stopped), ("length", commit.exhausted))
            for slot in slots
        )
        replica.settle()
        if len(commit.token):
            out.append(self._delivery(commit, ended))

    @staticmethod
    def _delivery(commit: Commit, ended: tuple[tuple[int, Ended], ...]) -> Deliver:
        return Deliver(commit.client, commit.ticket, commit.offset, commit.token, ended)

    def _finish(self, replica: Replica, slot: int, reason: str, now: float) -> tuple[int, Ended]:
        request = replica.rows.request[slot]
        if request is None:
            raise RuntimeError(f"slot {slot} finished without an owner")
        known = int(replica.rows.known[slot])
        replica.release(slot)
        return request.client, self._forget(request, reason, known, now)

    # --- planning --------------------------------------------------------------------------------------------------

    def _plan(self, now: float, out: list[Instruction]) -> None:
        """Plans for every worker that may have one more step in flight, until nobody can take more."""
        ready = [r for r in self._replicas.values() if r.in_flight <= r.limits.lookahead]
        while ready:
            self._admit(now)
            again = []
            for replica in ready:
                plan, preempted = replica.plan()
                self.preemptions += len(preempted)
                for request in preempted:
                    self._queue.push(request)
                if plan is not None:
                    out.append(SendPlan(replica.worker, plan))
                    if replica.in_flight <= replica.limits.lookahead:
                        again.append(replica)
            ready = again

    def _admit(self, now: float) -> None:
        """Gives waiting requests, first come first served, to the least loaded worker that has room."""
        while (request := self._queue.head()) is not None:
            able = [replica for replica in self._replicas.values() if replica.can_admit(request)]
            if not able:
                return
            self._queue.remove(request)
            if request.started_at is None:
                request.started_at = now
            min(able, key=lambda replica: replica.load).admit(request)

    # --- integrity -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError unless every open request is in exactly one place and every replica's books balance."""
        places = [request.number for request in self._queue]
        for replica in self._replicas.values():
            replica.check()
            places += [request.number for request in replica.rows.request if request is not None]
        open_requests = sorted(
            request.number for by_ticket in self._requests.values() for request in by_ticket.values()
        )
        if sorted(places) != open_requests:
            raise AssertionError(f"open requests {open_requests} are at {sorted(places)}")
