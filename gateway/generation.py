"""One HTTP request's prompts as one stream of pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypeVar

from ..client.completion import CompletionStream
from ..client.results import Chunk, Completion
from .fields import StreamOptions

_T = TypeVar("_T")

WAITING_PIECES = 256
"""How many pieces of several prompts may wait for a slow reader; then their streams fill up behind them."""

Piece = tuple[int, Chunk]
"""Which prompt, and the news of one of its samples."""


async def pieces(streams: Sequence[CompletionStream]) -> AsyncGenerator[Piece]:
    """The news of all streams as they come. The first failure is raised; however it ends, all requests end with it."""
    try:
        if len(streams) == 1:
            async for chunk in streams[0]:
                yield 0, chunk
            return
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(WAITING_PIECES)
        readers: list[asyncio.Task[None]] = []
        readers.append(asyncio.create_task(_read_all(streams, queue, readers)))
        try:
            left = len(streams)
            while left:
                found = await queue.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield found
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
    finally:
        for stream in streams:
            await stream.aclose()


async def _read_all(
    streams: Sequence[CompletionStream],
    queue: asyncio.Queue[Piece | BaseException | None],
    readers: list[asyncio.Task[None]],
) -> None:
    """Starts the requests and a reader for each."""
    try:
        async for index, stream in _started(streams):
            readers.append(asyncio.create_task(_read(index, stream, queue)))
    except Exception as error:  # noqa: BLE001  (raised by the one who takes it from the queue)
        await queue.put(error)


async def _started(streams: Sequence[CompletionStream]) -> AsyncIterator[tuple[int, CompletionStream]]:
    """Starts them in order, and lets the loop do other things after each: two thousand prompts in a row, tokenized and
    sent, would hold up everybody else's tokens."""
    for index, stream in enumerate(streams):
        await stream.start()
        yield index, stream
        await asyncio.sleep(0)


async def _read(index: int, stream: CompletionStream, queue: asyncio.Queue[Piece | BaseException | None]) -> None:
    try:
        async for chunk in stream:
            await queue.put((index, chunk))
    except Exception as error:  # noqa: BLE001  (raised by the one who takes it from the queue)
        await queue.put(error)
    else:
        await queue.put(None)


class UsageSoFar:
    """What the requests of a stream have used up to now, of all their samples together."""

    def __init__(self, streams: Sequence[CompletionStream]) -> None:
        self._streams = streams
        self._completion_tokens = 0

    def add(self, chunk: Chunk) -> None:
        self._completion_tokens += len(chunk.token_ids)

    def so_far(self) -> dict[str, int]:
        """As events tell it; of prompts, those that have begun."""
        histories = [stream.history for stream in self._streams]
        prompt = sum(len(history.prompt) for history in histories if history is not None)
        output = self._completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def continuous_usage(options: StreamOptions | None, streams: Sequence[CompletionStream]) -> UsageSoFar | None:
    """None unless every event is to tell the usage."""
    return UsageSoFar(streams) if options is not None and options.continuous_usage_stats else None


async def begun(items: AsyncGenerator[_T]) -> AsyncIterator[_T]:
    """Waits for the first item, so that what refuses the request is raised here; the iterator gives all of them."""
    first = await anext(items)
    return _again(first, items)


async def _again(first: _T, rest: AsyncGenerator[_T]) -> AsyncIterator[_T]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


async def completions(streams: Sequence[CompletionStream]) -> list[Completion]:
    """All answers, whole. The first failure is raised at once, though others have yet to begin, and ends them all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(stream.collect()) async for _, stream in _started(streams)]
        return [task.result() for task in tasks]
    except BaseExceptionGroup as failed:
        first = failed.exceptions[0]
        raise first from first.__cause__  # the group says nothing more
    finally:
        for stream in streams:
            await stream.aclose()
