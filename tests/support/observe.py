"""What a scheduler's Stats should say once all is over."""

from __future__ import annotations

from tandem.bench.observer import Observer
from tandem.protocol.messages import Stats

__all__ = ["Observer", "settled"]


def settled(stats: Stats) -> bool:
    """Nothing runs or waits, and every block of every worker is free."""
    free = all(worker.free_blocks == worker.num_blocks for worker in stats.workers)
    return free and not stats.running and not stats.waiting
