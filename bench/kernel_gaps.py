"""A worker whose GPU is watched by torch.profiler on demand: `python -m tandem.bench.kernel_gaps OUT SECONDS …`, the
rest as for `tandem.worker.main`. It serves as any worker does.

SIGUSR1 starts a watch, and may do so again after it. After SECONDS, OUT-1.json (OUT-2.json, …) tells for which share of
the time no kernel ran, in gaps of over 10 µs: what the workers' own count of idle time between steps is to be compared
with; between which kernels; which kernels the time went to; and how long the host's calls of CUDA took, as far as the
profiler sees them (it does not see the driver load a kernel): one that waits for the device queues nothing ahead.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any, Final

from ..worker.main import main as worker_main

GAP_NS: Final = 10_000
"""Shorter gaps are how kernels follow each other."""
LISTED: Final = 40
"""Kernels of the table, by name: those that took longest in all."""
NAME: Final = 100
"""Characters of a kernel's name: templates' are endless."""


def idle_share(kernels: Iterable[tuple[int, int]]) -> dict[str, float]:
    """Of kernels (start, end) in nanoseconds: the time from the first to the last in seconds, how many, the share of it
    in gaps of over GAP_NS in which none ran, how many of these, and the longest in microseconds."""
    first = end = None
    number = gaps = idle = longest = 0
    for start, stop in sorted(kernels):
        number += 1
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
        "kernels": number,
        "idle_share": idle / span if span else 0.0,
        "gaps": gaps,
        "longest_gap_us": longest / 1e3,
    }


def by_name(kernels: Iterable[tuple[str, int, int]]) -> list[dict[str, float | str]]:
    """Of kernels (name, start, end) in nanoseconds, for each name: how many, their time in all and on average, and the
    longest. The longest in all first, LISTED of them. Kernels that overlap count twice."""
    found: dict[str, list[int]] = {}
    for name, start, end in kernels:
        counted = found.setdefault(name[:NAME], [0, 0, 0])
        counted[0] += 1
        counted[1] += end - start
        counted[2] = max(counted[2], end - start)
    longest = sorted(found.items(), key=lambda item: -item[1][1])[:LISTED]
    return [
        {
            "name": name,
            "count": times,
            "total_ms": total / 1e6,
            "mean_us": total / times / 1e3,
            "longest_us": most / 1e3,
        }
        for name, (times, total, most) in longest
    ]


def by_neighbours(kernels: Iterable[tuple[str, int, int]]) -> list[dict[str, float | str]]:
    """Of kernels (name, start, end) in nanoseconds, for each pair of names of which the first ended last before a gap
    of over GAP_NS and the second ended the gap: how many, and their time in all and the longest. The longest in all
    first, LISTED of them."""
    found: dict[tuple[str, str], list[int]] = {}
    before, reached = "", None
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1:]):
        if reached is not None and start - reached > GAP_NS:
            counted = found.setdefault((before[:NAME], name[:NAME]), [0, 0, 0])
            counted[0] += 1
            counted[1] += start - reached
            counted[2] = max(counted[2], start - reached)
        if reached is None or end > reached:
            before, reached = name, end
    longest = sorted(found.items(), key=lambda item: -item[1][1])[:LISTED]
    return [
        {"after": after, "before": then, "count": times, "total_us": total / 1e3, "longest_us": most / 1e3}
        for (after, then), (times, total, most) in longest
    ]


def _watch(wanted: threading.Semaphore, out: Path, seconds: float) -> None:
    for number in count(1):
        wanted.acquire()
        report = _profiled(seconds)
        out.with_name(f"{out.name}-{number}.json").write_text(json.dumps(report, indent=1) + "\n")


def _profiled(seconds: float) -> dict[str, Any]:
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    ended = threading.Event()
    with profile(activities=[ProfilerActivity.CUDA]) as watch:
        ended.wait(seconds)
    results: Any = watch.profiler
    kernels, calls = [], []
    for event in results.kineto_results.events():
        span = event.name(), event.start_ns(), event.start_ns() + event.duration_ns()
        if event.device_type() != DeviceType.CUDA:
            calls.append(span)
        elif not event.name().startswith("Mem"):
            kernels.append(span)
    return {
        **idle_share((start, end) for _, start, end in kernels),
        "gaps_between": by_neighbours(kernels),
        "by_name": by_name(kernels),
        "calls": by_name(calls),
    }


def main() -> int:
    out, seconds, *arguments = sys.argv[1:]
    wanted = threading.Semaphore(0)
    signal.signal(signal.SIGUSR1, lambda *_: wanted.release())
    threading.Thread(target=_watch, args=(wanted, Path(out), float(seconds)), daemon=True).start()
    return worker_main(arguments)


if __name__ == "__main__":
    sys.exit(main())
