"""`python -m tandem.bench.transport`: what a message costs over ipc, and over loopback TCP with keys.

Round trips between a DEALER and a ROUTER that answers from an asyncio loop, as the scheduler does; medians.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from ..protocol.keys import PeerKeys, ServerKeys
from ..protocol.transport import LoopSocket, open_dealer, open_router
from ..scheduler.admission import Admission

SIZES = (64, 1_024, 16_384)
"""Bytes of a message: a steady step's plan, a large one, a long prompt."""
ROUND_TRIPS = 3_000
WARM_UP = 300


def measure(endpoint: str, size: int, keys: tuple[ServerKeys, PeerKeys, Path] | None) -> float:
    """Median seconds of a round trip of `size` bytes each way."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ready, over = threading.Event(), asyncio.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        admission = None if keys is None else Admission(keys[2], context, loop)
        router = open_router(context, endpoint, keys=None if keys is None else keys[0])

        def answer(frames: list[bytes]) -> None:
            socket.send(frames)

        socket = LoopSocket(router, answer)
        stop.append(lambda: loop.call_soon_threadsafe(over.set))
        ready.set()
        await over.wait()
        socket.close(0)
        if admission is not None:
            admission.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="router")
    thread.start()
    ready.wait()
    dealer = open_dealer(context, endpoint, None if keys is None else keys[1])
    message, times = bytes(size), []
    for _ in range(WARM_UP + ROUND_TRIPS):
        begun = time.perf_counter()
        dealer.send(message)
        dealer.recv()
        times.append(time.perf_counter() - begun)
    dealer.close(0)
    stop[0]()
    thread.join()
    context.term()
    return statistics.median(times[WARM_UP:])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server, peer = zmq.curve_keypair(), zmq.curve_keypair()
        listed = Path(folder) / "keys" / "clients" / "bench.pub"
        listed.parent.mkdir(parents=True, mode=0o700)
        listed.touch(mode=0o600)
        listed.write_bytes(peer[0])
        keys = (
            ServerKeys(server[0].decode(), server[1].decode()),
            PeerKeys(peer[0].decode(), peer[1].decode(), server[0].decode()),
            listed.parents[1],
        )
        print(f"{'bytes':>7} {'ipc':>10} {'tcp, keys':>10} {'ratio':>6}")
        for size in SIZES:
            ipc = measure(f"ipc://{folder}/socket", size, None)
            curve = measure("tcp://127.0.0.1:17411", size, keys)
            print(f"{size:>7} {ipc * 1e6:>7.0f} µs {curve * 1e6:>7.0f} µs {curve / ipc:>6.2f}")


if __name__ == "__main__":
    main()
