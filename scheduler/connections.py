"""How many connections a port has, and which of them fail: known from ZeroMQ's monitor, since a ROUTER tells nothing of
a peer that has said nothing."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
from typing import Final

import zmq

from ..protocol.transport import LoopSocket, Port
from ..protocol.wires import Wire, monitor, read_event, wire_at
from .admission import Complaints

log = logging.getLogger(__name__)

FAILURES: Final = {
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "it does not speak the protocol, has no keys where they are needed or "
    "the other way round, or takes another key for this scheduler's",
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "it closed the connection, or said nothing for too long",
}
"""Why a handshake failed; a key that is not admitted is complained of by Admission."""
WATCHED: Final = int(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED) | sum(FAILURES)
RESERVED_FILES: Final = 128
"""File descriptors that are not for connections; half of them all where there are fewer than twice as many."""
OPEN_FILES: Final = 65_536
"""To so many a scheduler raises its limit on open files, if it may."""


def most_connections() -> int:
    """Of one port: half of what the limit on open files leaves."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = OPEN_FILES
    return max(1, (soft - min(RESERVED_FILES, soft // 2)) // 2)


class Connections:
    """The connections of one port, those included that have not introduced themselves; surplus ones are cut."""

    def __init__(self, port: Port, most: int, complaints: Complaints) -> None:
        self._port = port
        self._most = most
        self._complaints = complaints
        self._open: dict[int, Wire] = {}
        self._monitor: zmq.Socket[bytes] | None = None
        self._reading: LoopSocket | None = None

    def __len__(self) -> int:
        return len(self._open)

    def prepare(self, router: zmq.Socket[bytes]) -> None:
        """Begins to watch a socket that is not bound yet."""
        self._monitor = monitor(router, WATCHED)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._monitor is not None
        self._reading = LoopSocket(self._monitor, self._on_event, loop)

    def close(self) -> None:
        """Idempotent; may come before `attach` or `prepare`."""
        if self._reading is not None:
            self._reading.close(0)
        elif self._monitor is not None:
            self._monitor.close(0)

    def _on_event(self, frames: list[bytes]) -> None:
        event = read_event(frames)
        if event.event == zmq.EVENT_ACCEPTED:
            self._on_accepted(event.value)
        elif event.event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            self._open.pop(event.value, None)
        elif event.endpoint.startswith("ipc:") and event.value in (errno.EPIPE, errno.ECONNRESET):
            log.debug(
                "a connection to the port for %s was closed at once, as by who looks if anybody listens", self._port
            )
        else:
            self._complaints.warn("a connection to the port for %s failed: %s", self._port, FAILURES[event.event])

    def _on_accepted(self, fd: int) -> None:
        wire = wire_at(fd)
        if wire is None:
            return  # gone already
        self._open[fd] = wire
        if len(self._open) > self._most:
            self._complaints.warn(
                "cut a connection to the port for %s: over the limit of %d, half of what `ulimit -n` leaves",
                self._port,
                self._most,
            )
            wire.cut()
