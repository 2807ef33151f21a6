"""Who is connected to the scheduler, and what is known of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..protocol.errors import ProtocolError
from ..protocol.messages import WorkerHello, WorkerStats
from ..protocol.wires import Wire
from .metrics import DeviceMeter
from .replica import Replica

MAX_BACKLOG_BYTES = 8 * 1024 * 1024
"""Kept for a client that does not read, beyond ZeroMQ's own queue; then it loses its requests."""


def require_given_route(route: bytes) -> None:
    """Raises ProtocolError unless the ROUTER itself named the peer: what a peer calls itself may be another's name."""
    if route[:1] != b"\0":
        raise ProtocolError("a peer must not choose its own routing id")


@dataclass(slots=True)
class ClientPeer:
    """A connected client. `backlog` holds what its full queue did not take, in order."""

    routing_id: bytes
    key: str
    """What its connection proved to be: a public key, or LOCAL. A route with another key is another peer."""
    client: int
    name: str
    heard_at: float
    session: int = 0
    """By which the client is known again on another connection; 0 if it is not."""
    backlog: deque[bytes] = field(default_factory=deque)
    backlog_bytes: int = 0
    fetched_bytes: int = 0
    """Of tokenizer files, on this connection."""
    wire: Wire | None = None
    """The connection, where keys are used."""


@dataclass(slots=True)
class WorkerPeer:
    """A worker between its hello and its loss; `registered` once its tokenizer files are here and plans may go out."""

    routing_id: bytes
    key: str
    """As a ClientPeer's."""
    registration: int
    hello: WorkerHello
    progress_at: float
    """When it last showed that it works: by a result, by saying that it has nothing to do, or by an answer. Or, if that
    was later, when it got something to do after it had nothing."""
    process: int | None = None
    """A descriptor that tells when its process ends, if that is on this machine."""
    lived_on: int | None = None
    """The registration under which the same process was taken for lost before."""
    registered: bool = False
    """Plans may go out; before, its tokenizer files are fetched or those of another worker."""
    doubted_step: int | None = None
    """A step that was planned, and that it said it waits for: the plan may be on its way, or lost."""
    asked: int = 0
    """The number of the last Ping that asked it after a doubted step."""
    wire: Wire | None = None
    """The connection, where keys are used."""
    joined_at: float = 0.0
    meter: DeviceMeter = field(init=False)
    planned: deque[tuple[float, bool]] = field(default_factory=deque)
    """Of each plan without a result: when it was sent, and whether the worker had been idle."""

    def __post_init__(self) -> None:
        hello = self.hello
        self.meter = DeviceMeter(hello.weight_bytes, hello.kv_bytes_per_token, hello.memory_bandwidth)

    def stats(self, replica: Replica, silent_s: float, lease_s: float) -> WorkerStats:
        requests = [request for request in replica.rows.request if request is not None]
        return WorkerStats(
            name=self.hello.name,
            registration=self.registration,
            num_blocks=self.hello.num_blocks,
            free_blocks=replica.pool.available,
            cached_blocks=replica.pool.cached,
            running=len(requests),
            steps=self.meter.steps,
            tokens=self.meter.tokens,
            busy_us=self.meter.busy_us,
            gap_us=self.meter.gap_us,
            in_flight=replica.in_flight,
            state="draining" if replica.draining else "serving",
            silent_s=silent_s,
            lease_s=lease_s,
            suspects=sum(request.suspicions > 0 for request in requests),
            lookahead=self.hello.lookahead,
            recent_idle_share=self.meter.recent_idle_share,
            decode_busy_us=self.meter.decode_busy_us,
            decode_floor_us=self.meter.decode_floor_us,
            histograms=self.meter.histograms(),
        )
