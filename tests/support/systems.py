"""A system of real processes that nobody is to lose by a lease."""

from __future__ import annotations

from typing import Any

from tandem.launch.embedded import EmbeddedSystem

from support.deadlines import LONG_LEASE_S


def embedded(
    worker_options: dict[str, Any] | None = None, scheduler_options: dict[str, Any] | None = None, **more: Any
) -> EmbeddedSystem:
    """An EmbeddedSystem on the CPU with long leases, for what is not about their end."""
    leases = {"worker_lease": LONG_LEASE_S, "client_lease": LONG_LEASE_S}
    return EmbeddedSystem(worker_options, {**leases, **(scheduler_options or {})}, **more)
