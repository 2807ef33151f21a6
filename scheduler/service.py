"""Sockets and a clock around the core.

Messages are turned into events; events that arrive together are handled together; instructions are turned into
messages. All of it happens in callbacks of one asyncio loop, none of which ever waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import zmq

from ..protocol.codec import MAX_SUBMISSION_BYTES
from ..protocol.errors import ConfigurationError
from ..protocol.keys import ServerKeys, keys_path, server_keys
from ..protocol.messages import Ended
from ..protocol.tracing import NO_TRACER, Tracer
from ..protocol.transport import Address, LoopSocket, Port, ServiceDirectory, open_router
from .admission import Admission, Complaints
from .client_port import ClientPort
from .config import SchedulerConfig
from .connections import Connections, most_connections
from .core import Core
from .events import (
    Accept,
    Deliver,
    Dismiss,
    Event,
    Expel,
    Instruction,
    Reject,
    SendCheck,
    SendPlan,
    StepDone,
    Suspect,
    Trouble,
)
from .leases import WorkerLeases
from .requests import Request
from .worker_port import WorkerPort

log = logging.getLogger(__name__)
requests_log = logging.getLogger("tandem.requests")

STOPPING = "the scheduler is stopping"
COMMIT, PLAN = range(2)
"""Kinds of spans of the scheduler's track …"""
DELIVER = 0
"""… and of that of its clients."""
LONGEST_INTERVAL_S = 1.0
"""At least so often is looked for peers whose lease ran out."""
MAX_UNREAD_MESSAGES = 16
"""Of a connection, that wait in the scheduler, each of MAX_SUBMISSION_BYTES at most; a client that sends faster has to
wait."""


