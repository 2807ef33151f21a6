"""A worker whose GPU is watched by torch.profiler on demand: `python -m tandem.bench.kernel_gaps OUT SECONDS …`, the
rest as for `tandem.worker.main`. It serves as any worker does.

SIGUSR1 starts the watch. After SECONDS, OUT (JSON) tells for which share of the time no kernel ran, in gaps of over
10 µs: what the workers' own count of idle time between steps is to be compared with.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from ..worker.main import main as worker_main

GAP_NS: Final = 10_000
"""Shorter gaps are how kernels follow each other."""


def idle_share(kernels: Iterable[tuple[int, int]]) -> dict[str, float]:
    """Of kernels (start, end) in nanoseconds: the time from the first to the last in seconds, how many, the share of it
    in gaps of over GAP_NS in which none ran, how many of these, and the longest in microseconds."""
    first = end = None
    count = gaps = idle = longest = 0
    for start, stop in sorted(kernels):
        count += 1
        if first is None or end is None:
            first, end = start, stop
            continue
        gap = start - end
        if gap > GAP_NS:
            gaps, idle, longest = gaps + 1, idle + gap, max(longest, gap)
        end = max(end, stop)
    span = (end - first) if first is not None and end is not None else 0
    return {
        "seconds": span / 1e9,
        "kernels": count,
        "idle_share": idle / span if span else 0.0,
        "gaps": gaps,
        "longest_gap_us": longest / 1e3,
    }


def _watch(started: threading.Event, out: Path, seconds: float) -> None:
    started.wait()
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    ended = threading.Event()
    with profile(activities=[ProfilerActivity.CUDA]) as watch:
        ended.wait(seconds)
    results: Any = watch.profiler
    kernels = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in results.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and not event.name().startswith("Mem")
    ]
    out.write_text(json.dumps(idle_share(kernels), indent=1) + "\n")


def main() -> int:
    out, seconds, *arguments = sys.argv[1:]
    started = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: started.set())
    threading.Thread(target=_watch, args=(started, Path(out), float(seconds)), daemon=True).start()
    return worker_main(arguments)


if __name__ == "__main__":
    sys.exit(main())
