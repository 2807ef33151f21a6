"""Where steps run: CUDA streams, or on a CPU one thread that stands in for them.

Both keep the same promise: what is launched runs later, in launch order, while the launching thread goes on;
`StepEvent.wait` sleeps until a step's results are in host memory.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from ..protocol.tracing import NO_TRACER, OFF, Tracer, Track
from .device_clock import DeviceClock
from .staging import Lane


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Microseconds of device time."""

    busy_us: int
    """From the step's start to its end, less `held_us`."""
    gap_us: int
    """From the last step's end to this one's start; 0 for the first."""
    held_us: int
    """In which the step waited for the host, in `hold`."""


class StepEvent(Protocol):
    def wait(self) -> None:
        """Sleeps until the step's tokens are in its lane's host memory. Raises what the step raised."""
        ...

    def times(self) -> StepTimes:
        """After `wait`, once. May have to ask the device, which may be waiting for the host by then."""
        ...


class Executor(Protocol):
    def launch(self, lane: Lane, compute: Callable[[], None], sampled: int) -> StepEvent:
        """Queues a step: the lane's input to the device, then `compute`, then `sampled` tokens back. Does not wait for
        any of it, except for what `compute` lets `hold` wait for."""
        ...

    @property
    def holds_caller(self) -> bool:
        """`compute` runs on the thread that calls `launch`, and what `hold` waits for stops that."""
        ...

    def hold(self, until: Callable[[], None]) -> None:
        """For `compute`, at most once: the host has something to do before the rest of the step can run. `until`
        returns when it is done, or when it has queued that the device waits for it."""
        ...

    def close(self, timeout_s: float) -> None:
        """Waits for what was launched, for `timeout_s` at most: a step that hangs is left behind."""
        ...


STEP, COPY_IN, FORWARD, SAMPLING, COPY_OUT = range(5)
"""Kinds of spans of the tracks of a device, or of the thread that stands in for one."""
KINDS = ("step", "copy in", "forward", "sampling", "copy out")


def open_executor(device: torch.device, tracer: Tracer = NO_TRACER, nvtx: bool = False) -> Executor:
    """`nvtx`: steps and their parts become NVTX ranges (CUDA only)."""
    if device.type == "cuda":
        return CudaExecutor(device, tracer, nvtx)
    return ThreadExecutor(tracer.track("compute thread", *KINDS))


