"""The worker's socket, in a thread of its own, so that neither planning the next step nor waiting for the last one
delays a message.

ZeroMQ sockets belong to one thread each. Other threads hand over bytes through an in-process socket of their own.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import ProtocolError
from ..protocol.messages import FetchFile, Goodbye, StepPlan, UnknownPeer, VersionRefused, WorkerWelcome
from ..protocol.transport import LINGER_MS, open_dealer

log = logging.getLogger(__name__)

_STOP = b""


class Stop:
    """In the inbox: the process was asked to end."""


class Failure:
    """In the inbox: a step failed, or the scheduler cannot be understood."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Link:
    """Messages from the scheduler arrive decoded in `inbox`; `outbox()` gives a thread its own way out."""

    def __init__(self, endpoint: str) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._hub = f"inproc://outbox-{id(self)}"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(endpoint,), name="link", daemon=True)
        self._thread.start()
        self._ready.wait()

    @contextmanager
    def outbox(self) -> Iterator[Outbox]:
        """For use by the calling thread alone."""
        socket = self._context.socket(zmq.PUSH)
        socket.set(zmq.LINGER, LINGER_MS)
        socket.connect(self._hub)
        try:
            yield Outbox(socket)
        finally:
            socket.close()

    def close(self) -> None:
        """Sends what was handed over, then ends the thread. Outboxes must be closed before."""
        with self.outbox() as outbox:
            outbox.send_bytes(_STOP)
        self._thread.join()
        self._context.term()

    def _run(self, endpoint: str) -> None:
        hub = self._context.socket(zmq.PULL)
        hub.bind(self._hub)
        dealer = open_dealer(self._context, endpoint)
        poller = zmq.Poller()
        poller.register(hub, zmq.POLLIN)
        poller.register(dealer, zmq.POLLIN)
        self._ready.set()
        try:
            while True:
                events = dict(poller.poll())
                if hub in events:
                    data = hub.recv()
                    if data == _STOP:
                        self._send_rest(hub, dealer)
                        return
                    self._send(dealer, data)
                if dealer in events:
                    self._receive(dealer.recv_multipart())
        finally:
            hub.close(0)
            dealer.close(LINGER_MS)

    def _send_rest(self, hub: zmq.Socket[bytes], dealer: zmq.Socket[bytes]) -> None:
        """What closed outboxes left behind: ZeroMQ takes from several senders in turn, not in order of time."""
        while hub.poll(0):
            self._send(dealer, hub.recv())

    def _send(self, dealer: zmq.Socket[bytes], data: bytes) -> None:
        try:
            dealer.send(data, zmq.DONTWAIT)
        except zmq.Again:
            # No scheduler is connected. What it would have been told is worth nothing to the next one, which asks anew.
            log.debug("no scheduler is connected; %d bytes are not sent", len(data))

    def _receive(self, frames: list[bytes]) -> None:
        try:
            self.inbox.put(decode(frames[0], StepPlan, WorkerWelcome, FetchFile, UnknownPeer, VersionRefused, Goodbye))
        except ProtocolError as error:
            self.inbox.put(Failure(error))


class Outbox:
    """One thread's way to the scheduler. Never blocks for long: the link's thread only forwards."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def send(self, message: object) -> None:
        self._socket.send(encode(message))

    def send_bytes(self, data: bytes) -> None:
        self._socket.send(data)
