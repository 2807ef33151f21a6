"""What rows that use rare sampling parameters bring along when they join a worker's batch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from ..protocol.sampling import SamplingParams
from .records import IntColumn
from .requests import Request

_rare = attrgetter(
    "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids",
    "bad_words_token_ids", "min_tokens", "logprobs", "prompt_logprobs",
)  # fmt: skip
_PLAIN = _rare(SamplingParams())


def is_rare(sampling: SamplingParams) -> bool:
    """The parameters need more than the columns that every joining row has."""
    return bool(_rare(sampling) != _PLAIN)


def mask_of(tokens: Sequence[int], vocab_size: int) -> IntColumn:
    """The tokens as bits of int32 words, 32 tokens a word, the lowest id in the lowest bit."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[np.array(tokens, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32, copy=False)


def rare_bytes(request: Request, vocab_size: int) -> int:
    """About how much a joining row adds to the columns of `rare_columns`."""
    if not request.rare:
        return 0
    sampling = request.sampling
    mask = vocab_size // 8 if sampling.allowed_token_ids is not None else 0
    sequences = sum(4 * (len(one) + 2) for one in sampling.bad_words_token_ids)
    return 64 + mask + sequences + 8 * len(sampling.logit_bias or ()) + 4 * len(request.held_back)


def rare_columns(slots: Sequence[int], requests: Sequence[Request], vocab_size: int) -> dict[str, Any]:
    """The columns of a StepPlan that these joining rows need beside those that all have."""
    rows = [(slot, request) for slot, request in zip(slots, requests, strict=True) if request.rare]
    if not rows:
        return {}
    columns: dict[str, Any] = {}

    def where(used: list[bool], name: str) -> list[Request]:
        """The rows of a column of slots, if there are any."""
        found = [row for row, uses in zip(rows, used, strict=True) if uses]
        if found:
            columns[name] = np.array([slot for slot, _ in found], np.int32)
        return [request for _, request in found]

    given = [request.sampling for _, request in rows]
    if some := where([one.min_p > 0 for one in given], "min_p_slot"):
        columns["min_p"] = np.array([request.sampling.min_p for request in some], np.float32)
    penalties = [(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) for one in given]
    if where([one != (1.0, 0.0, 0.0) for one in penalties], "penalty_slot"):
        columns["penalty"] = np.array([one for one in penalties if one != (1.0, 0.0, 0.0)], np.float32).reshape(-1)
    if some := where([bool(one.logit_bias) for one in given], "bias_slot"):
        biases = [request.sampling.logit_bias or {} for request in some]
        columns["bias_count"] = np.array([len(bias) for bias in biases], np.int32)
        columns["bias_token"] = np.array([token for bias in biases for token in bias], np.int32)
        columns["bias"] = np.array([value for bias in biases for value in bias.values()], np.float32)
    if some := where([one.allowed_token_ids is not None for one in given], "allowed_slot"):
        columns["allowed_mask"] = np.concatenate(
            [mask_of(request.sampling.allowed_token_ids or (), vocab_size) for request in some]
        )
    if some := where([bool(request.held_back) for _, request in rows], "min_tokens_slot"):
        columns["min_tokens"] = np.array([request.sampling.min_tokens for request in some], np.int32)
        columns["min_tokens_stops"] = np.array([len(request.held_back) for request in some], np.int32)
        columns["min_tokens_stop"] = np.array([token for request in some for token in request.held_back], np.int32)
    sequences = [(slot, one) for slot, request in rows for one in request.sampling.bad_words_token_ids]
    if sequences:
        columns["bad_words_slot"] = np.array([slot for slot, _ in sequences], np.int32)
        columns["bad_words_length"] = np.array([len(one) for _, one in sequences], np.int32)
        columns["bad_words_token"] = np.array([token for _, one in sequences for token in one], np.int32)
    if some := where([one.logprobs is not None for one in given], "logprobs_slot"):
        columns["logprobs"] = np.array([request.sampling.logprobs for request in some], np.int32)
    if some := where([request.tells_prompt for _, request in rows], "prompt_logprobs_slot"):
        columns["prompt_logprobs"] = np.array([request.sampling.prompt_logprobs for request in some], np.int32)
    return columns
