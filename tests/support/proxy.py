"""A TCP proxy between two real endpoints, which a test has cut, hold or swallow what goes through it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from support.deadlines import DEADLINE_S

PIECE_BYTES = 65_536
_RESET = struct.pack("ii", 1, 0)
"""Linger for no time: closing sends RST."""


class Proxy:
    """Forwards 127.0.0.1:`port` to another port of this machine, from a thread of its own. Everything but `port` and
    `connections` may be called from any thread and returns when it is done."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.turned_away = 0
        """Connections that were ended because nobody was at the target."""
        self._open: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(DEADLINE_S):
            raise TimeoutError("the proxy does not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def connections(self) -> int:
        return len(self._open)

    def cut(self) -> None:
        """Ends every connection with a reset; new ones are forwarded as before."""
        self._on_loop(self._cut)

    def hold(self) -> None:
        """Forwards nothing more, and tells nobody. What was sent meanwhile arrives after `release`."""
        self._on_loop(self._flowing.clear)

    def release(self) -> None:
        self._on_loop(self._flowing.set)

    def _on_loop(self, call: object) -> None:
        done: Future[None] = Future()

        def run() -> None:
            call()  # type: ignore[operator]
            done.set_result(None)

        self._loop.call_soon_threadsafe(run)
        done.result(DEADLINE_S)

    # --- on the thread -----------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        server = await asyncio.start_server(self._accept, sock=self._listener)
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            self.turned_away += 1
            writer.transport.abort()  # as the target itself would refuse
            return
        pair = writer, there_writer
        self._open.add(pair)
        both = [
            asyncio.create_task(self._forward(reader, there_writer)),
            asyncio.create_task(self._forward(there_reader, writer)),
        ]
        self._tasks.update(both)
        for task in both:
            task.add_done_callback(self._tasks.discard)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        self._open.discard(pair)
        for end in pair:
            end.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(PIECE_BYTES):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            return

    def _cut(self) -> None:
        for pair in self._open:
            for end in pair:
                peer = end.get_extra_info("socket")
                if peer is not None and not end.transport.is_closing():
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.transport.abort()
