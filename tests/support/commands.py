"""Running the `tandem` command as a user does, and looking at what it leaves behind."""

from __future__ import annotations

import errno
import os
import pty
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from support.deadlines import DEADLINE_S


class Command:
    """A running `tandem …`, with what it has written so far."""

    def __init__(self, arguments: list[str], environment: dict[str, str], *, stdin: bool, on_terminal: bool) -> None:
        self.output = ""
        inside = None
        if on_terminal:
            self._terminal, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tandem.launch.cli", *arguments],
            stdin=inside or (subprocess.PIPE if stdin else subprocess.DEVNULL),
            stdout=inside or subprocess.PIPE,
            stderr=inside or subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        if inside is not None:
            os.close(inside)
            self.process.stdin = open(os.dup(self._terminal), "wb")  # noqa: SIM115  (communicate() closes it)
            self.process.stdout = open(self._terminal, "rb")  # noqa: SIM115

    def wait_for(self, text: str, deadline_s: float = DEADLINE_S) -> str:
        """Reads until `text` has been written; raises TimeoutError, or EOFError if the command ends before."""
        return self._read_until(lambda: text in self.output, repr(text), deadline_s)

    def wait_for_more(self, deadline_s: float = DEADLINE_S) -> str:
        """Reads until anything has been written that was not read before."""
        length = len(self.output)
        return self._read_until(lambda: len(self.output) > length, "more", deadline_s)

    def _read_until(self, enough: Callable[[], bool], what: str, deadline_s: float) -> str:
        assert self.process.stdout is not None
        end = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not enough():
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"{what} was not written within {deadline_s:g} s, but:\n{self.output}")
                data = _read(self.process.stdout.fileno())
                if not data:
                    raise EOFError(f"the command ended without writing {what}, but:\n{self.output}")
                self.output += data.decode(errors="replace")
        return self.output

    def write(self, text: str) -> None:
        """Sends a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def finish(self, deadline_s: float = DEADLINE_S) -> int:
        """Reads to the end and returns the exit code."""
        assert self.process.stdout is not None
        if self.process.stdin is not None:
            self.process.stdin.close()
            self.process.stdin = None
        end = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while selector.select(max(0.0, end - time.monotonic())):
                data = _read(self.process.stdout.fileno())
                self.output += data.decode(errors="replace")
                if not data:
                    break
        return self.process.wait(max(0.1, end - time.monotonic()))

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def tandem(*arguments: str, environment: dict[str, str], stdin: bool = False) -> Iterator[Command]:
    """Runs `tandem arguments…`; kills it if the test leaves it running."""
    with _ending(Command(list(arguments), environment, stdin=stdin, on_terminal=False)) as command:
        yield command


@contextmanager
def terminal(*arguments: str, environment: dict[str, str]) -> Iterator[Command]:
    """The same on a terminal, from which it reads and to which it writes."""
    with _ending(Command(list(arguments), environment, stdin=True, on_terminal=True)) as command:
        yield command


@contextmanager
def _ending(command: Command) -> Iterator[Command]:
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
        command.process.wait()
        for pipe in (command.process.stdin, command.process.stdout):
            if pipe is not None:
                pipe.close()


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65_536)
    except OSError as error:
        if error.errno == errno.EIO:  # how a terminal says that the other end is closed
            return b""
        raise


def gone(processes: list[psutil.Process], deadline_s: float = DEADLINE_S) -> bool:
    """Whether all of them end in time."""
    return not psutil.wait_procs(processes, timeout=deadline_s)[1]


def files_below(folder: Path) -> list[str]:
    """Every file, socket and directory below a folder that is left."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
