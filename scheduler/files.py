"""Tokenizer files on their way from the first worker, through the scheduler, to every client."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from ..protocol.errors import ProtocolError
from ..protocol.messages import FetchFile, FileChunk, FileInfo

CHUNK_BYTES = 64 * 1024
MAX_TOTAL_BYTES = 256 * 1024 * 1024
"""All tokenizer files of a model together; the largest known is about 40 MB."""


class FileStore:
    """The files of the service's model: announced by a worker, fetched from it piece by piece, then handed out."""

    def __init__(self, infos: Iterable[FileInfo]) -> None:
        """Raises ProtocolError if the files are too large or two have one name."""
        self.infos = tuple(infos)
        if self.total_bytes > MAX_TOTAL_BYTES:
            raise ProtocolError(
                f"the tokenizer files have {self.total_bytes} bytes, over the limit of {MAX_TOTAL_BYTES}"
            )
        if len({info.name for info in self.infos}) != len(self.infos):
            raise ProtocolError("two tokenizer files have the same name")
        self._data = {info.name: bytearray() for info in self.infos}

    @property
    def total_bytes(self) -> int:
        return sum(info.size for info in self.infos)

    @property
    def missing(self) -> FetchFile | None:
        """What to ask the worker for next; None once everything is here and has the announced hash."""
        for info in self.infos:
            have = len(self._data[info.name])
            if have < info.size:
                return FetchFile(name=info.name, offset=have)
        return None

    def add(self, chunk: FileChunk) -> None:
        """Appends a piece; ignores one that is not due, since a question asked twice is answered twice. Raises
        ProtocolError if a file turns out to have another size or hash than was announced."""
        wanted = self.missing
        if wanted is None or (chunk.name, chunk.offset) != (wanted.name, wanted.offset):
            return
        if not chunk.data:
            raise ProtocolError(f"file {chunk.name!r} ends at {chunk.offset} bytes, before its announced size")
        info = next(info for info in self.infos if info.name == chunk.name)
        data = self._data[chunk.name]
        data += chunk.data
        if len(data) > info.size or (len(data) == info.size and hashlib.sha256(data).hexdigest() != info.sha256):
            raise ProtocolError(f"file {chunk.name!r} is not what was announced")

    def chunk(self, name: str, offset: int) -> FileChunk:
        """A piece for a client; empty if there is no such file or nothing from `offset` on."""
        return FileChunk(name=name, offset=offset, data=bytes(self._data.get(name, b"")[offset : offset + CHUNK_BYTES]))
