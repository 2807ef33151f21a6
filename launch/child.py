"""One child process: how it is started, the pipes that it speaks through, its last words, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from .restarts import RestartPolicy
from .status import StatusLines
from .tether import command

LAST_WORDS_LINES = 30
LONGEST_LINE_BYTES = 65_536


@dataclass(frozen=True)
class ChildSpec:
    """A process to start: `python -m module arguments…`, with `--status-fd N` added, and `environment` on top of ours.

    `name` must differ from the names of the supervisor's other children.
    """

    name: str
    module: str
    arguments: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    first: bool = False
    """Asked to end before all others, which are asked once it has ended."""
    last: bool = False
    """Asked to end only when all others have ended."""
    grace_s: float = 0.0
    """How long it may at least take to end, if that is more than the supervisor gives every child."""
    restart: RestartPolicy | None = None
    """Whether it is started again when it ends unasked; else that ends everything."""
    ready_within_s: float | None = None
    """A child that was started *again* and is not ready by then is killed."""
    silence_s: float | None = None
    """A child that was ready and has not said for so long that it is alive is killed."""
    known_to: str | None = None
    """The child whose word it is whether this one works. If that says for UNKNOWN_S that it does not know this one's
    process id, this one is killed."""


def _with_docstrings() -> dict[str, str]:
    """transformers builds its own from them: under PYTHONOPTIMIZE=2, which takes them away, it loads no model."""
    return {"PYTHONOPTIMIZE": "1"} if sys.flags.optimize > 1 or os.environ.get("PYTHONOPTIMIZE", "") > "1" else {}


class Child:
    """A running child: its process, the pipes that it speaks through, and its last words."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.status_lines = StatusLines()
        self.words: deque[str] = deque(maxlen=LAST_WORDS_LINES)
        self.told = ""
        self.asked_to_end = False
        self.drained = False
        self.verdict = ""
        """Why it was killed, if it was."""
        self.started_at = time.monotonic()
        self.is_ready = False
        self.heard_at = self.started_at
        """When it last said that it is alive, or was ready."""
        self.unknown_since: float | None = None
        """Since when the child that should know it does not."""
        self.unfinished = b""
        self.output, output_write = os.pipe2(os.O_CLOEXEC)
        self.statuses, status_write = os.pipe2(os.O_CLOEXEC)
        try:
            self.process = subprocess.Popen(
                command(spec.module, [*spec.arguments, "--status-fd", str(status_write)]),
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=(status_write,),
                process_group=0,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **_with_docstrings(), **spec.environment},
            )
        except OSError:
            os.close(self.output)
            os.close(self.statuses)
            raise
        finally:
            os.close(output_write)
            os.close(status_write)
        os.set_blocking(self.output, False)
        os.set_blocking(self.statuses, False)
        self.pidfd = os.pidfd_open(self.process.pid)

    def lines(self, data: bytes) -> list[str]:
        """The lines that `data` completes; they become the last words."""
        *whole, self.unfinished = (self.unfinished + data).split(b"\n")
        if len(self.unfinished) > LONGEST_LINE_BYTES:
            whole.append(self.unfinished)
            self.unfinished = b""
        lines = [line.decode(errors="replace").rstrip("\r") for line in whole]
        self.words.extend(lines)
        return lines

    def kill(self) -> None:
        """SIGKILL to the child and whatever it started. It has not been reaped, so the id is still its own."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # the whole group is gone

    def reap(self) -> str:
        """Collects the dead child, and tells how it ended."""
        code = self.process.wait()
        os.close(self.output)
        os.close(self.statuses)
        os.close(self.pidfd)
        if self.verdict:
            return f"{self.verdict} and was killed"
        if code < 0:
            return f"was killed by {_signal_name(-code)}"
        return f"ended unexpectedly with exit code {code}"


def read_now(fd: int) -> bytes | None:
    """What can be read now; b"" at the end of the stream, None if there is nothing at the moment."""
    try:
        return os.read(fd, 65_536)
    except BlockingIOError:
        return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
