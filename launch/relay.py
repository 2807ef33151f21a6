"""Between a supervisor and its listener: the supervisor goes on however long the listener takes.

A terminal that is stopped by Ctrl-S, or a pipe that nobody reads, holds whoever writes to it. That must not be the
thread that starts dead workers again, so a thread of its own calls the listener.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from .status import Status

MOST_CHARACTERS = 4 << 20
"""How much may wait for the listener; what comes on top is left out and counted."""
OWN_CHARACTERS = 100
"""What a status counts for, and a line beside its characters, of which it may have none."""
PATIENCE_S = 1.0
"""How long a listener that does not return is waited for."""
LAUNCHER = "launcher"
"""The name under which the supervisor itself tells the listener what it does."""


class Listener(Protocol):
    """Hears what the children say, in one thread of the supervisor's; may block, and then misses what does not fit."""

    def status(self, name: str, status: Status) -> None:
        """A status line of a child; not each sign of life."""

    def output(self, name: str, line: str) -> None:
        """A line that a child wrote to stdout or stderr, without its end."""


class Relay:
    """A listener that passes on to another, in order, and never blocks the one who speaks."""

    def __init__(self, listener: Listener, on_passed: Callable[[], None]) -> None:
        """`on_passed` is called whenever the listener has heard something, in the thread that it hears it in."""
        self._listener = listener
        self._on_passed = on_passed
        self._waiting: deque[tuple[str, Status | str]] = deque()
        self._characters = 0
        self._left_out = 0
        self._put = 0
        self._passed_on = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tandem-listener", daemon=True)
        self._thread.start()

    def status(self, name: str, status: Status) -> None:
        """Left out if too much waits."""
        with self._changed:
            self._add(name, status)

    def output(self, name: str, line: str) -> None:
        """Left out if too much waits; the listener is told how many lines were as soon as there is room again."""
        with self._changed:
            if (self._left_out and not self._tell_left_out()) or not self._add(name, line):
                self._left_out += 1

    @property
    def passed_on(self) -> int:
        """How much the listener has heard. Takes no lock, nor does `put`: an interrupt may come at any moment."""
        return self._passed_on

    @property
    def put(self) -> int:
        """How much was said that the listener has heard or will hear."""
        return self._put

    def close(self) -> None:
        """Ends the thread when the listener has heard everything; leaves it behind if the listener keeps it for longer
        than PATIENCE_S with one thing. Not to be interrupted."""
        with self._changed:
            if self._left_out:
                self._tell_left_out()
            self._closing = True
            self._changed.notify()
        while self._thread.is_alive():
            before = self._passed_on
            self._thread.join(PATIENCE_S)
            if self._passed_on == before:
                return

    def _tell_left_out(self) -> bool:
        if not self._add(LAUNCHER, f"{self._left_out} lines left out here: nobody read them"):
            return False
        self._left_out = 0
        return True

    def _add(self, name: str, said: Status | str) -> bool:
        characters = _characters(said)
        if self._characters + characters > MOST_CHARACTERS:
            return False
        self._waiting.append((name, said))
        self._characters += characters
        self._put += 1
        self._changed.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                name, said = self._waiting.popleft()
                self._characters -= _characters(said)
            if isinstance(said, str):
                self._listener.output(name, said)
            else:
                self._listener.status(name, said)
            self._passed_on += 1
            self._on_passed()


def _characters(said: Status | str) -> int:
    return OWN_CHARACTERS + (len(said) if isinstance(said, str) else 0)
