"""Progress on stderr: bars on a terminal, plain lines elsewhere. Shows processes that start, and batches of prompts."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..protocol.logs import json_line
from .relay import PATIENCE_S
from .status import Progress as StageProgress
from .status import Ready, Status
from .stderr import lockless_stderr, say


class StartDisplay:
    """A supervisor's listener: a bar for each stage of each process that starts, and what the processes write.

    Used in a `with` block while a system starts; afterwards it only passes on what the processes write. On a terminal
    the bars vanish when the block ends. `quiet` shows no stages, but still what the processes write. With `as_json`,
    which is for processes that log so, each line is an object: theirs as they are, and what has another form (a stage,
    what the launcher does, a crash's last words) as the message of one.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self._console = Console(file=lockless_stderr(), highlight=False)
        self._quiet = quiet
        self._as_json = as_json
        self._lock = threading.Lock()  # the supervisor's thread speaks while the owner's opens and closes the bars
        self._bars: Progress | None = None
        self._tasks: dict[str, tuple[str, TaskID]] = {}
        self._said: dict[str, str] = {}

    def __enter__(self) -> StartDisplay:
        if self._console.is_terminal and not self._quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[share]}"))
            with self._lock:
                self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
                self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._lock.acquire(timeout=PATIENCE_S):
            return  # nobody reads what we write, and what comes next must not wait for it
        try:
            if self._bars is not None:
                self._bars.stop()
            self._bars = None
            self._tasks.clear()
        finally:
            self._lock.release()

    def status(self, name: str, status: Status) -> None:
        """A status line of a process; called in the supervisor's thread for that."""
        with self._lock:
            if self._quiet or not isinstance(status, StageProgress | Ready):
                return  # a failure is reported by whoever waits for the process
            if self._bars is not None:
                self._draw(self._bars, name, status)
            elif not self._console.is_terminal:
                self._say(name, status)

    def output(self, name: str, line: str) -> None:
        """A line that a process wrote; called in the supervisor's thread for that."""
        with self._lock:
            try:
                self._console.print(
                    Text(self._as_object(name, line) if self._as_json else f"[{name}] {line}"), soft_wrap=True
                )
            except (OSError, ValueError):
                return  # our own stderr is gone: nobody is left to read

    def _as_object(self, name: str, line: str) -> str:
        return line if _is_object(line) else json_line(name, line, "output")

    def _draw(self, bars: Progress, name: str, status: StageProgress | Ready) -> None:
        stage = "ready" if isinstance(status, Ready) else status.stage
        done = 1.0 if isinstance(status, Ready) else status.done
        old = self._tasks.get(name)
        if old is None or old[0] != stage:
            if old is not None:
                bars.remove_task(old[1])
            task = bars.add_task(f"{name}: {stage}", total=1.0 if done is not None else None, share="")
            self._tasks[name] = (stage, task)
        task = self._tasks[name][1]
        if done is None:
            bars.update(task, total=None, share="")
        else:
            bars.update(task, total=1.0, completed=done, share=f"{done:4.0%}")

    def _say(self, name: str, status: StageProgress | Ready) -> None:
        """A line when a stage begins, and when the process is ready: not one for each percent."""
        stage = "ready" if isinstance(status, Ready) else status.stage
        if self._said.get(name) != stage:
            self._said[name] = stage
            note(json_line(name, stage, "start") if self._as_json else f"{name}: {stage}")


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def note(text: str) -> None:
    """A line of ours on stderr. Says nothing if stderr is gone."""
    say(text)


class PromptCount:
    """How many of a batch's prompts are done, and how fast tokens come."""

    def __init__(self, bars: Progress | None, total: int) -> None:
        self._bars = bars
        self._total = total
        self._done = 0
        self._task = None if bars is None else bars.add_task("prompts", total=total)

    def one_done(self) -> None:
        """One more prompt is answered."""
        self._done += 1
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done)
        elif self._done == self._total or self._done % max(1, self._total // 10) == 0:
            note(f"{self._done} of {self._total} prompts answered")


@contextmanager
def prompt_bar(total: int) -> Iterator[PromptCount]:
    """Counts answered prompts while the block runs: a bar on a terminal, at most about ten lines elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield PromptCount(None, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Answers that go to the terminal must appear above the bar; those that go to a file must not be touched.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bars:
        yield PromptCount(bars, total)
