"""Log-probabilities in the two forms of OpenAI's API: columns for completions, a list for chats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..client.results import Completion, PositionLogprobs, TokenLogprob
from .wire import Answer

LEAST = -9999.0
"""JSON has no infinity: what a token is given that could not be chosen."""


class CompletionLogprobs(Answer):
    """One entry for each token; offsets are in characters from the beginning of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class LegacyLogprobs:
    """Those of one choice of a completion, as it grows."""

    def __init__(self, text_of: Callable[[int], str]) -> None:
        """`text_of` gives a token's text, where no log-probability tells it."""
        self._text_of = text_of
        self._offset = 0
        self._rows: list[tuple[int, float | None, str, dict[str, float] | None]] = []

    def add_prompt(self, completion: Completion) -> None:
        """The prompt's tokens; the first has no log-probability, as nothing came before it."""
        for id_, position in zip(completion.prompt_token_ids, completion.prompt_logprobs or [], strict=True):
            if position is None:
                self._add(self._text_of(id_), None, None)
            else:
                self._add_position(position)

    def add(self, positions: Sequence[PositionLogprobs]) -> None:
        """Tokens of the output."""
        for position in positions:
            self._add_position(position)

    def taken(self) -> CompletionLogprobs:
        """What was added since the last time."""
        rows, self._rows = self._rows, []
        return CompletionLogprobs(
            text_offset=[row[0] for row in rows],
            token_logprobs=[row[1] for row in rows],
            tokens=[row[2] for row in rows],
            top_logprobs=[row[3] for row in rows],
        )

    def _add_position(self, position: PositionLogprobs) -> None:
        top: dict[str, float] = {}
        for one in (*position.top, position.token):  # likeliest first: of two tokens that look the same it stays
            top.setdefault(one.text, finite(one.logprob))
        self._add(position.token.text, finite(position.token.logprob), top)

    def _add(self, text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        self._rows.append((self._offset, logprob, text, top))
        self._offset += len(text)


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobContent(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprobContent] | None
    refusal: None = None


def chat_logprobs(positions: Sequence[PositionLogprobs] | None) -> ChatLogprobs | None:
    """None if none were asked for."""
    if positions is None:
        return None
    return ChatLogprobs(
        content=[
            TokenLogprobContent(**_of(position.token), top_logprobs=[TopLogprob(**_of(one)) for one in position.top])
            for position in positions
        ]
    )


def _of(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": finite(token.logprob),
        "bytes": list(token.text.encode("utf-8", "surrogatepass")),
    }


def finite(logprob: float) -> float:
    """For JSON."""
    return max(LEAST, logprob)  # in this order it takes the place of NaN too, which JSON has not either
