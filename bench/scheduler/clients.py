"""A process with some simulated clients, each with a connection of its own:

    python -m tandem.bench.scheduler.clients SETTINGS

They speak the real protocol, and read only as much of a Tokens message as they measure, many messages at a time: with
hundreds of clients on the scheduler's own processors, what they take is missing there. Each keeps a number of requests
open and sends a new one whenever one has ended, having checked that it brought the tokens that were asked for.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import zmq
from pydantic import TypeAdapter

from ...protocol.codec import decode, encode
from ...protocol.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    Goodbye,
    Ping,
    Refused,
    Submit,
    UnknownPeer,
    VersionRefused,
    Welcome,
)
from ...protocol.sampling import SamplingParams
from ...protocol.transport import LINGER_MS, open_dealer
from .loads import FIRST_TOKEN, VOCAB
from .party import Orders

CONNECT_MS = 20_000
PAUSE_S = 0.002
"""Between two looks at what has arrived: the grain of the measured times."""
PING_S = 4.0
GAP_BIN_MS = 0.1
GAP_BINS = 100_000


@dataclass(frozen=True, slots=True)
class Settings:
    endpoint: str
    open_requests: tuple[int, ...]
    """For each client of this process."""
    prompt_tokens: int
    least_output: int
    most_output: int
    seed: int


@dataclass(frozen=True, slots=True)
class News:
    """Columns of what some Tokens messages brought, one entry a row, and the endings."""

    client: npt.NDArray[np.int64]
    ticket: npt.NDArray[np.int64]
    count: npt.NDArray[np.int32]
    ended: list[tuple[int, dict[str, Any]]]
    """Client and fields of the Ended."""


def read_tokens(messages: list[tuple[int, dict[str, Any]]]) -> News:
    """From clients and the unpacked fields of their Tokens messages; fields at their default do not travel."""
    tickets = [fields.get("ticket", b"") for _, fields in messages]
    clients = np.array([client for client, _ in messages], np.int64)
    return News(
        client=np.repeat(clients, [len(column) // 8 for column in tickets]),
        ticket=np.frombuffer(b"".join(tickets), "<i8"),
        count=np.frombuffer(b"".join(fields.get("count", b"") for _, fields in messages), "<i4"),
        ended=[(client, ended) for client, fields in messages for ended in fields.get("ended", ())],
    )


class Requests:
    """The open requests of all clients as columns. Client c's request number i has ticket i + k · K, where K is the
    most requests that a client has open; its place is c · K + i."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.per_client = max(settings.open_requests)
        places = len(settings.open_requests) * self.per_client
        self.next_ticket = np.tile(np.arange(self.per_client, dtype=np.int64), len(settings.open_requests))
        self._sent_at = np.zeros(places)
        self._last_at = np.zeros(places)
        """0 before the first token."""
        self._wanted = np.zeros(places, np.int64)
        self._received = np.zeros(places, np.int64)
        self._rng = np.random.default_rng(settings.seed)
        self._text = self._rng.integers(FIRST_TOKEN, VOCAB, 1_000_000 + settings.prompt_tokens, np.int32)
        self.forget()

    def forget(self) -> None:
        """Begins the record anew."""
        self.tokens = self.finished = 0
        self.first_token_ms: list[float] = []
        self.gaps = np.zeros(GAP_BINS, np.int64)
        """How often tokens of a request came so long after those before, bins of GAP_BIN_MS."""

    def submit(self, place: int, now: float, at_start: bool = False) -> bytes:
        """The message that opens the next request of a place. At the start, outputs are cut as if the load had gone on
        for a while."""
        settings = self._settings
        output = int(self._rng.integers(settings.least_output, settings.most_output + 1))
        if at_start:
            output = int(self._rng.integers(1, output + 1))
        start = int(self._rng.integers(1_000_000))
        self._wanted[place], self._received[place] = output, 0
        self._sent_at[place], self._last_at[place] = now, 0.0
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        prompt = self._text[start : start + settings.prompt_tokens]
        message = Submit(ticket=int(self.next_ticket[place]), prompt=prompt, sampling=sampling)
        self.next_ticket[place] += self.per_client
        return encode(message)

    def take(self, news: News, now: float) -> list[int]:
        """Enters what came; returns the places whose requests have ended. Raises RuntimeError if one did not bring what
        it should."""
        place = news.client * self.per_client + news.ticket % self.per_client
        np.add.at(self._received, place, news.count)
        self.tokens += int(news.count.sum())
        heard = np.unique(place)
        last = self._last_at[heard]
        begun = last > 0.0
        bins = ((now - last[begun]) * 1e3 / GAP_BIN_MS).astype(np.int64)
        np.add.at(self.gaps, np.minimum(bins, GAP_BINS - 1), 1)
        self.first_token_ms += ((now - self._sent_at[heard[~begun]]) * 1e3).tolist()
        self._last_at[heard] = now
        return [self._end(client, ended) for client, ended in news.ended]

    def _end(self, client: int, ended: dict[str, Any]) -> int:
        place = client * self.per_client + int(ended["ticket"]) % self.per_client
        wanted, received = int(self._wanted[place]), int(self._received[place])
        if ended["reason"] != "length" or not wanted == received == ended.get("completion_tokens", 0):
            raise RuntimeError(f"of {wanted} tokens {received} came, then the request ended with {ended!r}")
        self.finished += 1
        return place


