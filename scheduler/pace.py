"""How large prefill chunks may be, so that rows which decode beside them keep their pace."""

from __future__ import annotations

WEIGHT = 0.2
"""Of the newest observation in the averages."""
LEAST_TOKENS = 64
"""Chunks of a step get at least so many tokens, or prompts would hardly advance on a slow device."""


class Pace:
    """Learns from results what a decode step costs, and what a prefill token adds to it.

    A step is taken for `decode + tokens · per_token` seconds of device time: a fair description of chunks up to a few
    thousand tokens, in which attention over the context is the smaller part. A step counts by its chunks' tokens, so
    that a prompt of a few tokens, which takes as long as one of a hundred, does not make the next ones look dear.
    """

    def __init__(self, target_s: float) -> None:
        """`target_s`: how long a step with decoding rows and chunks should at most take; 0 for no limit."""
        self._target_s = target_s
        self._decode_s: float | None = None
        self._chunks_s: float | None = None
        """What the chunks of a step took beyond its decoding rows …"""
        self._chunk_tokens: float | None = None
        """… and their tokens."""
        self._per_token_s: float | None = None
        """The one by the other."""

    def observe(self, decode_rows: int, chunk_tokens: int, seconds: float) -> None:
        """Takes in a step that took `seconds` on the device."""
        if seconds <= 0.0:
            return
        if not chunk_tokens:
            self._decode_s = _average(self._decode_s, seconds)
        else:
            decode_s = (self._decode_s or 0.0) if decode_rows else 0.0
            self._chunks_s = _average(self._chunks_s, max(0.0, seconds - decode_s))
            self._chunk_tokens = _average(self._chunk_tokens, chunk_tokens)
            self._per_token_s = self._chunks_s / self._chunk_tokens

    def step_s(self, decode_rows: int, chunk_tokens: int) -> float | None:
        """How long such a step should take on the device; None if nothing like it has been seen."""
        if (decode_rows and self._decode_s is None) or (chunk_tokens and self._per_token_s is None):
            return None
        return (self._decode_s or 0.0) * bool(decode_rows) + (self._per_token_s or 0.0) * chunk_tokens

    def chunk_tokens(self, decode_rows: int, budget: int) -> int:
        """How many of `budget` tokens the next step's chunks may have."""
        if not self._target_s or not decode_rows or self._per_token_s is None:
            return budget
        left_s = self._target_s - (self._decode_s or 0.0)
        if left_s >= budget * self._per_token_s:
            return budget  # without a division: averages of nothing but zeros after the first come near zero
        return min(budget, max(LEAST_TOKENS, int(left_s / self._per_token_s) if left_s > 0.0 else 0))


def _average(before: float | None, new: float) -> float:
    return new if before is None else before + WEIGHT * (new - before)
