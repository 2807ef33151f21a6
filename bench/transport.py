"""`python -m tandem.bench.transport`: what a message costs over ipc, over loopback TCP without keys, and with them.

Round trips between a DEALER and a ROUTER that answers from an asyncio loop, as the scheduler does (medians), and
messages sent one way as fast as they are taken: how many a second, and the processor time of both ends for each. With
`--system`, a whole system too: scheduler, worker and one client, each transport between all of them by turns.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from ..client.aio import AsyncClient
from ..launch.keys import ROLES, KeyDirectory
from ..launch.supervisor import PassThrough
from ..launch.system import System
from ..protocol.keys import PeerKeys, ServerKeys, peer_keys, server_keys
from ..protocol.transport import Address, LoopSocket, open_dealer, open_router
from ..scheduler.admission import Admission
from .findings import write_findings

SIZES = (64, 1_024, 16_384)
"""Bytes of a message: a steady step's plan, a large one, a long prompt."""
ROUND_TRIPS = 3_000
WARM_UP = 300
ONE_WAY = 20_480
WINDOW = 256
"""Messages on their way at most, less than a queue takes."""
STREAMS = 16


@dataclass(frozen=True)
class Transport:
    """A way between two processes of this machine."""

    name: str
    keys: Path | None = None
    """A key directory with everybody's keys."""

    def address(self, folder: Path) -> Address:
        """Where nobody listens yet."""
        if self.name == "ipc":
            return Address(f"ipc://{folder}/{secrets.token_hex(4)}")
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Address(f"tcp://127.0.0.1:{server.getsockname()[1]}")

    @property
    def access(self) -> dict[str, Any]:
        """Options of whoever connects."""
        if self.name == "ipc":
            return {}
        return {"insecure": True} if self.keys is None else {"keys": str(self.keys)}

    def of_clients(self, address: Address) -> PeerKeys | None:
        return peer_keys(address, "clients", self.access.get("keys"), "insecure" in self.access)

    def of_server(self) -> ServerKeys | None:
        return None if self.keys is None else server_keys(self.keys)


def transports(folder: Path) -> list[Transport]:
    """All of them; the keys are made in `folder`."""
    directory = KeyDirectory(folder / "keys", make=True)
    directory.create_server()
    for port in ROLES.values():
        directory.create(port, "default")
    return [Transport("ipc"), Transport("tcp"), Transport("tcp, keys", folder / "keys")]


@contextmanager
def pair(
    transport: Transport, folder: Path, on_message: Callable[[LoopSocket, list[bytes]], None]
) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER, connected to a ROUTER that a thread's loop drives."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = transport.address(folder)
    if address.is_ipc:
        address.directory.mkdir(mode=0o700)
    ready, over = threading.Event(), asyncio.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        admission = None if transport.keys is None else Admission(transport.keys, context, loop)
        router = open_router(context, address.endpoint("clients"), keys=transport.of_server())
        served = LoopSocket(router, lambda frames: on_message(served, frames))
        stop.append(lambda: loop.call_soon_threadsafe(over.set))
        ready.set()
        await over.wait()
        served.close(0)
        if admission is not None:
            admission.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="router")
    thread.start()
    ready.wait()
    dealer = open_dealer(context, address.endpoint("clients"), transport.of_clients(address))
    try:
        yield dealer
    finally:
        dealer.close(0)
        stop[0]()
        thread.join()
        context.term()


def round_trip_s(transport: Transport, folder: Path, size: int, count: int) -> float:
    """Median of a message of `size` bytes each way."""

    def answer(served: LoopSocket, frames: list[bytes]) -> None:
        served.send(frames)

    with pair(transport, folder, answer) as dealer:
        message, times = bytes(size), []
        for _ in range(WARM_UP + count):
            begun = time.perf_counter()
            dealer.send(message)
            dealer.recv()
            times.append(time.perf_counter() - begun)
    return statistics.median(times[WARM_UP:])


