"""A fixed piece of work, so that figures of different or busy machines can be compared.

It does by turns what the scheduler does: dictionaries and small objects, NumPy operations on short columns, short byte
strings. Divide a time by `ratio` to get what the reference machine would have taken, roughly.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

REFERENCE_US = 515.0
"""One round on the reference machine (two shared cores, Python 3.11), at rest."""
ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Calibration:
    median_us: float
    worst_us: float

    @property
    def ratio(self) -> float:
        """How much slower than the reference machine this one is at the moment."""
        return self.median_us / REFERENCE_US

    def report(self) -> dict[str, float]:
        return {"median_us": self.median_us, "worst_us": self.worst_us, "ratio": self.ratio}


def calibrate() -> Calibration:
    """Does the work `ROUNDS` times; takes about half as many milliseconds."""
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter_ns()
        _work()
        times.append((time.perf_counter_ns() - begun) / 1e3)
    return Calibration(statistics.median(times), max(times))


def _work() -> int:
    books: dict[int, tuple[int, bytes]] = {}
    for number in range(1_500):
        books[number % 257] = (number, b"%d" % number)
    total = sum(number for number, _ in books.values())
    column = np.arange(1_024, dtype=np.int32)
    for turn in range(40):
        chosen = np.flatnonzero(column % 16 == turn % 16)
        column[chosen] += 1
        total += len(column[chosen].tobytes())
    return total
