"""The worker's conversation with the scheduler: registers, executes plans, and registers anew with a scheduler that
does not know it."""

from __future__ import annotations

import logging
import queue
from dataclasses import dataclass
from typing import Final

from ..protocol.errors import ProtocolError, ServiceUnavailable, VersionMismatch
from ..protocol.messages import (
    PROTOCOL_VERSION,
    CheckGrammar,
    FetchFile,
    FileChunk,
    Goodbye,
    GrammarChecked,
    Idle,
    Leave,
    Ping,
    StepPlan,
    UnknownPeer,
    VersionRefused,
    WorkerHello,
    WorkerWelcome,
)
from .grammars.checker import GrammarChecker
from .link import Failure, Link, Reachable
from .pipeline import Pipeline
from .stopping import Stop

log = logging.getLogger(__name__)

FIRST_IDLE_AFTER_S: Final = 0.1
"""A worker that has nothing in flight any more says so after this time: if its scheduler was started again meanwhile,
and so does not know it, it learns that as soon as that one can be reached …"""
IDLE_AFTER_S: Final = 1.0
"""… and then it says so this often."""
HELLO_AFTER_S: Final = 0.5
"""A hello that nobody answers is repeated after this time, then after twice as long, and so on …"""
HELLO_EVERY_S: Final = 5.0
"""… until it is repeated this often."""
LEAVE_S: Final = 2.0
"""How long a worker that is asked to end waits for the steps in flight."""
CHUNK_BYTES: Final = 1024 * 1024
LONGEST_REASON: Final = 1_000


@dataclass(slots=True)
class _Registration:
    epoch: int
    registration: int


class Session:
    """Runs in the host thread, on one Link and one Pipeline."""

    def __init__(
        self,
        link: Link,
        pipeline: Pipeline,
        hello: WorkerHello,
        files: dict[str, bytes],
        checker: GrammarChecker,
    ) -> None:
        self._link = link
        self._pipeline = pipeline
        self._hello = hello
        self._files = files
        self._checker = checker
        self._registered: _Registration | None = None
        """None: a hello is outstanding."""
        self._heard = 0
        """The number of the last Ping since the registration."""
        self._patience_s = HELLO_AFTER_S
        """How long an outstanding hello is waited for."""
        self._said_idle = False
        """Since the last plan."""
        self.drained = False
        """The session ended because the scheduler has moved this worker's requests elsewhere and needs it no more."""

    def run(self) -> None:
        """Until asked to stop, or no longer needed. Raises what a step raised, and ServiceUnavailable if the scheduler
        will not have this worker; either way the scheduler is told that the worker leaves, and why."""
        try:
            self._converse()
        except Exception as error:
            self._link.send(Goodbye(reason=f"{type(error).__name__}: {error}"[:LONGEST_REASON], failed=True))
            raise
        self._link.send(Goodbye(reason="drained" if self.drained else "stopped"))

    def _converse(self) -> None:
        self._greet()
        while True:
            try:
                message = self._link.inbox.get(timeout=self._silence_s())
            except queue.Empty:
                self._nothing_came()
                continue
            if isinstance(message, Stop | Leave):
                self.drained = isinstance(message, Leave)
                self._finish()
                return
            self._handle(message)

    def _silence_s(self) -> float:
        """How long nothing may come before this end says something."""
        if self._registered is None:
            return self._patience_s
        return IDLE_AFTER_S if self._said_idle else FIRST_IDLE_AFTER_S

    def _handle(self, message: object) -> None:
        match message:
            case StepPlan():
                self._execute(message)
            case CheckGrammar():
                self._checker.check(message.grammar, lambda error: self._answer(message, error))
            case WorkerWelcome():
                self._register(_Registration(message.epoch, message.registration))
            case Ping():
                self._heard = message.number
                self._say_idle()
            case FetchFile():
                self._patience_s = HELLO_EVERY_S  # the hello has arrived
                piece = self._files.get(message.name, b"")[message.offset : message.offset + CHUNK_BYTES]
                self._link.send(FileChunk(name=message.name, offset=message.offset, data=piece))
            case UnknownPeer():
                registered = self._registered
                # Without a registration it answers what was sent before the hello. Of this very scheduler it counts
                # once nothing is in flight: until then results go out that it may have answered.
                if registered is not None and (message.epoch != registered.epoch or self._pipeline.idle):
                    self._start_over("the scheduler does not know this worker")
            case Goodbye():
                if message.final:
                    raise ServiceUnavailable(f"the scheduler refuses this worker: {message.reason}")
                if self._registered is not None:
                    self._start_over(f"the scheduler left: {message.reason}")
            case VersionRefused():
                raise VersionMismatch(
                    f"the scheduler speaks protocol version {message.version}, this worker {PROTOCOL_VERSION}; "
                    "install the same version of tandem at both ends"
                )
            case Reachable():
                if self._registered is None:
                    self._greet()
                else:
                    self._say_idle()  # perhaps to a scheduler that does not know this worker, and says so
            case Failure():
                raise message.error

    def _register(self, new: _Registration) -> None:
        """Plans of `new` follow, from step 0. A hello that was repeated may be answered twice."""
        if new == self._registered:
            return
        if self._registered is not None or self._pipeline.next_step:
            self._forget_rows()
        self._registered, self._heard = new, 0
        log.info("registered with scheduler epoch %d as %d", new.epoch, new.registration)

    def _execute(self, plan: StepPlan) -> None:
        registered = self._registered
        if registered is None or (plan.epoch, plan.registration) != (registered.epoch, registered.registration):
            return  # of a registration that is over
        self._said_idle = False
        try:
            self._pipeline.launch(plan)
        except ProtocolError as error:
            log.exception("plan %d cannot be executed", plan.step)
            self._start_over(str(error))

    def _answer(self, asked: CheckGrammar, error: str) -> None:
        """Called by the checker's thread. A scheduler that did not ask, or a later registration, ignores it."""
        self._link.send(
            GrammarChecked(epoch=asked.epoch, registration=asked.registration, number=asked.number, error=error)
        )

    def _start_over(self, reason: str) -> None:
        """Registers anew once what was launched has ended."""
        log.warning("registering anew: %s", reason)
        self._forget_rows()
        self._registered = None
        self._patience_s = HELLO_AFTER_S
        self._greet()

    def _forget_rows(self) -> None:
        self._pipeline.drain()
        self._pipeline.reset()

    def _finish(self) -> None:
        """Lets what is in flight come to its end, so that its tokens are not computed twice, if that is soon."""
        try:
            if not self._pipeline.drain(LEAVE_S):
                log.warning("a step is still running %.1f s after the worker was asked to end; leaving it", LEAVE_S)
        except Exception:
            log.exception("a step failed while the worker was ending")

    def _greet(self) -> None:
        self._link.send(self._hello)

    def _nothing_came(self) -> None:
        if self._registered is None:
            if self._patience_s < HELLO_EVERY_S <= 2 * self._patience_s:
                log.warning(
                    "no scheduler has answered at %s yet; this worker goes on trying (is `tandem scheduler` or `tandem "
                    "serve` running there?)",
                    self._link.address.url,
                )
            self._patience_s = min(2 * self._patience_s, HELLO_EVERY_S)
            self._greet()
        else:
            self._say_idle()

    def _say_idle(self) -> None:
        """If nothing is in flight; else a result is the next to be said."""
        registered, step = self._registered, self._pipeline.next_step
        if registered is not None and self._pipeline.idle:
            self._link.send(
                Idle(epoch=registered.epoch, registration=registered.registration, step=step, heard=self._heard)
            )
            self._said_idle = True
