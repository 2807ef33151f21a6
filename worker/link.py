"""The worker's socket, in a thread of its own, so that neither planning the next step nor waiting for the last one
delays a message.

The ZeroMQ socket belongs to that thread alone, from its start to its end. Other threads leave encoded messages in a
queue and wake it, so none of them has a socket that would have to be closed in the right order.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from typing import Any, Final

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import ConfigurationError, ProtocolError, VersionMismatch
from ..protocol.keys import PeerKeys
from ..protocol.messages import (
    CheckGrammar,
    FetchFile,
    Goodbye,
    Leave,
    Ping,
    StepPlan,
    StepResult,
    UnknownPeer,
    VersionRefused,
    WorkerWelcome,
)
from ..protocol.tracing import OFF, Track
from ..protocol.transport import LINGER_MS, Address, open_dealer, require_private
from ..protocol.wires import HANDSHAKE_EVENTS, Event, Handshakes, monitor, read_event, unwatch

log = logging.getLogger(__name__)

DIRECTORY_EVERY_MS: Final = 500
"""How often is looked for an ipc directory that no scheduler has made yet."""
RECEIVE, SEND = range(2)
"""Kinds of spans of the track."""
CLOSE_S: Final = 1.0
"""How long `close` waits for the thread, which only ever forwards."""


_INCOMING: Final = (
    StepPlan,
    WorkerWelcome,
    CheckGrammar,
    FetchFile,
    Leave,
    Ping,
    UnknownPeer,
    VersionRefused,
    Goodbye,
)


class Failure:
    """In the inbox: a step failed, or there can be no conversation with the scheduler."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Reachable:
    """In the inbox: a scheduler can be reached, to whom something could not be sent before."""


class Link:
    """Messages from the scheduler arrive decoded in `inbox`; `send` may be called from any thread.

    Raises ConfigurationError for an address to which no socket can connect, and for an ipc directory that is not this
    user's alone. A directory that does not exist is waited for, and looked at in the same way when it does; what is
    wrong with it then is a Failure in the inbox, as is whatever ends the thread.
    """

    def __init__(self, address: Address, keys: PeerKeys | None = None, track: Track = OFF) -> None:
        """`keys`: what a tcp address needs, unless it is to be used without. `track`: for plans that are received and
        results that are sent."""
        self._track = track
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.address = address
        """The scheduler's."""
        self._keys = keys
        self._handshakes = Handshakes(address.url, None if keys is None else keys.public)
        self._monitor: zmq.Socket[bytes] | None = None
        self._outgoing: deque[tuple[bytes, int | None]] = deque()
        """Encoded messages, of results with the step."""
        self._lock = threading.Lock()
        self._closed = False
        self._unsent = False
        """Something could not be sent since the last Reachable."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._dealer = self._connect()
        except BaseException:
            self._context.destroy(0)
            raise
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    def send(self, message: object) -> None:
        """Hands a message over; never waits. It is dropped if no scheduler is connected or the link is closed."""
        data = encode(message)
        step = message.step if isinstance(message, StepResult) else None
        with self._lock:
            if not self._closed:
                self._outgoing.append((data, step))
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Sends what was handed over and ends the thread; takes CLOSE_S and LINGER_MS at most. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("the link's thread does not end; its socket is left to it")
            return
        os.close(self._wake)
        self._context.term()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._forward()
        except BaseException as error:  # noqa: BLE001 - raised again by the session, which ends the process
            self.inbox.put(Failure(error))
        finally:
            if self._dealer is not None:
                unwatch(self._dealer)
                self._dealer.close(LINGER_MS)
            if self._monitor is not None:
                self._monitor.close(0)
            self._handshakes.close()

    def _forward(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        if self._dealer is not None:
            poller.register(self._dealer, zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        while True:
            events = dict(poller.poll(DIRECTORY_EVERY_MS if self._dealer is None else None))
            if self._monitor is not None and self._monitor in events:
                self._note_handshake(read_event(self._monitor.recv_multipart()))
            if self._dealer is None:
                self._dealer = self._connect()
            if self._dealer is not None:
                self._look_at(self._dealer, events.get(self._dealer, 0))
            if self._wake in events and not self._send_all():
                return
            if self._dealer is not None:
                poller.register(self._dealer, zmq.POLLIN | zmq.POLLOUT if self._unsent else zmq.POLLIN)

    def _look_at(self, dealer: zmq.Socket[bytes], happened: int) -> None:
        if happened & zmq.POLLOUT and self._unsent:
            self._unsent = False
            self.inbox.put(Reachable())
        if happened & zmq.POLLIN:
            self._receive(dealer.recv_multipart())

    def _connect(self) -> zmq.Socket[bytes] | None:
        """A socket that ZeroMQ connects in the background; None as long as the ipc directory does not exist."""
        endpoint = self.address.endpoint("workers")
        try:
            self._require_private()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigurationError(f"address {self.address.url!r}: {error.strerror}") from error
        try:
            return open_dealer(
                self._context, endpoint, self._keys, None if self.address.is_ipc else self._watch_handshakes
            )
        except zmq.ZMQError as error:
            raise ConfigurationError(f"address {self.address.url!r}: cannot connect: {error.strerror}") from error

    def _watch_handshakes(self, dealer: zmq.Socket[bytes]) -> None:
        self._monitor = monitor(dealer, HANDSHAKE_EVENTS)

    def _note_handshake(self, event: Event) -> None:
        error = self._handshakes.heard(event, time.monotonic())
        if error is not None:
            self.inbox.put(Failure(error))

    def _require_private(self) -> None:
        if self.address.is_ipc:
            require_private(self.address.directory)

    def _send_all(self) -> bool:
        """Sends what was handed over; False if nothing will be any more."""
        os.eventfd_read(self._wake)
        with self._lock:
            closed = self._closed
        while self._outgoing:
            data, step = self._outgoing.popleft()
            begun = self._track.start()
            self._send(data)
            if step is not None:
                self._track.end(SEND, step, begun)
        return not closed

    def _send(self, data: bytes) -> None:
        try:
            if self._dealer is not None:
                self._dealer.send(data, zmq.DONTWAIT)
                return
        except zmq.Again:
            pass  # connected to nobody
        # What one scheduler would have been told is worth nothing to the next one, which asks anew.
        log.debug("no scheduler is connected; %d bytes are not sent", len(data))
        self._unsent = True

    def _receive(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise ProtocolError(f"the scheduler sent a message of {len(frames)} frames; a message has one")
            begun = self._track.start()
            message = decode(frames[0], *_INCOMING)
        except (ProtocolError, VersionMismatch) as error:
            self.inbox.put(Failure(error))  # and not raised: the scheduler is still to be told
            return
        if isinstance(message, Ping) and not message.number:
            return  # the scheduler only wants to know whether it can be sent
        if isinstance(message, StepPlan):
            self._track.end(RECEIVE, message.step, begun)
        elif isinstance(message, WorkerWelcome):
            try:
                self._require_private()  # again: a scheduler that ends removes its directory, and anyone may make one
            except FileNotFoundError:
                return  # of a scheduler that has ended since
        self.inbox.put(message)
