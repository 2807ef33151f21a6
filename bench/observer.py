"""Asking a running scheduler how it is, over a connection of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable

import zmq

from ..protocol.codec import decode, encode
from ..protocol.messages import PROTOCOL_VERSION, AskStats, ClientHello, Goodbye, Stats, UnknownPeer, Welcome
from ..protocol.transport import Address, open_dealer

DEADLINE_MS = 300_000
"""For an answer."""
PATIENCE_S = 300.0
"""For what shall come true."""
PAUSE_MS = 10


class Observer:
    """A client that only asks for Stats."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = open_dealer(self._context, Address(address).endpoint("clients"))
        self._greet()

    def _greet(self) -> None:
        self._socket.send(encode(ClientHello(version=PROTOCOL_VERSION, name="observer")))

    def stats(self) -> Stats:
        self._socket.send(encode(AskStats()))
        while True:
            if not self._socket.poll(DEADLINE_MS):
                raise TimeoutError("the scheduler does not answer")
            message = decode(self._socket.recv(), Welcome, Stats, Goodbye, UnknownPeer)
            if isinstance(message, Stats):
                return message
            if isinstance(message, UnknownPeer):  # it was silent for longer than a client's lease
                self._greet()
                self._socket.send(encode(AskStats()))

    def wait_until(self, condition: Callable[[Stats], bool]) -> Stats:
        """Asks again until it holds, with a pause that leaves the processor to whom it waits for. Raises TimeoutError
        after `PATIENCE_S`."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(found := self.stats()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"did not come true in {PATIENCE_S:g} s; last: {found}")
            self._socket.poll(PAUSE_MS)
        return found

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()
