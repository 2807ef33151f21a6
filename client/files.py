"""Tokenizer files, fetched from the scheduler piece by piece and checked against what was announced."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ..protocol.errors import ConfigurationError, ProtocolError, ServiceUnavailable, TandemError
from ..protocol.messages import FetchFile, FileChunk, FileInfo

PIECE_TIMEOUT_S = 30.0
MAX_FILE_BYTES = 512 * 1024 * 1024


@dataclass(slots=True)
class _Fetch:
    info: FileInfo
    data: bytearray = field(default_factory=bytearray)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: TandemError | None = None


class FileFetcher:
    """The fetches of one connection; `send` sends a message, waiting until there is room for it."""

    def __init__(self, send: Callable[[FetchFile], Awaitable[None]]) -> None:
        self._send = send
        self._open: dict[str, _Fetch] = {}

    async def fetch(self, info: FileInfo) -> bytes:
        """The file's content. Raises ServiceUnavailable if it does not come, and ConfigurationError if it is not what
        was announced. One fetch of a file at a time."""
        if info.size > MAX_FILE_BYTES:
            raise ConfigurationError(f"{info.name} has {info.size} bytes; the limit is {MAX_FILE_BYTES}")
        if info.name in self._open:
            raise RuntimeError(f"{info.name} is being fetched already")
        fetch = self._open[info.name] = _Fetch(info)
        try:
            while len(fetch.data) < info.size:
                await self._fetch_piece(fetch)
        finally:
            del self._open[info.name]
        found = hashlib.sha256(fetch.data).hexdigest()
        if found != info.sha256:
            raise ConfigurationError(f"{info.name} arrived with SHA-256 {found}, announced was {info.sha256}")
        return bytes(fetch.data)

    async def _fetch_piece(self, fetch: _Fetch) -> None:
        before = len(fetch.data)
        fetch.changed.clear()
        try:
            async with asyncio.timeout(PIECE_TIMEOUT_S):
                await self._send(FetchFile(name=fetch.info.name, offset=before))
                await fetch.changed.wait()
        except TimeoutError:
            raise ServiceUnavailable(
                f"{fetch.info.name}: no more than {before} of {fetch.info.size} bytes came from the scheduler"
            ) from None
        if fetch.error is not None:
            raise fetch.error

    def on_chunk(self, chunk: FileChunk) -> None:
        """Takes a piece that arrived."""
        fetch = self._open.get(chunk.name)
        if fetch is None or chunk.offset != len(fetch.data):
            return  # of a fetch that was given up
        if not chunk.data or len(fetch.data) + len(chunk.data) > fetch.info.size:
            fetch.error = ProtocolError(f"{chunk.name}: {len(chunk.data)} bytes at {chunk.offset} of {fetch.info.size}")
        else:
            fetch.data += chunk.data
        fetch.changed.set()

    def ask_again(self) -> None:
        """Asks anew for the pieces that are awaited: whoever was asked is gone."""
        for fetch in self._open.values():
            fetch.changed.set()

    def fail(self, error: TandemError) -> None:
        """Ends all fetches."""
        for fetch in self._open.values():
            fetch.error = error
            fetch.changed.set()
