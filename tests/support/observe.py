"""What a scheduler's Stats should say once all is over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from tandem.bench.observer import Observer
from tandem.protocol.messages import Stats

from support.deadlines import DEADLINE_S

__all__ = ["Observer", "run_until_preempted", "settled"]


def settled(stats: Stats) -> bool:
    """Nothing runs or waits, and every block of every worker is free."""
    free = all(worker.free_blocks == worker.num_blocks for worker in stats.workers)
    return free and not stats.running and not stats.waiting


def run_until_preempted(address: str, attempt: Callable[[], None], seconds: float = DEADLINE_S) -> Stats:
    """Runs `attempt`, which checks what came of it, until it has made the scheduler preempt, whatever it had preempted
    before; the settled Stats then.

    Whether requests meet in a tight cache depends on how fast this machine lets them arrive, so that one run of them
    proves nothing on a busy one. AssertionError when `seconds` have passed without a preemption.
    """
    deadline = time.monotonic() + seconds
    with contextlib.closing(Observer(address)) as observer:
        before = observer.stats().preemptions
        while True:
            attempt()
            stats = observer.wait_until(settled)
            if stats.preemptions > before:
                return stats
            assert time.monotonic() < deadline, f"no request was preempted: {stats}"
