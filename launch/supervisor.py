"""Starts child processes, listens to them, notices when one dies or hangs, starts it again, and ends them all.

One thread does everything: it starts the children (which are tethered to it, see tether.py), and then sleeps until a
child speaks, a child dies or its owner asks for something. What the children say reaches the listener through a relay,
so that a terminal that takes nothing does not hold it. The owner's thread waits by reading a pipe, so that an interrupt
reaches it at once and no lock is ever held while it does.
"""

from __future__ import annotations

import os
import select
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable

from ..protocol.errors import TandemError
from .child import Child, ChildSpec, read_now
from .relay import LAUNCHER, PATIENCE_S, Listener, Relay
from .restarts import RestartHistory
from .status import Alive, Drained, Failed, Ready, Status
from .stderr import say

GRACE_S = 5.0
"""How long a child that was asked to end may take before it is killed."""
UNKNOWN_S = 10.0
"""How long a ready child may be unknown to the one that should know it (see ChildSpec.known_to)."""
LOOK_S = 1.0
"""How often is looked for children that hang."""


class ChildDied(TandemError):
    """A child ended that nobody had asked to. `words` are the last lines that it wrote, `told` is its own message."""

    def __init__(self, name: str, how: str, words: list[str], told: str) -> None:
        self.name, self.how, self.words, self.told = name, how, words, told
        if told:
            text = f"{name}: {told}"
        elif words:
            text = f"{name} {how}. Its last words:\n" + "\n".join(f"  {line}" for line in words)
        else:
            text = f"{name} {how}, without a word."
        super().__init__(text)


class StartTimeout(TandemError):
    """A child was not ready in time."""


