"""What changes a row's logits before its token is chosen, and the tables that remember it for each slot.

In vLLM's order: allowed tokens, bad words and min_tokens take tokens away; biases are added; then come the penalties.
If nothing would be left to choose, as when bad words take away all that is allowed, the row keeps the logits it had.
Like everything else that lives between steps, the tables are only written in plan order on the compute stream, so
penalties and bad words see every token up to the last, which the host has not seen yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from ..protocol.sampling import MAX_BAD_SEQUENCE_TOKENS, MAX_BAD_SEQUENCES, MAX_LOGIT_BIASES
from . import sampler
from .features import NO_TOKEN, FeatureJoins, StepFeatures, mask_words
from .staging import Lane

if TYPE_CHECKING:
    from .adjusting import Tables

MAX_COUNT: Final = 16_383
"""A token that was generated more often counts as if it had been so often."""


def table_bytes(slots: int, vocab_size: int) -> int:
    """Device memory that the tables of so many slots take."""
    columns = 4 * (5 + 2 * mask_words(vocab_size) + 2 * MAX_LOGIT_BIASES)
    sequences = 4 * MAX_BAD_SEQUENCE_TOKENS * (MAX_BAD_SEQUENCES + 1)
    return (slots + 1) * (2 * vocab_size + columns + sequences)


def take_away(logits: Tensor, words: Tensor) -> Tensor:
    """-inf where the row's mask has no bit: logits [N, vocab] float32, words [N, mask_words(vocab)] int32."""
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits = ((words[:, :, None] >> shifts) & 1).view(len(words), -1)[:, : logits.shape[-1]]
    return logits.masked_fill(bits == 0, float("-inf"))


def ban(logits: Tensor, sequences: Tensor, recent: Tensor) -> Tensor:
    """-inf for the last token of each sequence whose others are the row's latest tokens.

    sequences int32 [N, S, L], the tokens at the right end and NO_TOKEN before them (nothing else, where there is no
    sequence); recent int32 [N, L - 1], the latest token last, NOT_YET where there were not so many.
    """
    before, last = sequences[:, :, :-1], sequences[:, :, -1]
    complete = ((before == recent[:, None, :]) | (before == NO_TOKEN)).all(-1) & (last != NO_TOKEN)
    change = torch.zeros_like(last, dtype=logits.dtype).masked_fill(complete, float("-inf"))
    return logits.scatter_add(-1, last.clamp_min(0).to(torch.int64), change)


def add_biases(logits: Tensor, tokens: Tensor, biases: Tensor) -> Tensor:
    """Logits plus `biases` [N, K] at `tokens` [N, K], each once a row; where there is none, token 0 with bias 0."""
    return logits.scatter_add(-1, tokens.to(torch.int64), biases)


