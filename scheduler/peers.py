"""Who is connected to the scheduler, and what is known of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..protocol.messages import WorkerHello, WorkerStats

MAX_BACKLOG_BYTES = 8 * 1024 * 1024
"""Kept for a client that does not read, beyond ZeroMQ's own queue; then it loses its requests."""


@dataclass(slots=True)
class ClientPeer:
    """A connected client. `backlog` holds what its full queue did not take, in order."""

    routing_id: bytes
    client: int
    name: str
    heard_at: float
    backlog: deque[bytes] = field(default_factory=deque)
    backlog_bytes: int = 0
    fetched_bytes: int = 0
    """Of tokenizer files, on this connection."""


@dataclass(slots=True)
class WorkerPeer:
    """A worker between its hello and its loss; `registered` once its tokenizer files are here and plans may go out."""

    routing_id: bytes
    registration: int
    hello: WorkerHello
    heard_at: float
    registered: bool = False
    """Plans may go out; before, its tokenizer files are fetched or those of another worker."""
    waits_for_step: int | None = None
    """The step that it said it waits for when last it was idle, though that had been planned."""
    steps: int = 0
    tokens: int = 0
    busy_us: int = 0
    gap_us: int = 0

    def stats(self, free_blocks: int, cached_blocks: int, running: int) -> WorkerStats:
        return WorkerStats(
            name=self.hello.name,
            registration=self.registration,
            num_blocks=self.hello.num_blocks,
            free_blocks=free_blocks,
            cached_blocks=cached_blocks,
            running=running,
            steps=self.steps,
            tokens=self.tokens,
            busy_us=self.busy_us,
            gap_us=self.gap_us,
        )
