"""How long a worker may show no progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

EXPECTED_STEPS: Final = 10
"""While a step is computed, a worker's lease is longer by so many times what the step should take, going by those
before it, but at most the largest that the worker tried; that one, if none was like it. Machines have bad moments, and
attention over a long context takes longer than over a short one."""
LONGEST_STEPS: Final = 2
"""It is never less than so many times the largest step that the worker tried."""


@dataclass(frozen=True, slots=True)
class WorkerLeases:
    """All of that holds up to a limit: what a worker measured on a starved machine, or says to mislead, must not let it
    hang for an hour."""

    least_s: float
    limit_s: float
    """`least_s` counts if that is more."""

    def seconds(self, longest_step_s: float, expected_step_s: float | None) -> float:
        """The lease of a worker whose largest step took `longest_step_s` when it tried, in a step that should take
        `expected_step_s`: 0 outside of steps, None if none was like it."""
        # A step in which the process was stopped, or the machine busy, must not make the next one's time endless.
        expected = longest_step_s if expected_step_s is None else min(expected_step_s, longest_step_s)
        wanted = max(self.least_s + EXPECTED_STEPS * expected, LONGEST_STEPS * longest_step_s)
        return min(wanted, self._most)

    def cut(self, longest_step_s: float) -> bool:
        """Whether the limit leaves a worker less than its largest step may honestly take."""
        return LONGEST_STEPS * longest_step_s > self._most

    @property
    def _most(self) -> float:
        return max(self.least_s, self.limit_s)
