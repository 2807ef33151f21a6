"""Log-probabilities as they arrive, and as they are given to the caller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..protocol.errors import ProtocolError
from ..protocol.messages import Tokens
from .results import PositionLogprobs, TokenLogprob

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Told: TypeAlias = tuple[int, list[int], list[float]]
"""Of one token: its rank, and the ids and log-probabilities of it and of the likeliest ones."""


def told_of_tokens(message: Tokens) -> list[Told | None]:
    """For each of the message's tokens; None where nothing is told. Raises ProtocolError if the columns do not fit
    together."""
    if not len(message.entries):
        return [None] * len(message.token)
    entries = message.entries
    fits = (
        len(entries) == len(message.rank) == len(message.token)
        and int(entries.min()) >= 0
        and int(entries.sum()) == len(message.entry_token) == len(message.entry_logprob)
    )
    if not fits:
        raise ProtocolError("Tokens: the columns of log-probabilities do not fit together")
    ids, values, begin = message.entry_token.tolist(), message.entry_logprob.tolist(), 0
    found: list[Told | None] = []
    for rank, count in zip(message.rank.tolist(), entries.tolist(), strict=True):
        found.append((rank, ids[begin : begin + count], values[begin : begin + count]) if count else None)
        begin += count
    return found


def told_of_prompts(message: Tokens) -> Iterator[tuple[int, int, list[Told]]]:
    """Ticket, position of the first token, and what is told of it and those that follow. Raises ProtocolError if the
    columns do not fit together."""
    count, entries = message.prompt_count, message.prompt_entries
    rows = len(message.prompt_ticket)
    fits = (
        len(message.prompt_position) == len(count) == len(entries) == rows
        and (not rows or min(int(count.min()), int(entries.min())) >= 1)
        and int(count.sum()) == len(message.prompt_rank)
        and int(np.dot(count.astype(np.int64), entries)) == len(message.prompt_entry_token)
        and len(message.prompt_entry_token) == len(message.prompt_entry_logprob)
    )
    if not fits:
        raise ProtocolError("Tokens: the columns of prompts do not fit together")
    ranks, ids, values = message.prompt_rank.tolist(), message.prompt_entry_token, message.prompt_entry_logprob
    token = value = 0
    for ticket, position, many, width in zip(
        message.prompt_ticket.tolist(), message.prompt_position.tolist(), count.tolist(), entries.tolist(), strict=True
    ):
        of_ids = ids[value : value + many * width].reshape(many, width).tolist()
        of_values = values[value : value + many * width].reshape(many, width).tolist()
        told = list(zip(ranks[token : token + many], of_ids, of_values, strict=True))
        token, value = token + many, value + many * width
        yield ticket, position, told


class LogprobReader:
    """Gives tokens their text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def positions(self, told: Sequence[Told]) -> list[PositionLogprobs]:
        return [self._position(*one) for one in told]

    def _position(self, rank: int, ids: list[int], values: list[float]) -> PositionLogprobs:
        texts = [self._text(id_) for id_ in ids]
        top = [
            TokenLogprob(id_, value, place, text)
            for place, (id_, value, text) in enumerate(zip(ids[1:], values[1:], texts[1:], strict=True), 1)
        ]
        return PositionLogprobs(TokenLogprob(ids[0], values[0], rank, texts[0]), top)

    def _text(self, id_: int) -> str:
        if self._tokenizer is None:
            return ""
        text = self._texts.get(id_)
        if text is None:
            text = self._texts[id_] = self._tokenizer.decode([id_], skip_special_tokens=False)
        return text
