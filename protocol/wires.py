"""What ZeroMQ hides of the connections below a socket: one of them, to be cut; and how their handshakes went."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from dataclasses import dataclass

import zmq

from .errors import AuthenticationError

HANDSHAKE_EVENTS = int(
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
CLOSED_HANDSHAKES_S = 5.0
"""A ZeroMQ peer that has closed every connection in the middle of its handshake for so long does not want this one."""
GREETING_S = 5.0
"""A ZeroMQ peer begins to speak as soon as it has accepted a connection; who says nothing for so long is none."""
LOOK_EVERY_S = 0.5
_SIGNATURE = 0xFF
"""The first byte that a ZeroMQ peer says."""


@dataclass(frozen=True, slots=True)
class Wire:
    """The connection below one of a ROUTER's peers: ZeroMQ has no call that ends just one. The inode tells it from a
    later connection that was given the same descriptor."""

    fd: int
    inode: int

    def cut(self) -> None:
        """Ends the connection, if it still exists; both ends notice."""
        try:
            copy = os.dup(self.fd)
        except OSError:
            return
        with socket.socket(fileno=copy) as connection:
            try:
                if os.fstat(copy).st_ino == self.inode:
                    connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # ended meanwhile


def wire_at(fd: int) -> Wire | None:
    """The connection that has a file descriptor; None if it has ended."""
    try:
        return Wire(fd, os.fstat(fd).st_ino)
    except OSError:
        return None


def wire_of(frame: zmq.Frame) -> Wire | None:
    """The connection that a frame came over; None if it has ended."""
    try:
        return wire_at(int(frame.get(zmq.SRCFD)))
    except zmq.ZMQError:
        return None


@dataclass(frozen=True, slots=True)
class Event:
    """What a monitor tells: a zmq.EVENT_… and its value."""

    event: int
    value: int
    endpoint: str
    """Of the socket that is watched; its host is a number once it has been looked up."""


def monitor(watched: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """A PAIR from which `read_event` reads what happens below `watched`. To be called before `watched` connects. It
    never fills: ZeroMQ's own thread would wait for room. Close it after `unwatch`."""
    endpoint = f"inproc://monitor-{id(watched):x}-{int(watched.get(zmq.FD))}"
    watched.monitor(endpoint, events)
    reader: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
    reader.set(zmq.LINGER, 0)
    reader.set(zmq.RCVHWM, 0)
    reader.connect(endpoint)
    return reader


def unwatch(watched: zmq.Socket[bytes]) -> None:
    """Ends the monitor of a socket, if it has one, before it is closed. A socket lives on in ZeroMQ's threads for a
    while after `close`; one of its events for a reader that is closed by then would stop the thread that serves every
    socket of the context, and with it Context.term, for ever."""
    watched.disable_monitor()


def read_event(frames: list[bytes]) -> Event:
    """The event in a message of a monitor."""
    event, value = struct.unpack("=HI", frames[0])
    return Event(event, value, frames[1].decode())


class Look:
    """A connection that only tells whether a ZeroMQ peer is at its other end, not a proxy with nobody behind it.
    Nothing here waits."""

    def __init__(self, endpoint: str, now: float) -> None:
        """`endpoint`: tcp://, a number and a port. Raises ValueError for another, OSError for one that cannot be
        reached."""
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        address = ipaddress.ip_address(host.strip("[]"))
        self.begun_at = now
        self._found: bool | None = None
        self._socket = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6)
        try:
            self._socket.setblocking(False)
            self._socket.connect((str(address), int(port)))
        except BlockingIOError:
            pass  # under way
        except BaseException:
            self._socket.close()
            raise

    def found(self, now: float) -> bool | None:
        """Whether a ZeroMQ peer has greeted; None as long as nothing is known."""
        if self._found is None:
            try:
                self._found = self._socket.recv(1) == bytes([_SIGNATURE])
            except BlockingIOError:
                self._found = None if now - self.begun_at < GREETING_S else False
            except OSError:
                self._found = False
        return self._found

    def close(self) -> None:
        self._socket.close()


class Handshakes:
    """Turns what a connecting socket's monitor tells into the reason why it will never be let in, if there is one.

    ZeroMQ itself tries no more after a refused key or a handshake that the peer does not understand. A connection that
    is only closed may lead to a proxy whose service is not there (yet), or to a service that has another key. So it is
    looked, while connections are being closed, whether a ZeroMQ peer is there: that counts after CLOSED_HANDSHAKES_S in
    which each look found one, and only as long as no handshake has succeeded.
    """

    def __init__(self, url: str, public_key: str | None) -> None:
        """`public_key` (Z85): this end's, None if it uses none."""
        self._url = url
        self._key = public_key
        self._look: Look | None = None
        self._there_since: float | None = None
        """When the first look began of those that found a peer, without one that did not since."""
        self._succeeded = False

    def heard(self, event: Event, now: float) -> AuthenticationError | None:
        """To be called with each event of HANDSHAKE_EVENTS."""
        if event.event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._succeeded = True
            self.close()
        elif event.event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return AuthenticationError(
                f"the scheduler at {self._url} does not admit the key {self._key}; add it there with `tandem keys "
                "create`, or use one that is listed by `tandem keys list`"
            )
        elif event.event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return self._misunderstood()
        elif event.event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not self._succeeded:
            self._look_around(event.endpoint, now)
            if self._there_since is not None and now - self._there_since >= CLOSED_HANDSHAKES_S:
                return self._misunderstood()
        return None

    def close(self) -> None:
        """Ends the look that is under way, if there is one. Idempotent."""
        if self._look is not None:
            self._look.close()
            self._look = None

    def _look_around(self, endpoint: str, now: float) -> None:
        """Notes what the look under way has found, and begins another when it is time."""
        if self._look is not None:
            found = self._look.found(now)
            if found is None:
                return
            if not found:
                self._there_since = None
            elif self._there_since is None:
                self._there_since = self._look.begun_at
            if now - self._look.begun_at < LOOK_EVERY_S:
                return
            self.close()
        try:
            self._look = Look(endpoint, now)
        except (ValueError, OSError):
            self._there_since = None  # a name that has not been looked up yet, or nobody there

    def _misunderstood(self) -> AuthenticationError:
        if self._key is None:
            return AuthenticationError(
                f"the scheduler at {self._url} did not take a connection without keys; leave --insecure out and give "
                "--keys"
            )
        return AuthenticationError(
            f"the scheduler at {self._url} did not take a connection with keys: it has another key than the `server` "
            "in this key file, or uses none (--insecure)"
        )