def one_way_s(transport: Transport, folder: Path, size: int, count: int) -> tuple[float, float]:
    """For each message of `size` bytes, sent as fast as they are taken: seconds, and processor seconds of both ends
    with ZeroMQ's threads."""
    taken = 0

    def take(served: LoopSocket, frames: list[bytes]) -> None:
        nonlocal taken
        taken += 1
        if taken % (WINDOW // 2) == 0:
            served.send([frames[0], b"go on"])

    with pair(transport, folder, take) as dealer:
        message = bytes(size)
        dealer.send(message)  # waits for the connection
        begun, used = time.perf_counter(), time.process_time()
        for sent in range(2, count + 1):
            dealer.send(message)
            if sent % (WINDOW // 2) == 0 and sent >= WINDOW:
                dealer.recv()
        dealer.recv()
        spent = time.perf_counter() - begun, time.process_time() - used
    return spent[0] / count, spent[1] / count


def tokens_per_s(transport: Transport, folder: Path, options: argparse.Namespace) -> float:
    """Of a system whose worker and client both use the transport."""
    address = transport.address(folder)
    places: dict[str, Any] = {"address": address.url}
    if not address.is_ipc:
        places["worker_address"] = transport.address(folder).url
    quiet = {"log_level": "warning", **transport.access}
    worker: dict[str, Any] = {**quiet, "device": options.device, "max_num_seqs": STREAMS}
    if options.model is not None:
        worker["model"] = options.model
    system = System({**quiet, **places}, worker, listener=PassThrough())
    try:
        system.start()
        return asyncio.run(_load(address.url, transport.access, options.output_tokens))
    finally:
        system.stop()


async def _load(address: str, access: dict[str, Any], output_tokens: int) -> float:
    async with AsyncClient(address, **access) as client:

        async def stream(index: int, tokens: int) -> int:
            prompt = [5 + (7 * index + position) % 100 for position in range(32)]
            request = client.stream(prompt, temperature=0.0, max_tokens=tokens, ignore_eos=True)
            return sum([len(chunk.token_ids) async for chunk in request])

        await asyncio.gather(*(stream(i, 16) for i in range(STREAMS)))
        begun = time.monotonic()
        counts = await asyncio.gather(*(stream(i, output_tokens) for i in range(STREAMS)))
        return sum(counts) / (time.monotonic() - begun)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.transport", description=__doc__)
    parser.add_argument("--round-trips", type=int, default=ROUND_TRIPS)
    parser.add_argument("--one-way", type=int, default=ONE_WAY, help=f"messages, a multiple of {WINDOW // 2}")
    parser.add_argument("--system", action="store_true", help="tokens/s of a whole system as well")
    parser.add_argument("--repeats", type=int, default=3, help="of the system, of which the medians are shown")
    parser.add_argument("--output-tokens", type=int, default=200, help="of each of the system's 16 streams")
    parser.add_argument("--model", default=None, help="Hub id or folder (default: the built-in model)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--out", default=None, help="JSON file to write")
    options = parser.parse_args(argv)
    for name in ("round_trips", "repeats", "output_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1, not {getattr(options, name)}")
    if options.one_way < WINDOW or options.one_way % (WINDOW // 2):
        parser.error(f"--one-way: must be a multiple of {WINDOW // 2} and at least {WINDOW}, not {options.one_way}")
    found: dict[str, Any] = {"messages": [], "system_tokens_per_s": {}}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as made:
        folder = Path(made)
        ways = transports(folder)
        print(f"{'bytes':>7} {'':>10} {'round trip':>12} {'one way':>12} {'CPU':>12}   against ipc")
        for size in SIZES:
            first: list[float] = []
            for way in ways:
                spent = [round_trip_s(way, folder, size, options.round_trips)]
                spent += one_way_s(way, folder, size, options.one_way)
                first = first or spent
                ratios = [one / other for one, other in zip(spent, first, strict=True)]
                found["messages"].append({"bytes": size, "transport": way.name, "us": [1e6 * one for one in spent]})
                print(
                    f"{size:>7} {way.name:>10}",
                    *(f"{1e6 * one:>9.1f} µs" for one in spent),
                    "  " + " ".join(f"{ratio:.2f}" for ratio in ratios),
                )
        if options.system:
            runs: dict[str, list[float]] = {way.name: [] for way in ways}
            for _ in range(options.repeats):
                for way in ways:
                    runs[way.name].append(tokens_per_s(way, folder, options))
            found["system_tokens_per_s"] = runs
            base = statistics.median(runs["ipc"])
            for name, rates in runs.items():
                rate = statistics.median(rates)
                print(f"system over {name:>9}: {rate:.0f} tokens/s, {rate / base:.3f} of ipc")
    write_findings(options, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
