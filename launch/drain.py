"""`tandem drain WORKER`: a worker's requests move to others, and it ends."""

from __future__ import annotations

import time
from typing import Any

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import ConfigurationError, ServiceUnavailable, TandemError
from ..protocol.messages import (
    PROTOCOL_VERSION,
    AskDrain,
    ClientHello,
    Draining,
    Goodbye,
    UnknownPeer,
    VersionRefused,
    Welcome,
)
from ..protocol.transport import Address, default_address, open_dealer, require_private
from .progress import note

ANSWER_S = 10.0
"""How long the scheduler may take to answer."""
ASK_EVERY_S = 0.5


def drain(worker: str, connect: str | None, wait: bool) -> None:
    """Asks the scheduler to drain the worker and, with `wait`, waits until it is gone. Raises ConfigurationError for an
    address that is not ipc, ServiceUnavailable if nobody answers, TandemError if there is no such worker."""
    address = Address(connect) if connect is not None else default_address()
    if not address.is_ipc:
        raise ConfigurationError(
            f"--connect {address.url}: workers are drained over ipc, by the service's own user only"
        )
    if not address.directory.exists():
        raise ServiceUnavailable(f"nobody serves at {address.url}")
    require_private(address.directory)
    with zmq.Context() as context, open_dealer(context, address.endpoint("clients")) as socket:
        _ask(socket, address, ClientHello(version=PROTOCOL_VERSION, name="drain"), Welcome)
        found = _ask(socket, address, AskDrain(worker=worker), Draining)
        if found.state == "refused":
            raise TandemError(f"the scheduler at {address.url} does not let this client drain workers")
        if found.state == "unknown":
            raise TandemError(f"no worker named {worker!r} serves at {address.url}")
        told = None
        while wait and found.state == "draining":
            if found.running != told:
                note(f"{worker}: {found.running} requests left")
                told = found.running
            time.sleep(ASK_EVERY_S)
            found = _ask(socket, address, AskDrain(worker=worker), Draining)
        socket.send(encode(Goodbye(reason="done")))
    note(f"{worker} is drained" if wait else f"{worker} is being drained")


def _ask(socket: zmq.Socket[bytes], address: Address, question: object, answer: type) -> Any:
    """The answer to a question; whatever else comes is passed over."""
    end = time.monotonic() + ANSWER_S
    if not socket.poll(int(ANSWER_S * 1000), zmq.POLLOUT):
        raise ServiceUnavailable(f"nobody serves at {address.url}")
    socket.send(encode(question))
    while (left := end - time.monotonic()) > 0 and socket.poll(int(left * 1000)):
        message = decode(socket.recv(), Welcome, Draining, Goodbye, UnknownPeer, VersionRefused)
        if isinstance(message, answer):
            return message
        if not isinstance(message, Welcome):  # which comes again when there is a model
            raise ServiceUnavailable(f"the scheduler at {address.url} answered with {type(message).__name__}")
    raise ServiceUnavailable(f"the scheduler at {address.url} did not answer within {ANSWER_S:g} s")
