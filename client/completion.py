"""A streamed answer as its reader holds it: tokens become text here, and letting go of it cancels the request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, cast

from ..protocol.errors import RequestCancelled, RequestTimeout, TandemError
from .results import Chunk, Completion, FinishReason, Timings, Usage

if TYPE_CHECKING:
    from ..protocol.messages import Ended
    from .detokenizer import Detokenizer
    from .stream import History, TokenStream

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Started:
    """A request that was sent."""

    tokens: TokenStream
    detokenizer: Detokenizer | None
    """None if the model has no tokenizer; all text is empty then."""
    stop_ids: frozenset[int]
    """Tokens that end the request, and are no part of its text."""
    cancel: Callable[[TandemError], None]
    """Ends the request with this error, on both ends."""
    loop: asyncio.AbstractEventLoop


class CompletionStream:
    """Iterate over it for chunks; `await result()` for the whole. One task may read it at a time.

        async for chunk in client.stream("Once upon a time", max_tokens=100):
            print(chunk.text, end="")

        async with client.stream("Once upon a time") as stream:
            async for chunk in stream: ...
            completion = await stream.result()

    The request starts with the first read, or on entering the context. It is cancelled by `cancel`, by `aclose`, by
    leaving the context, by cancelling a task that reads, or when nobody holds the stream any more.
    """

    def __init__(self, start: Callable[[], Awaitable[Started]], timeout: float | None) -> None:
        """`start` sends the request; from then on it may take `timeout` seconds."""
        self._start = start
        self._timeout = timeout
        self._deadline: float | None = None
        self._called_at = 0.0
        self._started: Started | None = None
        self._pieces: list[str] = []
        self._completion: Completion | None = None
        self._error: TandemError | None = None
        self._closed = False

    # --- reading ---------------------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._completion is not None or self._closed:
            raise StopAsyncIteration
        return await self._guarded(self._next_chunk)

    async def result(self) -> Completion:
        """Reads what is left and returns the whole answer. Raises what reading raises, and RequestCancelled if the
        stream was closed before its end."""
        while self._completion is None:
            if self._closed:
                raise RequestCancelled("the stream was closed before its end")
            await self._guarded(self._next_chunk)
        return self._completion

    async def collect(self) -> Completion:
        """As `result`, but wakes up only once, at the end; unread tokens pile up meanwhile."""
        await self.start()
        await self._guarded(self._wait_over)
        return await self.result()

    async def start(self) -> None:
        """Sends the request if it was not sent yet. Raises what refuses it on this side; what the service refuses
        is raised when reading."""
        await self._guarded(self._ensure_started)

    # --- ending it early -------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Cancels the request. Its reader gets the tokens that have arrived, then RequestCancelled."""
        error = RequestCancelled("the request was cancelled")
        if self._started is None and self._error is None:
            self._error = error
        self._abandon(error)

    async def aclose(self) -> None:
        """Cancels the request if it is not over, and ends the iteration."""
        self._closed = self._completion is None
        self._abandon(RequestCancelled("the stream was closed"))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        started = getattr(self, "_started", None)
        if started is None or started.tokens.is_over or started.loop.is_closed():
            return
        # This may run on any thread, and in the midst of anything.
        try:
            started.loop.call_soon_threadsafe(started.cancel, RequestCancelled("nobody reads the stream any more"))
        except RuntimeError:
            return  # the loop was closed meanwhile, and the connection with it

    # --- what has come so far --------------------------------------------------------------------------------------

    @property
    def history(self) -> History | None:
        """The request as it was sent and what has arrived of it; None before it was sent."""
        return None if self._started is None else self._started.tokens.history

    @property
    def text(self) -> str:
        """All text that has been read."""
        return "".join(self._pieces)

    # --- within ----------------------------------------------------------------------------------------------------

    async def _guarded(self, step: Callable[[], Awaitable[_T]]) -> _T:
        """One step of reading: within the deadline, and whatever ends it early ends the request."""
        if self._error is not None:
            raise self._error
        loop = asyncio.get_running_loop()
        if self._called_at == 0.0:
            self._called_at = loop.time()
            self._deadline = None if self._timeout is None else self._called_at + self._timeout
        try:
            async with asyncio.timeout_at(self._deadline):
                return await step()
        except TimeoutError:
            self._error = RequestTimeout(f"the request did not end within the timeout of {self._timeout:g} s")
            self._abandon(self._error)
            raise self._error from None
        except asyncio.CancelledError:
            self._closed = True
            self._abandon(RequestCancelled("the task that read the stream was cancelled"))
            raise
        except TandemError as error:
            self._error = error
            raise

    async def _ensure_started(self) -> Started:
        if self._started is None:
            self._started = await self._start()
            if self._closed or self._error is not None:  # ended by another task while the request was being sent
                self._abandon(self._error or RequestCancelled("the stream was closed"))
        return self._started

    async def _wait_over(self) -> None:
        await (await self._ensure_started()).tokens.wait_over()

    async def _next_chunk(self) -> Chunk:
        started = await self._ensure_started()
        tokens = started.tokens
        offset = tokens.offset
        ids = await tokens.read()
        over = tokens.ended is not None and tokens.offset == len(tokens.history.generated)
        visible = ids[:-1] if ids and ids[-1] in started.stop_ids else ids
        text = ""
        if started.detokenizer is not None:
            text = started.detokenizer.push(visible)
            if over:
                text += started.detokenizer.finish()
        self._pieces.append(text)
        if not over:
            return Chunk(text, ids, offset)
        completion = self._completion = self._complete(tokens, cast("Ended", tokens.ended))
        return Chunk(text, ids, offset, completion.finish_reason)

    def _complete(self, tokens: TokenStream, ended: Ended) -> Completion:
        history = tokens.history
        now = asyncio.get_running_loop().time()
        return Completion(
            text=self.text,
            token_ids=list(history.generated),
            finish_reason=cast(FinishReason, ended.reason),
            usage=Usage(ended.prompt_tokens, ended.completion_tokens, ended.cached_tokens),
            timings=Timings(
                queue_s=ended.queue_s,
                first_token_s=ended.first_token_s,
                total_s=ended.total_s,
                client_first_token_s=(tokens.first_token_at or now) - self._called_at,
                client_total_s=now - self._called_at,
            ),
            prompt_token_ids=history.prompt.tolist(),
            seed=history.sampling.seed,
        )

    def _abandon(self, error: TandemError) -> None:
        if self._started is not None and not self._started.tokens.is_over:
            self._started.cancel(error)
