"""The worker's conversation with the scheduler: registers, executes plans, and registers anew with a scheduler that
does not know it."""

from __future__ import annotations

import logging
import queue
from dataclasses import dataclass

from ..protocol.codec import encode
from ..protocol.errors import ProtocolError, ServiceUnavailable
from ..protocol.messages import (
    PROTOCOL_VERSION,
    FetchFile,
    FileChunk,
    Goodbye,
    Idle,
    StepPlan,
    StepResult,
    UnknownPeer,
    VersionRefused,
    WorkerHello,
    WorkerWelcome,
)
from .link import Failure, Link, Outbox, Stop
from .pipeline import Pipeline

log = logging.getLogger(__name__)

IDLE_AFTER_S = 1.0
"""A worker with nothing in flight says so this often."""
HELLO_EVERY_S = 0.5
"""How often an unanswered hello is repeated."""
CHUNK_BYTES = 1024 * 1024


@dataclass(slots=True)
class _Registration:
    epoch: int
    registration: int


class Session:
    """Runs in the host thread, on one Link and one Pipeline."""

    def __init__(
        self, link: Link, outbox: Outbox, pipeline: Pipeline, hello: WorkerHello, files: dict[str, bytes]
    ) -> None:
        self._inbox = link.inbox
        self._outbox = outbox
        self._pipeline = pipeline
        self._hello = hello
        self._files = files
        self._registered: _Registration | None = None
        self._greeted = False
        """The scheduler answered the hello in some way, so it is not repeated."""

    def run(self) -> None:
        """Until asked to stop. Raises what a step raised, and ServiceUnavailable if the scheduler will not have this
        worker."""
        self._greet()
        while True:
            try:
                message = self._inbox.get(timeout=IDLE_AFTER_S if self._greeted else HELLO_EVERY_S)
            except queue.Empty:
                self._nothing_came()
                continue
            if isinstance(message, Stop):
                self._pipeline.drain()
                self._outbox.send(Goodbye(reason="stopped"))
                return
            self._handle(message)

    def _handle(self, message: object) -> None:
        match message:
            case StepPlan():
                self._execute(message)
            case WorkerWelcome():
                self._registered = _Registration(message.epoch, message.registration)
                log.info("registered with scheduler epoch %d as %d", message.epoch, message.registration)
            case FetchFile():
                self._greeted = True
                piece = self._files.get(message.name, b"")[message.offset : message.offset + CHUNK_BYTES]
                self._outbox.send(FileChunk(name=message.name, offset=message.offset, data=piece))
            case UnknownPeer():
                if self._registered is None or message.epoch != self._registered.epoch or self._pipeline.idle:
                    self._start_over("the scheduler does not know this worker")
            case Goodbye():
                if message.final:
                    raise ServiceUnavailable(f"the scheduler refuses this worker: {message.reason}")
                self._start_over(f"the scheduler left: {message.reason}")
            case VersionRefused():
                raise ServiceUnavailable(
                    f"the scheduler speaks protocol version {message.version}, this worker {PROTOCOL_VERSION}; "
                    "install the same version of tandem at both ends"
                )
            case Failure():
                raise message.error

    def _execute(self, plan: StepPlan) -> None:
        registered = self._registered
        if registered is None or (plan.epoch, plan.registration) != (registered.epoch, registered.registration):
            return  # of a registration that is over
        try:
            self._pipeline.launch(plan)
        except ProtocolError as error:
            log.exception("plan %d cannot be executed", plan.step)
            self._start_over(str(error))

    def _start_over(self, reason: str) -> None:
        """Registers anew once what was launched has ended."""
        log.warning("registering anew: %s", reason)
        self._pipeline.drain()
        self._pipeline.reset()
        self._registered = None
        self._greet()

    def _greet(self) -> None:
        self._greeted = False
        self._outbox.send(self._hello)

    def _nothing_came(self) -> None:
        if self._registered is None:
            self._greet()
        elif self._pipeline.idle:
            registered = self._registered
            step = self._pipeline.next_step
            self._outbox.send(Idle(epoch=registered.epoch, registration=registered.registration, step=step))


class Results:
    """Sends results from the result thread, through an outbox of that thread's own."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._outbox_context = link.outbox()
        self._outbox: Outbox | None = None

    def send(self, result: StepResult) -> None:
        if self._outbox is None:
            self._outbox = self._outbox_context.__enter__()
        self._outbox.send_bytes(encode(result))

    def close(self) -> None:
        """Once the result thread has ended."""
        if self._outbox is not None:
            self._outbox_context.__exit__(None, None, None)
