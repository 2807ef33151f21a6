"""What the client gives back: whole completions, and chunks of streamed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "timeout"]
"""Why an answer ended: at a stop token or stop string, at max_tokens or the model's context length, or (in what a
RequestTimeout carries) because its time was over."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int
    """The prompt's, however many samples share it."""
    completion_tokens: int
    """Those of all samples."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds. The first three are the scheduler's, from its acceptance of the
    request; the last two are this client's, from the call. Of several samples, queue and first token are the first
    one's, the totals those of the last to end."""

    queue_s: float
    """Until work on the request began."""
    first_token_s: float
    total_s: float
    client_first_token_s: float
    client_total_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model held a token: before penalties, biases, temperature and the like."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability."""
    rank: int
    """How many tokens of the vocabulary are at least as likely, itself among them: 1 for the likeliest. In a list of
    the likeliest, the place in it."""
    text: str
    """The token on its own; special tokens too. Empty if the model has no tokenizer."""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """What was likely at one position of a text."""

    token: TokenLogprob
    """The one that stands there."""
    top: list[TokenLogprob]
    """The likeliest ones, as many as were asked for, in order. `token` may be among them."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer."""

    text: str
    """New text; empty while the tokens so far end within a character."""
    token_ids: list[int]
    """New tokens; the last chunk may have none."""
    offset: int
    """Position of the first of them in the output."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk of a sample, and only there."""
    index: int = 0
    """Which of the request's `n` samples it belongs to."""
    stop_reason: int | str | None = None
    """On the last chunk: as Choice.stop_reason."""
    logprobs: list[PositionLogprobs] | None = None
    """One for each of token_ids, if they were asked for."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a request's samples."""

    index: int
    text: str
    """Without special tokens, and without the stop token or stop string that ended it, unless asked for."""
    token_ids: list[int]
    """All output tokens; if finish_reason is "stop" the last is the stop token, or completes the stop string."""
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """What ended it: one of stop_token_ids, or a stop string. None at the model's own end, and at other ends."""
    logprobs: list[PositionLogprobs] | None = None
    """One for each of token_ids, if they were asked for."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer, or `n` of them to one prompt."""

    text: str
    """That of the first choice, as are token_ids and finish_reason."""
    token_ids: list[int]
    finish_reason: FinishReason
    choices: list[Choice]
    """All samples, in order."""
    usage: Usage
    timings: Timings
    prompt_token_ids: list[int]
    seed: int | None
    """What to pass as `seed` to have the same tokens again."""
    logprobs: list[PositionLogprobs] | None = None
    """Those of the first choice."""
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """One for each of prompt_token_ids, if they were asked for; the first is None: nothing came before it."""
