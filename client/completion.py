"""A streamed answer as its reader holds it: tokens become text here, and letting go of it cancels the request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar, cast

from ..protocol.errors import RequestCancelled, RequestTimeout, TandemError
from .news import News
from .results import Choice, Chunk, Completion, FinishReason, PositionLogprobs, Timings, Usage
from .stopping import StopStrings

if TYPE_CHECKING:
    from .detokenizer import Detokenizer
    from .logprobs import LogprobReader
    from .stream import History, TokenStream

_T = TypeVar("_T")


LATE_S: Final = 1.0
"""The scheduler ends a request in time and says what it took; the client waits this much longer for it to say so."""


SETTLE_S: Final = 1.0
"""How long a request that a stop string ended waits to be told what it took (cached tokens, times)."""


@dataclass(frozen=True, slots=True)
class TextEnd:
    """Where a request's texts end."""

    stop_ids: frozenset[int]
    """Tokens that end a sample."""
    named: frozenset[int]
    """Those of them that the caller named, rather than the model: they are told as stop_reason."""
    stops: tuple[str, ...] = ()
    include: bool = False
    """What ended a text is part of it."""
    min_tokens: int = 0
    """In the text of so many tokens no stop string is looked for."""


class Sample:
    """One of a request's samples, as far as it has been read."""

    def __init__(
        self,
        index: int,
        tokens: TokenStream,
        detokenizer: Detokenizer | None,
        end: TextEnd,
        stop: Callable[[TokenStream], None],
        logprobs: LogprobReader,
    ) -> None:
        """Without a detokenizer (the model has no tokenizer) all text is empty. `stop` ends the request well."""
        self.index = index
        self.tokens = tokens
        self.is_read = False
        """Its end has been read."""
        self._detokenizer = detokenizer
        self._end = end
        self._stop = stop
        self._logprobs = logprobs
        self._stops = None if not end.stops else StopStrings(end.stops, include=end.include)
        self._kept: int | None = None
        """How many tokens there are up to the end of a stop string that was found."""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text that has been read."""
        return "".join(self._pieces)

    @property
    def token_ids(self) -> list[int]:
        """All tokens that belong to the answer, read or not."""
        return list(self.tokens.history.generated[: self._kept])

    @property
    def reason(self) -> FinishReason:
        """Why it ended; "timeout" as well for one that has not ended, at the client's own deadline."""
        if self._kept is not None:
            return "stop"
        ended = self.tokens.ended
        return "timeout" if ended is None else cast(FinishReason, ended.reason)

    @property
    def stop_reason(self) -> int | str | None:
        """See Choice.stop_reason."""
        if self._stops is not None and self._stops.found is not None:
            return self._stops.found
        generated = self.tokens.history.generated
        if self.reason == "stop" and generated and generated[-1] in self._end.named:
            return generated[-1]
        return None

    async def next_chunk(self) -> Chunk:
        """Reads what has come. Must have news."""
        tokens = self.tokens
        offset = tokens.offset
        ids = tokens.take()
        text = self._push(ids)
        if self._kept is None:
            if tokens.ended is None or tokens.offset < len(tokens.history.generated):
                return Chunk(text, ids, offset, None, self.index, None, self.logprobs(offset, offset + len(ids)))
            text += self._finish()
        if self._kept is not None:
            ids = ids[: self._kept - offset]
            self._stop(tokens)
            await tokens.settled(SETTLE_S)
        logprobs = self.logprobs(offset, offset + len(ids))
        return Chunk(text, ids, offset, self.reason, self.index, self.stop_reason, logprobs)

    def read_rest(self) -> None:
        """Takes what has come for all there will be."""
        if not self.is_read:
            self._push(self.tokens.history.generated[self.tokens.offset :], self.tokens.offset)
            self._finish()

    def choice(self) -> Choice:
        logprobs = self.logprobs(0, self._kept)
        return Choice(self.index, self.text, self.token_ids, self.reason, self.stop_reason, logprobs)

    def logprobs(self, begin: int, end: int | None) -> list[PositionLogprobs] | None:
        """Of the tokens from `begin` to `end`; None if they were not asked for."""
        history = self.tokens.history
        return None if history.sampling.logprobs is None else self._logprobs.positions(history.told[begin:end])

    @property
    def prompt_logprobs(self) -> list[PositionLogprobs | None] | None:
        """As far as they came; None if they were not asked for."""
        history = self.tokens.history
        return [None, *self._logprobs.positions(history.prompt_told)] if history.wants_prompt_told else None

    def _push(self, ids: list[int], offset: int | None = None) -> str:
        """The text of the next tokens, which are those just read or begin at `offset`."""
        if self._detokenizer is None:
            return ""
        hides = bool(ids) and ids[-1] in self._end.stop_ids and not self._end.include
        visible = ids[:-1] if hides else ids
        if self._stops is None:
            return self._keep(self._detokenizer.push(visible))
        begin = self.tokens.offset - len(ids) if offset is None else offset
        pieces = []
        for i, id_ in enumerate(visible):
            text = self._detokenizer.push([id_])
            pieces.append(text if begin + i < self._end.min_tokens else self._stops.push(text))
            if self._stops.found is not None:
                self._end_at(begin + i + 1)
                break
        return self._keep("".join(pieces))

    def _finish(self) -> str:
        """What was held back, now that no token follows."""
        if self.is_read:
            return ""
        self.is_read = True
        text = "" if self._detokenizer is None else self._detokenizer.finish()
        if self._stops is not None:
            text = self._stops.push(text)
            if self._stops.found is not None:
                self._end_at(len(self.tokens.history.generated))
            text += self._stops.finish()
        return self._keep(text)

    def _end_at(self, count: int) -> None:
        self._kept = count
        self.is_read = True

    def _keep(self, text: str) -> str:
        self._pieces.append(text)
        return text


