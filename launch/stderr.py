"""Our stderr for a thread that may be left behind in the middle of a write."""

from __future__ import annotations

import io
import sys
from functools import cache
from typing import Any, TextIO


def lockless_stderr() -> TextIO:
    """`sys.stderr`; but where that is the process's own, one that writes to the same descriptor without a buffer.

    The buffer has a lock, and the interpreter aborts at its end if a daemon thread holds that: a thread that writes to
    a pipe which nobody reads does.
    """
    own = sys.__stderr__
    if own is None or sys.stderr is not own or type(own.buffer) not in (io.BufferedWriter, io.FileIO):
        return sys.stderr  # a notebook's, or a test's
    return _unbuffered(own.fileno(), own.encoding, own.errors)


def say(line: str) -> None:
    """Writes a line to stderr. Says nothing if stderr is gone."""
    try:
        file = lockless_stderr()
        file.write(line + "\n")  # in one piece: others write there too
        file.flush()
    except (OSError, ValueError):
        return


class _Whole(io.FileIO):
    """Writes all it is given: a signal may end a write to a pipe early, and a TextIOWrapper drops what is left then."""

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while len(left):
            written = super().write(left)
            if written is None:  # a descriptor that does not block takes no more
                break
            left = left[written:]
        return size - len(left)


@cache
def _unbuffered(fd: int, encoding: str, errors: str | None) -> TextIO:
    raw = _Whole(fd, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, write_through=True)  # as `python -u` does