class Service:
    """One life of the scheduler. Create it on a running loop; `close` ends it."""

    def __init__(
        self, config: SchedulerConfig, context: zmq.Context[zmq.Socket[bytes]], tracer: Tracer = NO_TRACER
    ) -> None:
        """Binds the sockets. Raises ConfigurationError if the addresses are unsafe, taken or do not fit together."""
        address = Address(config.address)
        worker_address = Address(config.worker_address or config.address)
        self.epoch = time.time_ns()
        self._loop = asyncio.get_running_loop()
        self._ended: list[tuple[Request, Ended]] = []
        """Requests that ended and are still to be logged."""
        logged = config.log_requests and requests_log.isEnabledFor(logging.INFO)
        note_end = (lambda request, ended: self._ended.append((request, ended))) if logged else None
        self._core = Core(self.epoch, config.policy, note_end)
        self._events: list[Event] = []
        self._flushing: asyncio.Handle | None = None
        self._deadline: tuple[float, asyncio.Handle] | None = None
        """When the core is asked next at the latest (loop time), and what will ask it."""
        self.clients = ClientPort(
            self.epoch,
            config.client_lease,
            self._post,
            self._loop.time,
            self._core,
            self._loop.call_later,
            config.delivery_interval_s,
            config.max_n,
        )
        leases = WorkerLeases(config.worker_lease, config.worker_lease_limit)
        self.workers = WorkerPort(self.epoch, leases, self._post, self._loop, self._core, self.clients.serve_model)
        self.clients.workers = self.workers
        self._track = tracer.track("scheduler", "commit", "plan")
        self.workers.track = tracer.track("scheduler's socket for workers", "receive result", "send plan")
        self._client_track = tracer.track("scheduler's sockets for clients", "deliver")
        secure = _with_keys(address, worker_address, config)
        self._admission: Admission | None = None
        self._complaints = Complaints(self._loop.time)
        if address.is_ipc:
            self.clients.drain = self.workers.drain  # whoever reaches the socket is the service's own user
        with ExitStack() as opened:
            for one in dict.fromkeys((address, worker_address)):
                if one.is_ipc:
                    opened.callback(ServiceDirectory(one.directory).close)
            keys = self._open_admission(keys_path(config.keys), context, opened) if secure else None
            clients = partial(
                open_router,
                context,
                address.endpoint("clients"),
                max_message_bytes=MAX_SUBMISSION_BYTES,
                unread_messages=MAX_UNREAD_MESSAGES,
                keys=keys if address in secure else None,
                domain="clients",
            )
            self._open_port("clients", self.clients, clients, opened)
            workers = partial(
                open_router,
                context,
                worker_address.endpoint("workers"),
                keys=keys if worker_address in secure else None,
                domain="workers",
            )
            self._open_port("workers", self.workers, workers, opened)
            for where, port in ((address, self.clients), (worker_address, self.workers)):
                port.admission = self._admission if where in secure else None
            self.workers.local = worker_address.is_ipc
            self._opened = opened.pop_all()
        interval = min(LONGEST_INTERVAL_S, min(config.client_lease, config.worker_lease) / 8)
        self._housekeeping = self._loop.create_task(self._keep_house(interval))

    def close(self) -> None:
        """Tells everybody, closes the sockets and removes them from the file system."""
        self._housekeeping.cancel()
        if self._deadline is not None:
            self._deadline[1].cancel()
        self._opened.close()

    def _open_admission(
        self, directory: Path, context: zmq.Context[zmq.Socket[bytes]], opened: ExitStack
    ) -> ServerKeys:
        """Sees to it that keys are checked, and returns the scheduler's own."""
        keys = server_keys(directory)
        self._admission = Admission(directory, context, self._loop)
        opened.callback(self._admission.close)
        return keys

    def _open_port(
        self,
        name: Port,
        port: ClientPort | WorkerPort,
        open_socket: Callable[..., zmq.Socket[bytes]],
        opened: ExitStack,
    ) -> None:
        connections = Connections(name, most_connections(), self._complaints)
        opened.callback(connections.close)
        port.attach(LoopSocket(open_socket(prepare=connections.prepare), port.on_message, self._loop))
        opened.callback(port.close, STOPPING)
        connections.attach(self._loop)

    def _check_keys(self) -> None:
        """Cuts off whom the lists of keys do not name any more."""
        if self._admission is None:
            return
        self._admission.execute()
        if self._admission.reload():
            for port in (self.clients, self.workers):
                if port.admission is not None:
                    port.drop_revoked()

    def _post(self, event: Event) -> None:
        """Hands an event to the core with whatever else arrives in this turn of the loop."""
        self._events.append(event)
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Plans go out before anything that clients are told: a worker waits for its plan, a thousand streams do
        not."""
        if self._flushing is not None:
            self._flushing.cancel()  # a deadline may be why this runs
            self._flushing = None
        events, self._events = self._events, []
        begun = time.monotonic()  # the loop's own clock, which this is, may be a millisecond behind
        track, at = self._track, self._track.start()
        instructions = self._core.take_in(events, begun)
        if track.on:
            at = track.end(COMMIT, _step_done(events), at)
        self._core.plan(begun, instructions)
        handled_s = time.monotonic() - begun
        if track.on:
            at = track.end(PLAN, _step_planned(instructions), at)
        rest: deque[Instruction] = deque()
        for instruction in instructions:
            if isinstance(instruction, SendPlan):
                self.workers.send_plan(instruction)
            else:
                rest.append(instruction)
        if len(rest) < len(instructions):
            self._core.counters.plan_time.observe(handled_s)
        if rest:
            at = self._client_track.start()
            self._carry_out(rest)
            self._client_track.end(DELIVER, -1, at)
        self._await_deadline()
        if self._ended:
            self._log_ended()

    def _log_ended(self) -> None:
        """A line for each request that has ended."""
        pairs, self._ended = self._ended, []
        for request, ended in pairs:
            fields = {
                "request": request.number,
                "client": request.client,
                "worker": self.workers.name(request.worker),
                "reason": ended.reason,
                "prompt_tokens": ended.prompt_tokens,
                "cached_tokens": ended.cached_tokens,
                "output_tokens": ended.completion_tokens,
                "queue_s": ended.queue_s,
                "first_token_s": ended.first_token_s,
                "total_s": ended.total_s,
                "attempts": ended.attempts,
                "preemptions": request.preemptions,
            }
            if ended.error:
                fields["error"] = ended.error
            requests_log.info("request ended", extra={"fields": fields})

    def _await_deadline(self) -> None:
        """Sees to it that the core is asked again when the next request must have ended."""
        when = self._core.next_deadline
        if self._deadline is not None:
            if when == self._deadline[0]:
                return
            self._deadline[1].cancel()
        # uvloop gives no TimerHandle, which would know its time, for a time that is now.
        self._deadline = None if when is None else (when, self._loop.call_at(when, self._on_deadline))

    def _on_deadline(self) -> None:
        self._deadline = None  # uvloop may come half a millisecond early; then it is awaited again
        self._flush()

    def _carry_out(self, instructions: deque[Instruction]) -> None:
        """In order. Should one raise, the loop reports it and the others are carried out all the same."""
        try:
            while instructions:
                match instruction := instructions.popleft():
                    case Deliver():
                        self.clients.deliver(instruction)
                    case Accept():
                        self.clients.accept(instruction)
                    case Reject():
                        self.clients.reject(instruction)
                    case SendCheck():
                        self.workers.send_check(instruction)
                    case Expel():
                        self.workers.expel(instruction)
                    case Suspect():
                        self.clients.tell_suspicions(instruction)
                    case Dismiss():
                        self.workers.dismiss(instruction)
                    case Trouble():
                        log.error("%s", instruction.story)
        finally:
            if instructions:
                self._loop.call_soon(self._carry_out, instructions)

    async def _keep_house(self, interval: float) -> None:
        looked_at = self._loop.time()
        while True:
            await asyncio.sleep(interval)
            now = self._loop.time()
            # If this process was stopped, what was said meanwhile is not read yet.
            forgiven = max(0.0, now - looked_at - 2 * interval)
            self.clients.expire(now, forgiven)
            self.workers.expire(now, forgiven)
            looked_at = now
            self._check_keys()


def _with_keys(address: Address, worker_address: Address, config: SchedulerConfig) -> set[Address]:
    """Which of the two check keys. Raises ConfigurationError if keys are given and none of them would."""
    if not address.is_ipc and worker_address.url == address.url:
        raise ConfigurationError("with a tcp address, workers need an address of their own: give --worker-address")
    addresses = {address, worker_address}
    checked = {one for one in addresses if not one.is_ipc} or addresses
    return {one for one in checked if one.needs_keys(config.insecure, config.keys)}


def _step_done(events: Sequence[Event]) -> int:
    """The first result's step, for the trace; -1 for none."""
    return next((event.step for event in events if isinstance(event, StepDone)), -1)


def _step_planned(instructions: Sequence[Instruction]) -> int:
    return next((one.plan.step for one in instructions if isinstance(one, SendPlan)), -1)
