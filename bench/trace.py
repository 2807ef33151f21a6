"""Who did what when, in one system or several: a trace for Perfetto (ui.perfetto.dev) or chrome://tracing, and a
picture of a few steps. Both are made of the files that processes leave in their `--trace-dir`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol.errors import ConfigurationError
from ..protocol.tracing import SPAN, Traced, Track, read
from .report import check_writable, require_matplotlib


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files that a benchmark is to write: a trace, a picture, both or none."""

    trace: str | None
    timeline: str | None

    def __bool__(self) -> bool:
        return self.trace is not None or self.timeline is not None

    def check(self, connect: str | None) -> None:
        """Raises ConfigurationError before anything is measured that could not be traced or drawn."""
        if self and connect is not None:
            raise ConfigurationError(
                "--trace and --timeline need a system of their own, and --connect names a running one; start that with "
                "--trace-dir instead"
            )
        check_writable(("--trace", self.trace), ("--timeline", self.timeline))
        if self.timeline is not None:
            require_matplotlib("--timeline")

    def write(self, systems: Sequence[SystemTrace]) -> None:
        if self.trace is not None:
            write_chrome(self.trace, systems)
        if self.timeline is not None:
            draw(self.timeline, systems)


COMPUTE = ("stream: compute", "compute thread")
"""Tracks of what a worker's device computes."""
WHOLE_STEP = "step"
PICTURED_STEPS = 5


@dataclass(frozen=True, slots=True)
class Span:
    """Times in ns of CLOCK_MONOTONIC; `step` is -1 where there is none."""

    kind: str
    step: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SystemTrace:
    """What the processes of one system did."""

    name: str
    processes: list[Traced]

    @property
    def compute(self) -> Track | None:
        """The track of a worker's device; the first worker's, by name."""
        tracks = [track for process in self.processes for track in process.tracks if track.name in COMPUTE]
        return tracks[0] if tracks else None


def load(name: str, directory: Path) -> SystemTrace:
    """A system's trace, its scheduler first. Raises ConfigurationError for a file that is none."""
    return SystemTrace(name, sorted(read(directory), key=lambda one: (one.process != "scheduler", one.process)))


def spans(track: Track) -> list[Span]:
    """A track's spans, by their starts; of those that start together the longest first."""
    found = [Span(track.kinds[kind], step, start, end) for kind, step, start, end in SPAN.iter_unpack(track.spans())]
    return sorted(found, key=lambda span: (span.start, -span.end))


def write_chrome(path: str, systems: Sequence[SystemTrace]) -> None:
    """One file for all systems, in the trace event format. Raises ConfigurationError if it cannot be written."""
    of_all = [
        span for system in systems for process in system.processes for one in process.tracks for span in spans(one)
    ]
    zero = min((span.start for span in of_all), default=0)
    events = [event for system in systems for event in _events(system, zero, several=len(systems) > 1)]
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            json.dump({"displayTimeUnit": "ns", "traceEvents": events}, file, separators=(",", ":"))
    except OSError as error:
        raise ConfigurationError(f"--trace: cannot write {path}: {error.strerror}") from error


def _events(system: SystemTrace, zero: int, *, several: bool) -> Iterator[dict[str, Any]]:
    for order, process in enumerate(system.processes):
        of_process = {"pid": process.pid, "ph": "M"}
        name = f"{process.process} ({system.name})" if several else process.process
        yield {**of_process, "name": "process_name", "args": {"name": name}}
        yield {**of_process, "name": "process_sort_index", "args": {"sort_index": order}}
        for number, track in enumerate(process.tracks):
            yield {**of_process, "tid": number, "name": "thread_name", "args": {"name": track.name}}
            yield {**of_process, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}}
            for span in spans(track):
                event: dict[str, Any] = {"ph": "X", "pid": process.pid, "tid": number, "name": span.kind}
                event |= {"ts": (span.start - zero) / 1e3, "dur": (span.end - span.start) / 1e3}
                if span.step >= 0:
                    event["args"] = {"step": span.step}
                yield event


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(path: str, systems: Sequence[SystemTrace]) -> None:
    """A panel for each system, one below the other, with equal scales: some steps from the middle of its life. Each
    step has a colour, in every track. Raises ConfigurationError if there is nothing to see, or it cannot be written."""
    windows = {system.name: _window(system) for system in systems}
    rows = [_rows(system) for system in systems]
    heights = [len(one) for one in rows]
    figure = import_module("matplotlib.figure").Figure(figsize=(12, 1.2 + 0.34 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(systems), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    width_ms = max(end - start for start, end in windows.values()) / 1e6
    colours = import_module("matplotlib").colormaps["tab10"].colors
    for panel, system, tracks in zip(panels, systems, rows, strict=True):
        start = windows[system.name][0]
        for row, (_, track) in enumerate(tracks):
            _draw_track(panel, len(tracks) - 1 - row, [one for one in spans(track) if one.end > start], start, colours)
        panel.set(xlim=(0, width_ms), ylim=(-0.6, len(tracks) - 0.4), title=system.name)
        panel.set_yticks(range(len(tracks) - 1, -1, -1), [name for name, _ in tracks])
        panel.set_xlabel("ms")
        panel.grid(axis="x", alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--timeline: cannot write {path}: {error}") from error


def _rows(system: SystemTrace) -> list[tuple[str, Track]]:
    """Names and tracks that have anything to show, from top to bottom: of the scheduler and of one worker."""
    worker = next((one for one in system.processes if any(track is system.compute for track in one.tracks)), None)
    shown = [one for one in system.processes if one.process == "scheduler" or one is worker]
    names = {"scheduler's socket for workers": "socket", "scheduler's sockets for clients": "clients"}
    return [
        (f"{'scheduler' if process.process == 'scheduler' else 'worker'}: {names.get(track.name, track.name)}", track)
        for process in shown
        for track in process.tracks
        if track.spans()
    ]


def _window(system: SystemTrace) -> tuple[int, int]:
    """From a little before a step in the middle to the end of the few that follow it."""
    compute = system.compute
    steps = [] if compute is None else [span for span in spans(compute) if span.kind == WHOLE_STEP]
    if not steps:
        raise ConfigurationError(f"{system.name}: no step was traced, so there is nothing to draw")
    first = max(0, (len(steps) - PICTURED_STEPS) // 2)
    shown = steps[first : first + PICTURED_STEPS]
    # The typical step sets the scale: one that was held up elsewhere would make all the others too small to see.
    typical = int(np.median([span.end - span.start for span in shown])) * (PICTURED_STEPS + 1)
    return shown[0].start - typical // 20, min(shown[-1].end, shown[0].start + 4 * typical)


def _draw_track(panel: Any, row: int, found: Sequence[Span], start: int, colours: Sequence[Any]) -> None:
    for span in found:
        if span.kind == WHOLE_STEP:
            continue  # its parts are drawn
        left, width = (span.start - start) / 1e6, max(span.end - span.start, 1) / 1e6
        grey = "0.6"
        colour = colours[span.step % len(colours)] if span.step >= 0 else grey
        # A part that samples is paler than the forward pass before it.
        pale = 0.55 if span.kind in ("sampling", "commit", "receive result", "receive plan") else 1.0
        panel.barh(row, width, left=left, height=0.72, color=colour, alpha=pale, edgecolor=colour, linewidth=0.4)
