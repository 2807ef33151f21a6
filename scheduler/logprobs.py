"""Log-probabilities on their way from workers to clients, as columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..protocol.errors import ProtocolError
from .records import FloatColumn, IntColumn, LongColumn, record


@record
class Logprobs:
    """Of N tokens. Token i has `entries[i]` values: its own, then those of the likeliest; 0 if nobody asked."""

    entries: IntColumn
    """[N]"""
    rank: IntColumn
    """[N]: of each token in the vocabulary, from 1; 0 if nobody asked."""
    token: IntColumn
    """The entries' tokens, of all tokens in a row …"""
    logprob: FloatColumn
    """… and their values."""

    def take(self, rows: LongColumn) -> Logprobs:
        """Those of some tokens, in this order."""
        entries = self.entries[rows]
        begin = (np.cumsum(self.entries) - self.entries)[rows]
        at = np.repeat(begin - (np.cumsum(entries) - entries), entries) + np.arange(int(entries.sum()))
        return Logprobs(entries, self.rank[rows], self.token[at], self.logprob[at])


def no_logprobs(count: int) -> Logprobs:
    """Of tokens that nobody asked them of."""
    nothing = np.zeros(count, np.int32)
    return Logprobs(nothing, nothing, nothing[:0], np.empty(0, np.float32))


def concatenate(parts: Sequence[Logprobs]) -> Logprobs:
    return Logprobs(
        np.concatenate([part.entries for part in parts]),
        np.concatenate([part.rank for part in parts]),
        np.concatenate([part.token for part in parts]),
        np.concatenate([part.logprob for part in parts]),
    )


@record
class PromptPart:
    """Tokens of a prompt that a step tells the log-probabilities of, `entries` of each."""

    slot: int
    identity: int
    """Of the attempt that owns the slot."""
    position: int
    """Of the first."""
    count: int
    entries: int


@record
class PromptLogprobs:
    """Of `len(rank)` tokens of a request's prompt, the first at `position`; `entries` of each."""

    client: int
    ticket: int
    position: int
    entries: int
    rank: IntColumn
    token: IntColumn
    logprob: FloatColumn


@record
class StepLogprobs:
    """What a worker says with the result of a step; see StepResult."""

    rank: IntColumn
    token: IntColumn
    logprob: FloatColumn
    prompt_rank: IntColumn
    prompt_token: IntColumn
    prompt_logprob: FloatColumn

    def require(self, entries: IntColumn | None, prompts: Sequence[PromptPart], vocab_size: int) -> None:
        """Raises ProtocolError unless it is what tokens with so many entries, and these parts of prompts, need."""
        told = 0 if entries is None else int(np.count_nonzero(entries))
        values = 0 if entries is None else int(entries.sum())
        positions = sum(part.count for part in prompts)
        prompt_values = sum(part.count * part.entries for part in prompts)
        sizes = (len(self.rank), len(self.token), len(self.logprob), len(self.prompt_rank), len(self.prompt_token),
                 len(self.prompt_logprob))  # fmt: skip
        if sizes != (told, values, values, positions, prompt_values, prompt_values):
            raise ProtocolError("log-probabilities do not fit the step")
        for tokens in (self.token, self.prompt_token):
            if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
                raise ProtocolError("log-probabilities of a token outside the vocabulary")

    def of_tokens(self, entries: IntColumn) -> Logprobs:
        """As columns of all of the step's tokens."""
        rank = np.zeros(len(entries), np.int32)
        rank[entries > 0] = self.rank
        return Logprobs(entries, rank, self.token, self.logprob)


NOTHING_TOLD = StepLogprobs(
    np.empty(0, np.int32),
    np.empty(0, np.int32),
    np.empty(0, np.float32),
    np.empty(0, np.int32),
    np.empty(0, np.int32),
    np.empty(0, np.float32),
)
