"""Where steps run: CUDA streams, or on a CPU one thread that stands in for them.

Both keep the same promise: what is launched runs later, in launch order, while the launching thread goes on;
`StepEvent.wait` sleeps until a step's results are in host memory.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

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
    def wait(self) -> StepTimes:
        """Sleeps until the step's tokens are in its lane's host memory. Raises what the step raised."""
        ...


class Executor(Protocol):
    def launch(self, lane: Lane, compute: Callable[[], None], sampled: int) -> StepEvent:
        """Queues a step: the lane's input to the device, then `compute`, then `sampled` tokens back. Does not wait for
        any of it, except for what `compute` calls `hold` for."""
        ...

    @property
    def holds_caller(self) -> bool:
        """`compute` runs on the thread that calls `launch`, and `hold` stops that."""
        ...

    def hold(self, until: Callable[[], None]) -> None:
        """For `compute`, at most once: the host has something to do before the rest of the step can be queued. `until`
        returns when it is done."""
        ...

    def close(self, timeout_s: float) -> None:
        """Waits for what was launched, for `timeout_s` at most: a step that hangs is left behind."""
        ...


def open_executor(device: torch.device) -> Executor:
    return CudaExecutor(device) if device.type == "cuda" else ThreadExecutor()


class ThreadExecutor:
    """One thread runs the steps in order. Inputs are copied when the step runs, as late as a CUDA stream might."""

    holds_caller = False

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[_ThreadStep | None] = queue.SimpleQueue()
        self._last_end = 0
        self._held_ns = 0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def launch(self, lane: Lane, compute: Callable[[], None], sampled: int) -> StepEvent:
        step = _ThreadStep(lane, compute, sampled)
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
    def __init__(self, lane: Lane, compute: Callable[[], None], sampled: int) -> None:
        self._lane = lane
        self._compute = compute
        self._sampled = sampled
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._times = StepTimes(0, 0, 0)

    def run(self) -> None:
        try:
            self._lane.send()
            self._compute()
            self._lane.fetch(self._sampled)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._error = error

    def finish(self, times: StepTimes) -> None:
        self._times = times
        self._done.set()

    def wait(self) -> StepTimes:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._times


class CudaExecutor:
    """Three streams: inputs to the device, kernels, results back, tied by events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
        end.record()  # passed at once if the forward pass is over by now: then the device has waited in between
        self._held = begin, end

    def launch(self, lane: Lane, compute: Callable[[], None], sampled: int) -> StepEvent:
        staged = torch.cuda.Event()
        with torch.cuda.stream(self._inputs):
            lane.send()
            staged.record()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._held = None
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(staged)
            start.record()
            compute()
            end.record()
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._results):
            self._results.wait_event(end)
            lane.fetch(sampled)
            done.record()
        step = _CudaStep(self._last_end, start, end, done, self._held)
        self._last_end = end
        return step

    def close(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        try:
            while not self._results.query() and time.monotonic() < end:
                time.sleep(0.001)  # CUDA waits for an event, but not for a time
        except RuntimeError:
            return  # the device has failed, which a step has told; nothing runs there any more


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

    def wait(self) -> StepTimes:
        self._done.synchronize()
        gap_ms = 0.0 if self._last_end is None else self._last_end.elapsed_time(self._start)
        held_ms = 0.0 if self._held is None else self._held[0].elapsed_time(self._held[1])
        busy_ms = self._start.elapsed_time(self._end) - held_ms
        return StepTimes(*(max(0, int(ms * 1_000)) for ms in (busy_ms, gap_ms, held_ms)))
