"""Helper processes of the simulated cluster, and how the benchmark speaks with them.

The benchmark writes words, one a line, to a process's stdin: `begin` (forget what was measured so far) and `end`
(report and exit). The process writes JSON lines to its stdout: {"event": "ready"}, {"event": "report", …}. It also ends
when its stdin does, so it cannot outlive the benchmark.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Any, Self


class PartyError(RuntimeError):
    """A process of the cluster ended early or did not answer."""


class Party:
    """The benchmark's end: a process that runs `module` with its settings as a JSON argument."""

    def __init__(self, module: str, settings: dict[str, Any]) -> None:
        self._module = module
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def tell(self, word: str) -> None:
        """Raises PartyError if the process has ended."""
        pipe = self._process.stdin
        try:
            if pipe is not None:
                pipe.write(word.encode() + b"\n")
                pipe.flush()
        except OSError as error:
            raise PartyError(f"{self._module} has ended: {error.strerror}") from error

    def hear(self, event: str, deadline_s: float) -> dict[str, Any]:
        """What the process says next, which must be `event`. Raises PartyError if it ends or says nothing in time."""
        pipe = self._process.stdout
        if pipe is None:
            raise PartyError(f"{self._module} has no stdout")
        until = time.monotonic() + deadline_s
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                raise PartyError(f"{self._module} did not say {event!r} within {deadline_s:g} s")
            data = os.read(pipe.fileno(), 1 << 20)
            if not data:
                raise PartyError(f"{self._module} ended before it said {event!r}; its reason is on stderr")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if said.get("event") != event:
            raise PartyError(f"{self._module} said {said.get('event')!r}, not {event!r}")
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process, if it has not ended by itself."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # it ended before it read its last word
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Orders:
    """The process's own end. To be looked at whenever `fileno` is readable."""

    def __init__(self) -> None:
        self._unread = b""
        os.set_blocking(sys.stdin.fileno(), False)

    def fileno(self) -> int:
        return sys.stdin.fileno()

    def read(self) -> list[str]:
        """The words that have come; the last one is `end` if there will be no more."""
        try:
            data = os.read(self.fileno(), 4_096)
        except BlockingIOError:
            return []
        if not data:
            return ["end"]
        *words, self._unread = (self._unread + data).split(b"\n")
        return [word.decode() for word in words]

    @staticmethod
    def say(event: str, **details: Any) -> None:
        try:
            print(json.dumps({"event": event, **details}), flush=True)
        except BrokenPipeError:
            sys.exit(1)  # the benchmark is gone
