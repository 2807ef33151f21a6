"""Who may connect over TCP: answers ZeroMQ's question about each key (ZAP, https://rfc.zeromq.org/spec/27/), ends the
connections of keys that were revoked, and bounds and logs what strangers do.

pyzmq's authenticators answer the same question, from a thread or a task of their own, with one list for every port that
they are not told apart, and admit whoever connects without keys; here the list depends on the port, and only CURVE is
ever admitted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85

from ..protocol.errors import ConfigurationError
from ..protocol.keys import admitted
from ..protocol.transport import LoopSocket, Port
from ..protocol.wires import Wire

log = logging.getLogger(__name__)

PORTS: Final[tuple[Port, ...]] = ("clients", "workers")
ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"


class Complaints:
    """Log lines about what strangers do, at most one a second: they must not fill the disk."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, every_s: float = 1.0) -> None:
        self._clock = clock
        self._every_s = every_s
        self._next = float("-inf")
        self._silenced = 0

    def warn(self, message: str, *arguments: object) -> None:
        now = self._clock()
        if now < self._next:
            self._silenced += 1
            return
        self._next = now + self._every_s
        if self._silenced:
            message += f" ({self._silenced} more complaints were not logged)"
            self._silenced = 0
        log.warning(message, *arguments)


class Admission:
    """The lists of admitted keys, and the ZAP handler of one context. Open it before the sockets that ask it."""

    def __init__(
        self, directory: Path, context: zmq.Context[zmq.Socket[bytes]], loop: asyncio.AbstractEventLoop
    ) -> None:
        """Raises ConfigurationError if the lists cannot be read."""
        self._directory = directory
        self._seen = self._look()
        self._names = {port: admitted(directory, port) for port in PORTS}
        self._complaints = Complaints(loop.time)
        self._condemned: list[Wire] = []
        handler = context.socket(zmq.ROUTER)
        handler.set(zmq.LINGER, 0)
        handler.bind(ZAP_ENDPOINT)
        self._socket = LoopSocket(handler, self._on_question, loop)
        for port in PORTS:
            if not self._names[port]:
                log.warning("no key is admitted for %s; add one with `tandem keys create`", port)

    def close(self) -> None:
        self._socket.close(0)

    def admits(self, port: Port, key: str) -> bool:
        return key in self._names[port]

    def check(self, port: Port, socket: LoopSocket) -> bool:
        """Whether the sender of the message being handled is admitted; its connection is cut if not."""
        if self.admits(port, socket.sender):
            return True
        wire = socket.wire()
        if wire is not None:
            wire.cut()
        return False

    def name(self, port: Port, key: str) -> str:
        """What the key is called, for logs."""
        return self._names[port].get(key, key)

    def reload(self) -> bool:
        """Reads the lists again if a file has changed; returns whether any key was taken away. Lists that cannot be
        read leave things as they are, and the log says so."""
        seen = self._look()
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            names = {port: admitted(self._directory, port) for port in PORTS}
        except ConfigurationError as error:
            log.error("the lists of admitted keys are unchanged: %s", error)  # noqa: TRY400  (it says all there is)
            return False
        revoked = [(port, key) for port in PORTS for key in self._names[port] if key not in names[port]]
        for port, key in revoked:
            log.warning("key %s of %s is revoked", self.name(port, key), port)
        self._names = names
        return bool(revoked)

    def condemn(self, wire: Wire | None) -> None:
        """Ends a connection with the next `execute`: what it is told before can still go out."""
        if wire is not None:
            self._condemned.append(wire)

    def execute(self) -> None:
        condemned, self._condemned = self._condemned, []
        for wire in condemned:
            wire.cut()

    def _look(self) -> object:
        """Differs when the lists do."""
        found = []
        for port in PORTS:
            for path in (self._directory / port).glob("*.pub"):
                try:
                    info = path.stat()
                except OSError:
                    continue  # gone meanwhile
                found.append((port, path.name, info.st_ino, info.st_mtime_ns, info.st_size, info.st_mode))
        return sorted(found)

    def _on_question(self, frames: list[bytes]) -> None:
        """ZeroMQ's own: route, empty, version, id, domain, address, routing id, mechanism, credentials …"""
        route, _, version, question, domain, address, _, mechanism, *credentials = frames
        port = next((port for port in PORTS if port.encode() == domain), None)
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and len(credentials) == 1 else ""
        if port is not None and key in self._names[port]:
            answer = [b"200", b"", key.encode(), b""]
        else:
            self._complaints.warn(
                "refused a connection from %s to the port for %s: key %s is not admitted there",
                address.decode(errors="replace"),
                domain.decode(errors="replace"),
                key or "(none)",
            )
            answer = [b"400", b"this key is not admitted here", b"", b""]
        self._socket.send([route, b"", version, question, *answer])