class ThreadExecutor:
    """One thread runs the steps in order. Inputs are copied when the step runs, as late as a CUDA stream might."""

    holds_caller = False

    def __init__(self, track: Track = OFF) -> None:
        self._track = track
        self._steps: queue.SimpleQueue[_ThreadStep | None] = queue.SimpleQueue()
        self._last_end = 0
        self._held_ns = 0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def launch(self, lane: Lane, compute: Callable[[], None], sampled: int) -> StepEvent:
        step = _ThreadStep(lane, compute, sampled, self._track)
        self._steps.put(step)
        return step

    def hold(self, until: Callable[[], None]) -> None:
        begin = time.perf_counter_ns()
        until()
        self._held_ns = time.perf_counter_ns() - begin

    def close(self, timeout_s: float) -> None:
        self._steps.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number for each thread that calls it
        while (step := self._steps.get()) is not None:
            start = time.perf_counter_ns()
            self._held_ns = 0
            step.run()
            end, held = time.perf_counter_ns(), self._held_ns
            gap = start - self._last_end if self._last_end else 0
            step.finish(StepTimes((end - start - held) // 1_000, gap // 1_000, held // 1_000))
            self._last_end = end


class _ThreadStep:
    def __init__(self, lane: Lane, compute: Callable[[], None], sampled: int, track: Track) -> None:
        self._track = track
        self._step = lane.step
        self._sampling_at = 0
        self._lane = lane
        self._compute = compute
        self._sampled = sampled
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._times = StepTimes(0, 0, 0)

    def run(self) -> None:
        track, step = self._track, self._step
        if track.on:
            self._lane.sampling_begins = self._sampling_begins
        try:
            begun = track.start()
            self._lane.send()
            copied = track.end(COPY_IN, step, begun)
            self._compute()
            at = track.start()
            track.add(FORWARD, step, copied, self._sampling_at or at)
            if self._sampling_at:
                track.add(SAMPLING, step, self._sampling_at, at)
            self._lane.fetch(self._sampled)
            track.end(COPY_OUT, step, at)
            track.end(STEP, step, begun)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._error = error

    def _sampling_begins(self) -> None:
        self._sampling_at = self._track.start()

    def finish(self, times: StepTimes) -> None:
        self._times = times
        self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error

    def times(self) -> StepTimes:
        return self._times


class CudaExecutor:
    """Three streams: inputs to the device, kernels, results back, tied by events."""

    def __init__(self, device: torch.device, tracer: Tracer = NO_TRACER, nvtx: bool = False) -> None:
        self._device = device
        self._nvtx = nvtx
        self._tracks = _StreamTracks(device, tracer) if tracer.on else None
        self._inputs = torch.cuda.Stream(device)
        self._compute = torch.cuda.Stream(device)
        self._results = torch.cuda.Stream(device)
        self._last_end: torch.cuda.Event | None = None
        self._held: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    holds_caller = True

    def hold(self, until: Callable[[], None]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # on the compute stream, behind the forward pass
        until()
        end.record()  # passed at once if the device comes here later than what it waits for
        self._held = begin, end

    def launch(self, lane: Lane, compute: Callable[[], None], sampled: int) -> StepEvent:
        traced = self._tracks is not None
        sampling = self._watch_sampling(lane)
        staged = torch.cuda.Event(enable_timing=traced)
        with torch.cuda.stream(self._inputs):
            copying = self._mark()
            lane.send()
            staged.record()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._held = None
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(staged)
            start.record()
            with self._ranges(lane.step) if self._nvtx else nullcontext():
                compute()
            end.record()
        done = torch.cuda.Event(enable_timing=traced, blocking=True)
        with torch.cuda.stream(self._results):
            self._results.wait_event(end)
            fetching = self._mark()
            lane.fetch(sampled)
            done.record()
        step = _CudaStep(self._last_end, start, end, done, self._held)
        if self._tracks is not None and copying is not None and fetching is not None:
            marks = _Marks(lane.step, copying, staged, start, sampling, end, fetching, done)
            step.on_done = partial(self._tracks.add, marks)
        self._last_end = end
        return step

    def _mark(self) -> torch.cuda.Event | None:
        """An event on the current stream, for the trace."""
        if self._tracks is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _watch_sampling(self, lane: Lane) -> list[torch.cuda.Event]:
        """Gets an event on the compute stream when the step's sampling begins, if that is traced."""
        marks: list[torch.cuda.Event] = []
        if self._tracks is not None or self._nvtx:

            def begins() -> None:
                if self._nvtx:
                    torch.cuda.nvtx.range_pop()
                    torch.cuda.nvtx.range_push("sampling")
                mark = self._mark()
                if mark is not None:
                    marks.append(mark)

            lane.sampling_begins = begins
        return marks

    @contextmanager
    def _ranges(self, step: int) -> Iterator[None]:
        """NVTX ranges of a step and of its two parts, the second of which begins with its sampling."""
        torch.cuda.nvtx.range_push(f"step {step}")
        torch.cuda.nvtx.range_push("forward")
        yield
        torch.cuda.nvtx.range_pop()
        torch.cuda.nvtx.range_pop()

    def close(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        try:
            while not self._results.query() and time.monotonic() < end:
                time.sleep(0.001)  # CUDA waits for an event, but not for a time
        except RuntimeError:
            return  # the device has failed, which a step has told; nothing runs there any more


@dataclass(frozen=True, slots=True)
class _Marks:
    """Events of a traced step, in the order in which they are passed."""

    step: int
    copying: torch.cuda.Event
    staged: torch.cuda.Event
    start: torch.cuda.Event
    sampling: list[torch.cuda.Event]
    """One or, if the step samples nothing, none."""
    end: torch.cuda.Event
    fetching: torch.cuda.Event
    done: torch.cuda.Event


class _StreamTracks:
    """A track for each CUDA stream. Written by the thread that waits for steps."""

    def __init__(self, device: torch.device, tracer: Tracer) -> None:
        self._inputs = tracer.track("stream: host to device", *KINDS)
        self._compute = tracer.track("stream: compute", *KINDS)
        self._results = tracer.track("stream: device to host", *KINDS)
        self._clock = DeviceClock(device)

    def add(self, marks: _Marks) -> None:
        """To be called when all of the step is over."""
        self._clock.renew()
        step, place = marks.step, self._clock.place
        start, end = place(marks.start), place(marks.end)
        self._inputs.add(COPY_IN, step, place(marks.copying), place(marks.staged))
        between = place(marks.sampling[0]) if marks.sampling else end
        self._compute.add(FORWARD, step, start, between)
        if marks.sampling:
            self._compute.add(SAMPLING, step, between, end)
        self._compute.add(STEP, step, start, end)
        self._results.add(COPY_OUT, step, place(marks.fetching), place(marks.done))


class _CudaStep:
    def __init__(
        self,
        last_end: torch.cuda.Event | None,
        start: torch.cuda.Event,
        end: torch.cuda.Event,
        done: torch.cuda.Event,
        held: tuple[torch.cuda.Event, torch.cuda.Event] | None,
    ) -> None:
        self._last_end = last_end
        self._start = start
        self._end = end
        self._done = done
        self._held = held
        self.on_done: Callable[[], None] | None = None

    def wait(self) -> None:
        self._done.synchronize()

    def times(self) -> StepTimes:
        if self.on_done is not None:
            self.on_done()
        gap_ms = 0.0 if self._last_end is None else self._last_end.elapsed_time(self._start)
        held_ms = 0.0 if self._held is None else self._held[0].elapsed_time(self._held[1])
        busy_ms = self._start.elapsed_time(self._end) - held_ms
        return StepTimes(*(max(0, int(ms * 1_000)) for ms in (busy_ms, gap_ms, held_ms)))
