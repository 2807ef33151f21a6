"""When a child that ended is started again, and when nobody tries any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class SupervisionConfig(BaseModel):
    """How the launcher looks after the processes that it started. Unknown options are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_restarts: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="How often in a row a process that ended soon after it was ready is started again; then "
            "everything ends. 0: at the first end.",
        ),
    ] = 10
    scheduler_lease: Annotated[
        float,
        Field(
            ge=1.0,
            le=86_400,
            description="Seconds without a sign of life after which the scheduler is killed and started again.",
        ),
    ] = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """A child is started again after `first_delay_s`, and after twice as long each time that it ends before it was
    ready for `stable_s`; `max_restarts` times in a row at most."""

    max_restarts: int
    stable_s: float = 10.0
    first_delay_s: float = 0.1
    longest_delay_s: float = 10.0


class RestartHistory:
    """What became of one child's lives so far. Times are of any monotonic clock, in seconds."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._was_ever_ready = False
        self._ready_at: float | None = None
        self.failures = 0
        """Ends in a row that came too early."""

    def ready(self, now: float) -> None:
        """This life serves."""
        self._was_ever_ready = True
        self._ready_at = now

    def ended(self, now: float) -> float | None:
        """After how many seconds it is started again. None: not again, because it failed too often, or was never ready
        in any of its lives, so that there is nothing to hope for."""
        policy = self._policy
        if self._ready_at is not None and now - self._ready_at >= policy.stable_s:
            self.failures = 0
        self._ready_at = None
        self.failures += 1
        if not self._was_ever_ready or self.failures > policy.max_restarts:
            return None
        doublings = min(self.failures - 1, 30)
        return float(min(policy.first_delay_s * 2**doublings, policy.longest_delay_s))
