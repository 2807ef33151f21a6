"""What ZeroMQ hides of the connections below a socket: one of them, to be cut; and how their handshakes went."""

from __future__ import annotations

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
"""A peer that has closed every connection in the middle of its handshake for so long does not want this one."""


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


def monitor(watched: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """A PAIR from which `read_event` reads what happens below `watched`; close it after that. To be called before
    `watched` connects. It never fills: ZeroMQ's own thread would wait for room."""
    endpoint = f"inproc://monitor-{id(watched):x}-{int(watched.get(zmq.FD))}"
    watched.monitor(endpoint, events)
    reader: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
    reader.set(zmq.LINGER, 0)
    reader.set(zmq.RCVHWM, 0)
    reader.connect(endpoint)
    return reader


def read_event(frames: list[bytes]) -> Event:
    """The event in a message of a monitor."""
    event, value = struct.unpack("=HI", frames[0])
    return Event(event, value)


class Handshakes:
    """Turns what a connecting socket's monitor tells into the reason why it will never be let in, if there is one.

    ZeroMQ itself tries no more after a refused key or a handshake that the peer does not understand. A connection that
    is only closed may be a service that just starts behind a proxy, so that counts after CLOSED_HANDSHAKES_S, and only
    as long as none has succeeded.
    """

    def __init__(self, url: str, public_key: str | None) -> None:
        """`public_key` (Z85): this end's, None if it uses none."""
        self._url = url
        self._key = public_key
        self._closed_since: float | None = None
        self._succeeded = False

    def heard(self, event: Event, now: float) -> AuthenticationError | None:
        """To be called with each event of HANDSHAKE_EVENTS."""
        if event.event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._succeeded = True
        elif event.event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return AuthenticationError(
                f"the scheduler at {self._url} does not admit the key {self._key}; add it there with `tandem keys "
                "create`, or use one that is listed by `tandem keys list`"
            )
        elif event.event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return self._misunderstood()
        elif event.event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and not self._succeeded:
            self._closed_since = self._closed_since or now
            if now - self._closed_since >= CLOSED_HANDSHAKES_S:
                return self._misunderstood()
        return None

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
