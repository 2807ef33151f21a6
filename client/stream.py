"""One request's tokens as they arrive: nothing missing, nothing twice, never more unread than a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..protocol.errors import OffsetError, ProtocolError, RequestCancelled, RequestFailed, TandemError
from ..protocol.messages import CLEARING_TOKENS, Ended, ModelDescription, Submit
from ..protocol.sampling import SamplingParams
from .logprobs import Told
from .news import News

MAX_UNREAD_TOKENS = 65_536
"""A reader that leaves more tokens than this unread loses its request."""
SHORTEST_TIMEOUT_S = 0.001
LONGEST_TIMEOUT_S = 1e9
"""The longest that the protocol knows."""


@dataclass(slots=True)
class History:
    """All there is to know of a request: enough to go on with it elsewhere, from the token after the last one here."""

    prompt: npt.NDArray[np.int32]
    sampling: SamplingParams
    """As sent, with the seed."""
    sample: int = 0
    """Which of the samples of its prompt; decides the random numbers together with the seed."""
    priority: int = 0
    cache_salt: str = ""
    deadline: float | None = None
    """Loop time at which the scheduler is to end it."""
    generated: list[int] = field(default_factory=list)
    """Tokens received so far, read or not."""
    told: list[Told] = field(default_factory=list)
    """Log-probabilities of each of them, if they were asked for."""
    prompt_told: list[Told] = field(default_factory=list)
    """Of the prompt's tokens from the second on, if they were asked for. Complete before the first token comes."""
    epoch: int | None = None
    number: int | None = None
    """What the scheduler of `epoch` calls the request, once it accepted it."""
    model: ModelDescription | None = None
    """What was served when it was first sent."""
    suspicions: int = 0
    """How often a worker died with this request in its launched steps, as the scheduler told."""
    suspected_at: int = 0
    """Tokens that had been received when it last told so."""

    @property
    def wants_prompt_told(self) -> bool:
        """The prompt is told with the first of its samples."""
        return self.sampling.prompt_logprobs is not None and self.sample == 0

    def submission(self, ticket: int, n: int = 1, *, resumed: bool = False) -> Submit:
        """The message that starts the request or, if `resumed`, goes on with it after the tokens received. With `n` it
        starts that many samples, of which this is the first; they get tickets from `ticket` on. To be called on the
        client's loop: what is left until the deadline is counted from now."""
        left = None
        if self.deadline is not None:
            left = min(max(self.deadline - asyncio.get_running_loop().time(), SHORTEST_TIMEOUT_S), LONGEST_TIMEOUT_S)
        cleared = len(self.generated) - self.suspected_at >= CLEARING_TOKENS
        return Submit(
            ticket=ticket,
            prompt=self.prompt,
            sampling=self.sampling,
            generated=np.array(self.generated, np.int32),
            n=n,
            sample=self.sample,
            priority=self.priority,
            timeout_s=left,
            cache_salt=self.cache_salt,
            resumed=resumed,
            suspicions=0 if cleared else self.suspicions,
        )


