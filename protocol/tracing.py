"""When a process did what, for a picture of all of them on one clock.

A process has tracks, one for each thread or device stream; a track has spans, written by one thread into a ring that is
allocated once. When the process ends, they become a file in the directory that `--trace-dir` names. All processes of a
machine share the clock (CLOCK_MONOTONIC), so their files lie over each other; bench/trace.py puts them together.

Without a directory tracks are OFF, whose methods do nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgpack

from .errors import ConfigurationError

log = logging.getLogger(__name__)

CAPACITY: Final = 32_768
"""Spans of a track that are kept, the newest."""
SUFFIX: Final = ".trace"
SPAN: Final = struct.Struct("<qqqq")
"""Kind, step (-1: none), start and end in ns of CLOCK_MONOTONIC."""
_MOST_BYTES: Final = 256 << 20


class Track:
    """Spans of one thread or stream. `kinds` names what its spans may be; a span has the kind's index. Another thread
    that stands in for it may write too."""

    on: bool = True

    def __init__(self, name: str, kinds: tuple[str, ...]) -> None:
        self.name = name
        self.kinds = kinds
        self._ring = bytearray(SPAN.size * CAPACITY)
        self._next = itertools.count().__next__

    def start(self) -> int:
        """The time, for `end`."""
        return time.monotonic_ns()

    def end(self, kind: int, step: int, start: int) -> int:
        """Something that began at `start` is over. Returns the time: the start of what follows it."""
        now = time.monotonic_ns()
        self.add(kind, step, start, now)
        return now

    def add(self, kind: int, step: int, start: int, end: int) -> None:
        SPAN.pack_into(self._ring, self._next() % CAPACITY * SPAN.size, kind, step, start, end)

    def spans(self) -> bytes:
        """Those that are kept, oldest first."""
        count = self._next()
        self._next = itertools.count(count).__next__
        used = SPAN.size * min(count, CAPACITY)
        oldest = SPAN.size * (count % CAPACITY) if count > CAPACITY else 0
        return bytes(self._ring[oldest:used] + self._ring[:oldest])


class _Off(Track):
    on = False

    def __init__(self) -> None:
        self.name, self.kinds = "", ()

    def start(self) -> int:
        return 0

    def end(self, kind: int, step: int, start: int) -> int:
        return 0

    def add(self, kind: int, step: int, start: int, end: int) -> None:
        """Nothing is kept."""


OFF: Final[Track] = _Off()


class Tracer:
    """The tracks of a process. Without a directory, all of them are OFF and nothing is written."""

    def __init__(self, process: str, directory: str | None) -> None:
        """Raises ConfigurationError if nothing can be written there; a directory that is missing is made."""
        self._process = process
        self._directory = None if directory is None else Path(directory)
        self._tracks: list[Track] = []
        if self._directory is not None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(f"--trace-dir {directory}: cannot make it: {error.strerror}") from error
            if not os.access(self._directory, os.W_OK | os.X_OK):
                raise ConfigurationError(f"--trace-dir {directory}: cannot be written to")

    @property
    def on(self) -> bool:
        return self._directory is not None

    def track(self, name: str, *kinds: str) -> Track:
        """A new one; the picture shows them in the order in which they were made."""
        if self._directory is None:
            return OFF
        made = Track(name, kinds)
        self._tracks.append(made)
        return made

    def write(self) -> None:
        """Writes the file. What goes wrong is logged: the process ends anyhow."""
        if self._directory is None:
            return
        tracks = [{"name": one.name, "kinds": list(one.kinds), "spans": one.spans()} for one in self._tracks]
        path = self._directory / f"{self._process.replace('/', '_')}-{os.getpid()}{SUFFIX}"
        try:
            path.write_bytes(msgpack.packb({"process": self._process, "pid": os.getpid(), "tracks": tracks}))
        except OSError:
            log.exception("the trace cannot be written")


@dataclass(frozen=True, slots=True)
class Traced:
    """A process's file."""

    process: str
    pid: int
    tracks: list[Track] = field(default_factory=list)


NO_TRACER: Final = Tracer("", None)


def read(directory: Path) -> list[Traced]:
    """All processes' traces in a directory, by name. Raises ConfigurationError for a file that is none."""
    found = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            data = msgpack.unpackb(path.read_bytes(), max_bin_len=_MOST_BYTES)
            traced = Traced(data["process"], data["pid"])
            for one in data["tracks"]:
                track = Track(one["name"], tuple(one["kinds"]))
                for span in SPAN.iter_unpack(one["spans"]):
                    track.add(*span)
                traced.tracks.append(track)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise ConfigurationError(f"{path} is no trace: {error!r}") from error
        found.append(traced)
    return found