class Clients:
    """All clients of this process, in one loop."""

    def __init__(self, settings: Settings, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._settings = settings
        self._orders = Orders()
        self._requests = Requests(settings)
        self._sockets = [open_dealer(context, settings.endpoint) for _ in settings.open_requests]
        self._index = {socket: client for client, socket in enumerate(self._sockets)}
        self._poller = zmq.Poller()
        self._poller.register(self._orders.fileno(), zmq.POLLIN)
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._begun = time.monotonic()
        self._cpu_s = time.process_time()
        self._messages = 0

    def run(self) -> None:
        """Until the benchmark says that it is over."""
        self._connect()
        self._orders.say("ready")
        pinged = time.monotonic()
        while True:
            readable = self._poller.poll(int(PING_S * 1e3))
            now = time.monotonic()
            tokens: list[tuple[int, dict[str, Any]]] = []
            for socket, _ in readable:
                if isinstance(socket, int):
                    if not self._obey():
                        return
                else:
                    self._receive(socket, tokens)
            self._messages += len(tokens)
            for place in self._requests.take(read_tokens(tokens), now) if tokens else ():
                self._submit(place, now)
            if now - pinged > PING_S:
                pinged = now
                for socket in self._sockets:
                    socket.send(encode(Ping()))
            time.sleep(PAUSE_S)

    def _connect(self) -> None:
        hello = encode(ClientHello(version=PROTOCOL_VERSION, name="simulated"))
        for socket in self._sockets:
            if not socket.poll(CONNECT_MS, zmq.POLLOUT):
                raise TimeoutError(f"no scheduler listens at {self._settings.endpoint}")
            socket.send(hello)
        for socket in self._sockets:
            if not socket.poll(CONNECT_MS):
                raise TimeoutError("the scheduler does not answer")
            decode(socket.recv(), Welcome)

    def _open(self) -> None:
        now = time.monotonic()
        for client, count in enumerate(self._settings.open_requests):
            for request in range(count):
                self._submit(client * self._requests.per_client + request, now, at_start=True)

    def _submit(self, place: int, now: float, at_start: bool = False) -> None:
        self._sockets[place // self._requests.per_client].send(self._requests.submit(place, now, at_start))

    def _receive(self, socket: zmq.Socket[bytes], tokens: list[tuple[int, dict[str, Any]]]) -> None:
        while True:
            try:
                data = socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            name, fields = msgpack.unpackb(data)
            if name == "Tokens":
                tokens.append((self._index[socket], fields))
            elif name not in ("Accepted", "Welcome"):
                raise RuntimeError(
                    f"the scheduler says {decode(data, Refused, Goodbye, UnknownPeer, VersionRefused)!r}"
                )

    def _obey(self) -> bool:
        """False if it is over."""
        for word in self._orders.read():
            if word == "open":
                self._open()
            elif word == "begin":
                self._begun, self._cpu_s, self._messages = time.monotonic(), time.process_time(), 0
                self._requests.forget()
            elif word == "end":
                self._report()
                return False
        return True

    def _report(self) -> None:
        requests = self._requests
        bins = np.flatnonzero(requests.gaps)
        self._orders.say(
            "report",
            seconds=time.monotonic() - self._begun,
            cpu_s=time.process_time() - self._cpu_s,
            messages=self._messages,
            tokens=requests.tokens,
            finished=requests.finished,
            first_token_ms=[round(one, 2) for one in requests.first_token_ms],
            gap_bins=bins.tolist(),
            gap_counts=requests.gaps[bins].tolist(),
        )

    def close(self) -> None:
        goodbye = encode(Goodbye(reason="the benchmark is over"))
        for socket in self._sockets:
            try:
                socket.send(goodbye, zmq.DONTWAIT)
            except zmq.Again:
                pass  # nobody is there who would miss it
            socket.close(LINGER_MS)


def main() -> None:
    settings = TypeAdapter(Settings).validate_json(sys.argv[1])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    clients = Clients(settings, context)
    try:
        clients.run()
    finally:
        clients.close()
        context.term()


if __name__ == "__main__":
    main()