def penalise(logits: Tensor, seen: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Logits [N, vocab] after the penalties [N] of vLLM and OpenAI. `seen` int16 [N, vocab]: twice how often a token
    was generated, plus 1 if it is in the prompt."""
    times = repetition[:, None]
    repeated = torch.where(logits > 0, logits / times, logits * times)
    logits = torch.where(seen != 0, repeated, logits)
    count = (seen >> 1).to(torch.float32)
    return logits - frequency[:, None] * count - presence[:, None] * (count > 0)


@dataclass(slots=True)
class StagedJoins:
    """What joining rows bring along, on the device; see FeatureJoins."""

    joins: FeatureJoins
    slots: Tensor
    numbers: Tensor
    allowed_slots: Tensor
    allowed: Tensor
    late_slots: Tensor
    late: Tensor
    bias_slots: Tensor
    bias_token: Tensor
    bias: Tensor
    sequence_slots: Tensor
    sequences: Tensor
    recent: Tensor
    known: list[Tensor]
    """Prompt and generated tokens of each penalised row, in turn."""


def stage_joins(joins: FeatureJoins, lane: Lane) -> StagedJoins:
    """Writes them where the lane's step will find them."""
    known = [tokens for pair in zip(joins.prompts, joins.generated, strict=True) for tokens in pair]
    fixed = (
        joins.slots, joins.numbers, joins.allowed_slots, joins.allowed, joins.late_slots, joins.late, joins.bias_slots,
        joins.bias_token, joins.bias, joins.sequence_slots, joins.sequences, joins.recent,
    )  # fmt: skip
    brought = iter(lane.bring([*fixed, *known]))
    return StagedJoins(
        joins=joins,
        slots=next(brought),
        numbers=next(brought),
        allowed_slots=next(brought),
        allowed=next(brought),
        late_slots=next(brought),
        late=next(brought),
        bias_slots=next(brought),
        bias_token=next(brought),
        bias=next(brought),
        sequence_slots=next(brought),
        sequences=next(brought),
        recent=next(brought),
        known=list(brought),
    )


class Adjustments:
    """Tables of `slots` + 1 slots on one device, of `table_bytes` in all."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        rows, words = slots + 1, mask_words(vocab_size)
        if device.type == "cpu":  # memory that is touched first where it is used first
            self._seen = torch.from_numpy(np.zeros((rows, vocab_size), np.int16))
        else:
            self._seen = torch.zeros((rows, vocab_size), dtype=torch.int16, device=device)
        """See `penalise`; of rows without penalties it means nothing."""

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros((rows, *shape), dtype=dtype, device=device)

        self._repetition = table(dtype=torch.float32)
        self._presence = table(dtype=torch.float32)
        self._frequency = table(dtype=torch.float32)
        self._min_p = table(dtype=torch.float32)
        self._min_tokens = table()
        self._allowed = table(words)
        self._late = table(words)
        """Of tokens that may come from `_min_tokens` on, and only then, the bits are 0."""
        self._bias_token = table(MAX_LOGIT_BIASES)
        self._bias = table(MAX_LOGIT_BIASES, dtype=torch.float32)
        self._sequences = table(MAX_BAD_SEQUENCES, MAX_BAD_SEQUENCE_TOKENS)
        self._recent = table(MAX_BAD_SEQUENCE_TOKENS)
        """Generated tokens by position modulo its width."""
        self._neutral: tuple[tuple[Tensor, float], ...] = (
            (self._repetition, 1.0),
            (self._presence, 0.0),
            (self._frequency, 0.0),
            (self._min_p, 0.0),
            (self._min_tokens, 0),
            (self._allowed, -1),
            (self._bias, 0.0),
            (self._bias_token, 0),
            (self._sequences, NO_TOKEN),
        )
        self.clear()

    def clear(self) -> None:
        """No slot has anything, in the same memory."""
        for values, neutral in self._neutral:
            values.fill_(neutral)

    # --- in plan order, on the compute stream ----------------------------------------------------------------------

    def join(self, staged: StagedJoins) -> None:
        """Before the step in which rows join: their slots forget who had them, and learn who has them now."""
        slots = staged.slots.to(torch.int64)
        for values, neutral in self._neutral:
            values.index_fill_(0, slots, neutral)
        bits = staged.numbers.view(5, -1)
        for values, row in (
            (self._repetition, bits[0]), (self._presence, bits[1]), (self._frequency, bits[2]), (self._min_p, bits[3]),
        ):  # fmt: skip
            values[slots] = row.view(torch.float32)
        self._min_tokens[slots] = bits[4]
        _enter(self._allowed, staged.allowed_slots, staged.allowed)
        _enter(self._late, staged.late_slots, staged.late)
        _enter(self._bias_token, staged.bias_slots, staged.bias_token)
        _enter(self._bias, staged.bias_slots, staged.bias.view(torch.float32))
        if len(staged.sequence_slots):
            rows = staged.sequence_slots.to(torch.int64)
            sequences = staged.sequences.view(len(rows), -1, MAX_BAD_SEQUENCE_TOKENS)
            self._sequences[rows, : sequences.shape[1]] = sequences
            self._recent[rows] = staged.recent.view(len(rows), -1)
        for i, slot in enumerate(staged.joins.penalised_slots):
            self._remember(slot, staged.known[2 * i], staged.known[2 * i + 1])

    def _remember(self, slot: int, prompt: Tensor, generated: Tensor) -> None:
        """Counts the tokens that a row joins with."""
        count = torch.zeros(self._seen.shape[1], dtype=torch.int32, device=self._seen.device)
        count.index_add_(0, generated.to(torch.int64), torch.ones_like(generated))
        count = count.clamp_max(MAX_COUNT) * 2
        in_prompt = torch.zeros_like(count).index_fill_(0, prompt.to(torch.int64), 1)
        self._seen[slot] = (count + in_prompt).to(torch.int16)

    def apply(self, features: StepFeatures, logits: Tensor, slots: Tensor, position: Tensor) -> Tensor:
        """The logits [N, vocab] that the rows' tokens are chosen from: slots [N] int64, position [N]: how many tokens
        each has generated."""
        if sampler.BY_KERNELS and logits.is_cuda:
            from . import adjusting

            return adjusting.adjust(
                logits, slots, position, self._tables(), masks=features.masks, penalties=features.penalties,
                biases=features.biases, sequences=features.sequences,
            )  # fmt: skip
        given = logits
        if features.masks:
            late = torch.where((position < self._min_tokens[slots])[:, None], self._late[slots], -1)
            logits = take_away(logits, self._allowed[slots] & late)
        if features.sequences:
            width = MAX_BAD_SEQUENCE_TOKENS
            back = torch.arange(1 - width, 0, device=slots.device)
            recent = self._recent[slots].gather(1, (position.to(torch.int64)[:, None] + back) % width)
            logits = ban(logits, self._sequences[slots, : features.sequences], recent)
        if features.masks or features.sequences:
            left = logits.amax(-1, keepdim=True) > float("-inf")
            logits = torch.where(left, logits, given)
        if features.biases:
            logits = add_biases(
                logits, self._bias_token[slots, : features.biases], self._bias[slots, : features.biases]
            )
        if features.penalties:
            seen, repetition = self._seen[slots], self._repetition[slots]
            logits = penalise(logits, seen, repetition, self._presence[slots], self._frequency[slots])
        return logits

    def min_p(self, slots: Tensor) -> Tensor:
        """[N] float32."""
        return self._min_p[slots]

    def note(self, features: StepFeatures, slots: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Takes in the tokens [N] that were chosen."""
        if sampler.BY_KERNELS and tokens.is_cuda:
            from . import adjusting

            if features.penalties or features.sequences:
                adjusting.note(
                    slots, position, tokens, self._tables(), penalties=features.penalties,
                    sequences=features.sequences > 0, most=2 * MAX_COUNT,
                )  # fmt: skip
            return
        if features.penalties:
            seen = self._seen[slots, tokens]
            self._seen[slots, tokens] = torch.where(seen < 2 * MAX_COUNT, seen + 2, seen)
        if features.sequences:
            self._recent[slots, position.to(torch.int64) % MAX_BAD_SEQUENCE_TOKENS] = tokens.to(torch.int32)

    def _tables(self) -> Tables:
        from .adjusting import Tables

        return Tables(
            seen=self._seen,
            repetition=self._repetition,
            presence=self._presence,
            frequency=self._frequency,
            min_tokens=self._min_tokens,
            allowed=self._allowed,
            late=self._late,
            bias_token=self._bias_token,
            bias=self._bias,
            sequences=self._sequences,
            recent=self._recent,
        )


def _enter(table: Tensor, slots: Tensor, flat: Tensor) -> None:
    if len(slots):
        rows = flat.view(len(slots), -1)
        table[slots.to(torch.int64), : rows.shape[1]] = rows
