"""The clock of a simulated device, which is computed and not waited for.

Step k starts when its plan is there and step k - 1 has ended, and takes as long as it is said to take. The process
that plays the device shares its processor with others and wakes up late now and then; a real device does not. So the
time at which a result *should* have been sent is kept apart from the time at which it was. When a result goes out a
little late, the plan that answers it is taken for that much earlier; when it would be very late, the device's clock
stands still meanwhile. Either way what is charged to the scheduler is the time from a result's sending to the plan's
arrival. The delay with which the process notices a plan is charged to the scheduler too.
"""

from __future__ import annotations

from array import array
from typing import Any


class Timeline:
    """One device. Times are seconds of one monotonic clock."""

    def __init__(self, lookahead: int) -> None:
        self._answers_after = lookahead + 1
        """The result of step k is answered by the plan of step k + lookahead + 1."""
        self._end = 0.0
        self._late: dict[int, float] = {}
        """By the step of the plan that answers: how late the result went out. Only of those still to come."""
        self.forget()

    def forget(self) -> None:
        """Begins the record anew; the device goes on."""
        self.slack_us = array("d")
        """For each step that did not follow an idle spell: end of the step before, less its plan's arrival; negative if
        the device had to wait."""
        self.slack_as_seen_us = array("d")
        """The same without allowing for results that went out late."""
        self.late_us = array("d")
        """For each result: how late it was sent."""
        self.waited_s = 0.0
        self.stood_still_s = 0.0
        self.busy_s = 0.0

    def plan_arrived(self, step: int, at: float, seconds: float, after_idle: bool) -> tuple[float, float]:
        """A plan has come, in order. Returns when the step ends, and how long the device waited for the plan."""
        there = at - self._late.pop(step, 0.0)
        waited = 0.0
        if not after_idle:
            slack = self._end - there
            waited = max(0.0, -slack)
            self.slack_us.append(slack * 1e6)
            self.slack_as_seen_us.append((self._end - at) * 1e6)
        self._end = max(there, self._end) + seconds
        self.waited_s += waited
        self.busy_s += seconds
        return self._end, waited

    def result_sent(self, step: int, due: float, at: float) -> None:
        """The result of a step that ended at `due` went out at `at`."""
        late = max(0.0, at - due)
        self.late_us.append(late * 1e6)
        self._late[step + self._answers_after] = late

    def stand_still(self, seconds: float) -> None:
        """Whatever the device does ends so much later."""
        self._end += seconds
        self.stood_still_s += seconds

    def report(self) -> dict[str, Any]:
        """The record; times in µs, one decimal."""
        return {
            "steps": len(self.slack_us),
            "waited": sum(slack < 0.0 for slack in self.slack_us),
            "waited_as_seen": sum(slack < 0.0 for slack in self.slack_as_seen_us),
            "waited_s": self.waited_s,
            "stood_still_s": self.stood_still_s,
            "busy_s": self.busy_s,
            "slack_us": [round(slack, 1) for slack in self.slack_us],
            "late_us": [round(late, 1) for late in self.late_us],
        }