class Supervisor:
    """The children of one system. Owned by one thread; `stop()` ends everything and is idempotent.

    A child that ends unasked, or hangs and is killed for it, is started again as its spec says. If it is not, that is
    kept in `death`, and it takes the others with it.
    """

    def __init__(self, listener: Listener, on_death: Callable[[ChildDied], None] | None = None) -> None:
        """`on_death` is called in the supervisor's thread when `death` is set; must not block."""
        self._settling = False
        self._relay = Relay(listener, self._passed_on)
        self._on_death = on_death
        self._children: dict[str, Child] = {}
        self._histories: dict[str, RestartHistory] = {}
        self._to_start: dict[str, tuple[float, ChildSpec]] = {}
        """Children that will be started again, and when."""
        self._stopping = False
        self._grace_s = GRACE_S
        self._kill_at = float("inf")
        self._requests: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._news_read, self._news_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._news = select.poll()
        self._news.register(self._news_read, select.POLLIN)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._serve_requests)
        self.ready: dict[str, Ready] = {}
        """Of the children that are ready now, what they said."""
        self.death: ChildDied | None = None
        self._failure: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tandem-supervisor", daemon=True)
        self._thread.start()

    def start(self, spec: ChildSpec) -> None:
        """Starts a child. Returns at once; a child that cannot be started counts as one that died."""
        self._ask(lambda: self._start(spec))

    def wait_ready(self, name: str, timeout_s: float | None = None) -> Ready:
        """Blocks until the child says that it is ready. Raises ChildDied if it or another ends first, StartTimeout."""
        found: list[Ready] = []

        def over() -> bool:
            if (ready := self.ready.get(name)) is not None:  # it may have ended again before we look twice
                found.append(ready)
            return bool(found) or self.death is not None

        self._wait(over, timeout_s)
        self._settle()
        if self.death is not None:
            raise self.death
        if not found:
            raise StartTimeout(f"{name} was not ready after {timeout_s:g} seconds")
        return found[0]

    def wait_for_death(self, timeout_s: float | None = None) -> ChildDied | None:
        """Blocks until a child ends unasked for good, and returns that; None after `timeout_s`."""
        self._wait(lambda: self.death is not None, timeout_s)
        if self.death is not None:
            self._settle()
        return self.death

    def tell(self, line: str) -> None:
        """Passes a line of the owner's to the listener, after all that came before; does not wait for it."""
        self._relay.output(LAUNCHER, line)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Asks the children to end, kills each that has not within `grace_s`, and returns when all are gone."""
        if self._closed:
            return
        self._ask(lambda: self._begin_stop(grace_s))
        self._thread.join()
        self._settling = False  # a listener that is left behind must not write to what is closed below
        self._relay.close()
        self._closed = True
        for fd in (self._wake_read, self._wake_write, self._news_read, self._news_write):
            os.close(fd)

    # The owner's side

    def _ask(self, request: Callable[[], None]) -> None:
        self._requests.append(request)
        os.write(self._wake_write, b"!")

    def _wait(self, over: Callable[[], bool], timeout_s: float | None) -> None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not over() and self._failure is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return
            self._news.poll(None if left is None else left * 1000)
            _drain(self._news_read)
        if self._failure is not None:
            raise self._failure

    def _settle(self) -> None:
        """Waits until the listener has heard what was said so far, as long as it hears anything at all; but not for
        what is said meanwhile, or children that say more than it can hear would be waited for until they end."""
        self._settling = True
        said = self._relay.put
        try:
            while (before := self._relay.passed_on) < said:
                self._wait(lambda: self._relay.passed_on != before, PATIENCE_S)
                if self._relay.passed_on == before:
                    return
        finally:
            self._settling = False

    def _passed_on(self) -> None:
        if self._settling:
            self._tell_owner()

    # The supervisor's thread

    def _run(self) -> None:
        try:
            looked_at = time.monotonic()
            while not (self._stopping and not self._children):
                now = time.monotonic()
                left = min(self._kill_at, looked_at + LOOK_S, *(when for when, _ in self._to_start.values())) - now
                for key, _ in self._selector.select(max(0.0, left)):
                    if self._selector.get_map().get(key.fileobj) is key:  # else its child has ended just now
                        key.data()
                now = time.monotonic()
                if now >= self._kill_at:
                    self._kill_at = now + self._grace_s
                    for child in self._children.values():
                        if child.asked_to_end:
                            child.kill()
                for when, spec in list(self._to_start.values()):
                    if now >= when:
                        del self._to_start[spec.name]
                        self._start(spec)
                if now >= looked_at + LOOK_S:
                    # If it was us who stood still, the children may have as well.
                    self._look_for_hung(now, forgiven=max(0.0, now - looked_at - 2 * LOOK_S))
                    looked_at = now
        except Exception as error:  # noqa: BLE001  (an error of ours: the owner raises it, and no child stays behind)
            self._failure = error
            for child in self._children.values():
                child.kill()
                child.reap()
            self._tell_owner()
        finally:
            self._selector.close()

    def _serve_requests(self) -> None:
        _drain(self._wake_read)
        while self._requests:
            self._requests.popleft()()

    def _start(self, spec: ChildSpec) -> None:
        if self._stopping:
            return
        if spec.restart is not None:
            self._histories.setdefault(spec.name, RestartHistory(spec.restart))
        try:
            child = Child(spec)
        except OSError as error:
            self._lose(spec, ChildDied(spec.name, f"could not be started: {error.strerror}", [], ""))
            return
        self._children[spec.name] = child
        for fd, on_data in (
            (child.output, lambda: self._heard_output(child)),
            (child.statuses, lambda: self._heard_status(child)),
            (child.pidfd, lambda: self._ended(child)),
        ):
            self._selector.register(fd, selectors.EVENT_READ, on_data)

    def _heard_output(self, child: Child) -> bool:
        data = read_now(child.output)
        if data is None:
            return False
        for line in child.lines(data):
            self._relay.output(child.spec.name, line)
        if not data:
            self._selector.unregister(child.output)
        return bool(data)

    def _heard_status(self, child: Child) -> bool:
        data = read_now(child.statuses)
        if data is None:
            return False
        for status in child.status_lines.feed(data):
            if not isinstance(status, Alive):
                self._relay.status(child.spec.name, status)
            self._note(child, status)
        if not data:
            self._selector.unregister(child.statuses)
        return bool(data)

    def _note(self, child: Child, status: Status) -> None:
        name, now = child.spec.name, time.monotonic()
        match status:
            case Ready():
                child.is_ready, child.heard_at = True, now
                if name in self._histories:
                    self._histories[name].ready(now)
                self.ready[name] = status
                self._tell_owner()
            case Alive():
                child.heard_at = now
                for other in self._children.values():
                    if other.spec.known_to == name and other.is_ready and status.workers is not None:
                        if other.process.pid in status.workers:
                            other.unknown_since = None
                        elif other.unknown_since is None:
                            other.unknown_since = now
            case Drained():
                child.drained = True
            case Failed():
                child.told = status.message

    def _look_for_hung(self, now: float, forgiven: float) -> None:
        """Kills children that do not work though they live. `forgiven`: seconds that do not count, of the last."""
        for child in self._children.values():
            spec = child.spec
            child.started_at += forgiven
            child.heard_at += forgiven
            if child.unknown_since is not None:
                child.unknown_since += forgiven
            if child.asked_to_end or child.verdict:
                continue
            history = self._histories.get(spec.name)
            if child.is_ready and spec.silence_s is not None and now - child.heard_at > spec.silence_s:
                child.verdict = f"gave no sign of life for {now - child.heard_at:.1f} s"
            elif child.unknown_since is not None and now - child.unknown_since > UNKNOWN_S:
                child.verdict = f"was given up by the {spec.known_to} for {now - child.unknown_since:.1f} s"
            elif (
                not child.is_ready
                and spec.ready_within_s is not None
                and (history is not None and history.failures)  # a first start is waited for by the owner
                and now - child.started_at > spec.ready_within_s
            ):
                child.verdict = f"was not ready {now - child.started_at:.1f} s after it was started again"
            if child.verdict:
                child.kill()

    def _ended(self, child: Child) -> None:
        child.kill()  # and with it whatever it started, which may hold the pipes open
        while child.output in self._selector.get_map() and self._heard_output(child):
            pass
        while child.statuses in self._selector.get_map() and self._heard_status(child):
            pass
        for line in child.lines(b"\n") if child.unfinished else ():
            self._relay.output(child.spec.name, line)
        for fd in (child.output, child.statuses, child.pidfd):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        name = child.spec.name
        del self._children[name]
        self.ready.pop(name, None)
        for other in self._children.values():
            if other.spec.known_to == name:
                other.unknown_since = None  # nobody can say now
        how = child.reap()
        if self._stopping:
            self._ask_to_end()
        elif child.drained:
            self._relay.output(LAUNCHER, f"{name} was drained and has ended")
        else:
            self._lose(child.spec, ChildDied(name, how, list(child.words), child.told))

    def _lose(self, spec: ChildSpec, death: ChildDied) -> None:
        """A child ended that nobody had asked to: it is started again, or everything ends."""
        history = self._histories.get(spec.name)
        delay_s = None if history is None else history.ended(time.monotonic())
        if delay_s is None:
            if history is not None and history.failures > 1:
                how = f"{death.how}, the last of {history.failures} early ends in a row"
                death = ChildDied(death.name, how, death.words, death.told)
            self._die(death)
            return
        self._to_start[spec.name] = (time.monotonic() + delay_s, spec)
        reason = f": {death.told}" if death.told else ""
        self._relay.output(LAUNCHER, f"{spec.name} {death.how}{reason}; starting it again in {delay_s:g} s")

    def _die(self, death: ChildDied) -> None:
        first, self.death = self.death is None, self.death or death
        self._begin_stop(GRACE_S)
        self._tell_owner()
        if first and self._on_death is not None:
            self._on_death(death)

    def _begin_stop(self, grace_s: float) -> None:
        self._stopping = True
        self._to_start.clear()
        self._grace_s = min(self._grace_s, grace_s)
        self._ask_to_end()

    def _ask_to_end(self) -> None:
        """SIGTERM to those whose turn it is."""
        left = list(self._children.values())
        turn = [child for child in left if child.spec.first] or [child for child in left if not child.spec.last] or left
        for child in turn:
            if not child.asked_to_end:
                child.asked_to_end = True
                child.process.terminate()
                grace_s = max(self._grace_s, child.spec.grace_s) if self.death is None else self._grace_s
                self._kill_at = time.monotonic() + grace_s

    def _tell_owner(self) -> None:
        try:
            os.write(self._news_write, b"!")
        except BlockingIOError:
            return  # the pipe is full of older news: the owner will wake up


def _drain(fd: int) -> None:
    while read_now(fd):
        pass


class PassThrough:
    """A listener that copies what children write to our stderr, and keeps quiet about the rest."""

    def status(self, name: str, status: Status) -> None:
        """Not shown."""

    def output(self, name: str, line: str) -> None:
        """To stderr, with the child's name."""
        say(f"[{name}] {line}")