class TokenStream:
    """Between the connection, which pushes, and one reader. Both live on one event loop.

    Ends once: with `ended` set, or with `error`.
    """

    def __init__(
        self,
        ticket: int,
        history: History,
        on_overflow: Callable[[TokenStream], None],
        max_unread: int | None = MAX_UNREAD_TOKENS,
    ) -> None:
        self.ticket = ticket
        """What the connection calls the request now; a resumption has a new one."""
        self.history = history
        self.ended: Ended | None = None
        self.is_stopped = False
        """The reader wants no more: what has arrived is all there is."""
        self.error: TandemError | None = None
        self.resumed = False
        """It was sent again, or is to be."""
        self.repairs = 0
        """How often it broke and was sent again …"""
        self.repaired_at = 0
        """… since so many tokens had been received."""
        self.first_token_at: float | None = None
        """Loop time."""
        self._on_overflow = on_overflow
        self._max_unread = max_unread
        self._read = len(history.generated)
        self._news = News()
        self._settled = asyncio.Event()
        self.on_news: Callable[[], None] | None = None
        """Called after tokens or an end have come; for a reader of several streams."""

    @property
    def has_news(self) -> bool:
        """`read` would return or raise at once."""
        return len(self.history.generated) > self._read or self.is_over

    @property
    def is_spent(self) -> bool:
        """Nothing is left to be read but the error."""
        return self.error is not None and len(self.history.generated) == self._read

    @property
    def is_over(self) -> bool:
        return self.ended is not None or self.error is not None or self.is_stopped

    @property
    def offset(self) -> int:
        """Position of the next token to be read."""
        return self._read

    # --- the connection's side -------------------------------------------------------------------------------------

    def push(self, offset: int, tokens: list[int], told: Sequence[Told | None] = ()) -> None:
        """Takes tokens that begin at `offset`, and what is told of each. Raises OffsetError for a gap or a repeat,
        ProtocolError if something is missing, and takes none then."""
        history, generated = self.history, self.history.generated
        if offset != len(generated):
            raise OffsetError(len(generated), offset)
        if history.wants_prompt_told and len(history.prompt_told) != len(history.prompt) - 1:
            raise ProtocolError("stream broken: tokens came before the log-probabilities of the prompt")
        if history.sampling.logprobs is not None:
            known = [one for one in told if one is not None]
            if len(known) != len(tokens):
                raise ProtocolError(f"stream broken: tokens came without their log-probabilities at offset {offset}")
            history.told.extend(known)
        if self.first_token_at is None:
            self.first_token_at = asyncio.get_running_loop().time()
        generated.extend(tokens)
        unread = len(generated) - self._read
        if self._max_unread is not None and unread > self._max_unread:
            self.fail(
                RequestFailed(
                    f"{unread} tokens were left unread, over the limit of {self._max_unread}; the request was "
                    "cancelled. Read streams faster, or use generate()"
                )
            )
            self._on_overflow(self)
        self._wake()

    def push_prompt(self, position: int, told: list[Told]) -> None:
        """Takes what is told of the prompt's tokens from `position` on; from the first one on, it begins anew. Raises
        ProtocolError for a gap or for what was not asked for, and takes nothing then."""
        history = self.history
        known = history.prompt_told
        if position == 1:
            known.clear()
        if position != len(known) + 1 or position + len(told) > len(history.prompt) or not history.wants_prompt_told:
            raise ProtocolError(f"stream broken: log-probabilities of the prompt came for position {position}")
        known.extend(told)

    def end(self, ended: Ended) -> None:
        """Takes the request's end. Raises ProtocolError if it has another number of tokens than arrived."""
        if ended.reason in ("stop", "length", "timeout"):
            if ended.completion_tokens != len(self.history.generated):
                raise ProtocolError(
                    f"stream broken: the request ended after {ended.completion_tokens} tokens, "
                    f"{len(self.history.generated)} arrived"
                )
            self.ended = ended
            self._wake()
        elif ended.reason == "abort":
            self.fail(RequestCancelled(ended.error or "the request was cancelled before it ended"))
        else:
            self.fail(RequestFailed(ended.error or f"the request ended with {ended.reason!r}"))

    def fail(self, error: TandemError) -> None:
        """Ends the stream with an error; the first ending counts. Tokens that have arrived can still be read."""
        if not self.is_over:
            self.error = error
            self._wake()

    def stop(self) -> None:
        """Ends the stream well, on the reader's behalf; `settle` may still say what the request took."""
        self.is_stopped = True

    def settle(self, ended: Ended | None) -> None:
        """Takes the end of a stopped request, or that nobody will tell."""
        self.ended = ended
        self._settled.set()
        self._wake()

    async def settled(self, limit_s: float) -> None:
        """Waits until a stopped request has settled, for at most so many seconds."""
        try:
            async with asyncio.timeout(limit_s):
                await self._settled.wait()
        except TimeoutError:
            return

    # --- the reader's side -----------------------------------------------------------------------------------------

    async def read(self) -> list[int]:
        """All unread tokens, at least one unless the request ended well. Raises the stream's error once all tokens
        before it are read. A cancelled read loses nothing."""
        generated = self.history.generated
        while len(generated) == self._read and not self.is_over:
            await self._news.wait()
        return self.take()

    def take(self) -> list[int]:
        """As `read`, but what has come by now, which may be nothing."""
        tokens = self.history.generated[self._read :]
        if not tokens and self.error is not None:
            raise self.error
        self._read += len(tokens)
        return tokens

    def _wake(self) -> None:
        self._news.tell()
        if self.on_news is not None:
            self.on_news()
