"""Running the `tandem` command as a user does, and looking at what it leaves behind."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

DEADLINE_S = 90.0
"""A worker imports torch before it is ready; two of them on a busy machine take their time."""


class Command:
    """A running `tandem …`, with what it has written so far."""

    def __init__(self, arguments: list[str], environment: dict[str, str], stdin: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tandem.launch.cli", *arguments],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        self.output = ""

    def wait_for(self, text: str, deadline_s: float = DEADLINE_S) -> str:
        """Reads until `text` has been written; raises TimeoutError, or EOFError if the command ends before."""
        assert self.process.stdout is not None
        end = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while text not in self.output:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"{text!r} was not written within {deadline_s:g} s, but:\n{self.output}")
                data = os.read(self.process.stdout.fileno(), 65_536)
                if not data:
                    raise EOFError(f"the command ended without writing {text!r}, but:\n{self.output}")
                self.output += data.decode(errors="replace")
        return self.output

    def write(self, text: str) -> None:
        """Sends a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def finish(self, deadline_s: float = DEADLINE_S) -> int:
        """Reads to the end and returns the exit code."""
        rest, _ = self.process.communicate(timeout=deadline_s)
        self.output += rest.decode(errors="replace")
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def tandem(*arguments: str, environment: dict[str, str], stdin: bool = False) -> Iterator[Command]:
    """Runs `tandem arguments…`; kills it if the test leaves it running."""
    command = Command(list(arguments), environment, stdin)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
        command.process.communicate()


def gone(processes: list[psutil.Process], deadline_s: float = 20.0) -> bool:
    """Whether all of them end in time."""
    return not psutil.wait_procs(processes, timeout=deadline_s)[1]


def files_below(folder: Path) -> list[str]:
    """Every file, socket and directory below a folder that is left."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