@dataclass(frozen=True, slots=True)
class Started:
    """A request that was sent."""

    samples: list[Sample]
    watches_text: bool
    """A stop string may end it: it is to be read as it comes."""
    cancel: Callable[[TokenStream, TandemError], None]
    """Ends a sample with this error, on both ends."""
    loop: asyncio.AbstractEventLoop

    @property
    def is_over(self) -> bool:
        """All samples have ended, well or not."""
        return all(sample.tokens.is_over for sample in self.samples)

    def abandon(self, error: TandemError) -> None:
        """Ends what has not ended."""
        for sample in self.samples:
            if not sample.tokens.is_over:
                self.cancel(sample.tokens, error)


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

    def __init__(self, start: Callable[[float | None], Awaitable[Started]], timeout: float | None) -> None:
        """`start` sends the request, told the loop time by which it must have ended: `timeout` seconds from the first
        read on."""
        self._start = start
        self._timeout = timeout
        self._deadline: float | None = None
        self._called_at = 0.0
        self._started: Started | None = None
        self._news = News()
        self._turn = 0
        self._completion: Completion | None = None
        self._error: TandemError | None = None
        self._closed = False

    # --- reading ---------------------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._completion is not None or self._closed:
            raise StopAsyncIteration
        if self._started is None:
            await self.start()
        return await self._guarded(self._next_chunk)

    async def result(self) -> Completion:
        """Reads what is left and returns the whole answer. Raises what reading raises, and RequestCancelled if the
        stream was closed before its end."""
        while self._completion is None:
            if self._closed:
                raise RequestCancelled("the stream was closed before its end")
            await self.start()
            await self._guarded(self._next_chunk)
        return self._completion

    async def collect(self) -> Completion:
        """As `result`, but wakes up only once, at the end, unless a stop string may end it; unread tokens pile up
        meanwhile."""
        await self.start()
        await self._guarded(self._wait_over)
        return await self.result()

    async def start(self) -> None:
        """Sends the request if it was not sent yet. Raises what refuses it on this side; what the service refuses
        is raised when reading."""
        if self._started is None:
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
        if started is None or started.is_over or started.loop.is_closed():
            return
        # This may run on any thread, and in the midst of anything.
        try:
            started.loop.call_soon_threadsafe(started.abandon, RequestCancelled("nobody reads the stream any more"))
        except RuntimeError:
            return  # the loop was closed meanwhile, and the connection with it

    # --- what has come so far --------------------------------------------------------------------------------------

    @property
    def history(self) -> History | None:
        """The request as it was sent and what has arrived of it (of its first sample); None before it was sent."""
        return None if self._started is None else self._started.samples[0].tokens.history

    @property
    def text(self) -> str:
        """All text that has been read, of the first sample."""
        return "" if self._started is None else self._started.samples[0].text

    # --- within ----------------------------------------------------------------------------------------------------

    async def _guarded(self, step: Callable[[], Awaitable[_T]]) -> _T:
        """One step of reading: within the deadline, and whatever ends it early ends the request."""
        if self._error is not None:
            raise self._error
        if self._called_at == 0.0:
            self._called_at = asyncio.get_running_loop().time()
            self._deadline = None if self._timeout is None else self._called_at + self._timeout
        sent = self._started is not None
        try:
            if self._deadline is None:
                return await step()
            async with asyncio.timeout_at(self._deadline + (LATE_S if sent else 0.0)):
                return await step()
        except TimeoutError:
            self._error = self._out_of_time()
            self._abandon(self._error)
            raise self._error from None
        except asyncio.CancelledError:
            self._closed = True
            self._abandon(RequestCancelled("the task that read the stream was cancelled"))
            raise
        except TandemError as error:
            self._error = error
            self._abandon(error)  # the other samples
            raise

    async def _ensure_started(self) -> Started:
        if self._started is None:
            self._started = await self._start(self._deadline)
            for sample in self._started.samples:
                sample.tokens.on_news = self._news.tell
            if self._closed or self._error is not None:  # ended by another task while the request was being sent
                self._abandon(self._error or RequestCancelled("the stream was closed"))
        return self._started

    async def _wait_over(self) -> None:
        """Until all samples have ended, or one has failed: that fails the others."""
        started = await self._ensure_started()
        while not (
            started.watches_text
            or started.is_over
            or any(sample.tokens.error is not None for sample in started.samples)
        ):
            await self._news.wait()

    async def _next_chunk(self) -> Chunk:
        started = self._started or await self._ensure_started()
        while (sample := self._with_news(started.samples)) is None:
            await self._news.wait()
        self._turn = sample.index + 1
        chunk = await sample.next_chunk()
        if chunk.finish_reason is not None and all(one.is_read for one in started.samples):
            completion = self._complete(started)
            if any(choice.finish_reason == "timeout" for choice in completion.choices):
                self._error = self._out_of_time(completion)  # for the next read
            else:
                self._completion = completion
        return chunk

    def _with_news(self, samples: list[Sample]) -> Sample | None:
        """The next one that can be read, in turns: one that is never short of news does not hold the others up. An
        error comes after everything that has arrived."""
        if len(samples) == 1:
            return samples[0] if samples[0].tokens.has_news and not samples[0].is_read else None
        failed = None
        for sample in (*samples[self._turn :], *samples[: self._turn]):
            if not sample.is_read and sample.tokens.has_news:
                if not sample.tokens.is_spent:
                    return sample
                failed = failed or sample
        return failed

    def _out_of_time(self, completion: Completion | None = None) -> RequestTimeout:
        """The error, with what has come."""
        if completion is None and self._started is not None:
            for sample in self._started.samples:
                sample.read_rest()
            completion = self._complete(self._started)
        limit = "its timeout" if self._timeout is None else f"the timeout of {self._timeout:g} s"
        return RequestTimeout(f"the request did not end within {limit}", completion=completion)

    def _complete(self, started: Started) -> Completion:
        now = asyncio.get_running_loop().time()
        choices = [sample.choice() for sample in started.samples]
        first = started.samples[0].tokens
        history, ended = first.history, first.ended
        ends = [sample.tokens.ended for sample in started.samples]
        return Completion(
            text=choices[0].text,
            token_ids=choices[0].token_ids,
            finish_reason=choices[0].finish_reason,
            choices=choices,
            usage=Usage(
                prompt_tokens=len(history.prompt),
                completion_tokens=sum(len(choice.token_ids) for choice in choices),
                cached_tokens=0 if ended is None else ended.cached_tokens,
            ),
            timings=Timings(
                queue_s=0.0 if ended is None else ended.queue_s,
                first_token_s=0.0 if ended is None else ended.first_token_s,
                total_s=max((end.total_s for end in ends if end is not None), default=0.0),
                client_first_token_s=(first.first_token_at or now) - self._called_at,
                client_total_s=now - self._called_at,
            ),
            prompt_token_ids=history.prompt.tolist(),
            seed=history.sampling.seed,
            logprobs=choices[0].logprobs,
            prompt_logprobs=started.samples[0].prompt_logprobs,
        )

    def _abandon(self, error: TandemError) -> None:
        if self._started is not None:
            self._started.abandon(error)
