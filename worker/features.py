"""What the host knows of the sampling parameters that few requests use: penalties, masks, biases, bad words,
log-probabilities.

Of such a row the host keeps a few numbers, enough to say which passes a step needs; a step whose rows use none of it
needs none and is not looked at any further. What a row brings along when it joins goes to the device's tables (see
adjustments.py) in the layout made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import ProtocolError
from ..protocol.messages import StepPlan
from ..protocol.sampling import MAX_BAD_SEQUENCE_TOKENS, MAX_BAD_SEQUENCES, MAX_LOGIT_BIASES, MAX_LOGPROBS

IntColumn: TypeAlias = NDArray[np.int32]

NO_TOKEN: Final = -1
"""Fills sequences up on the left."""
NOT_YET: Final = -2
"""Stands where no token was generated; equals nothing in a sequence."""
NOTHING: Final = np.empty(0, np.int32)


def mask_words(vocab_size: int) -> int:
    """Words of a mask of the vocabulary: 32 tokens in each, the lowest id in the lowest bit."""
    return -(-vocab_size // 32)


def pack_mask(tokens: IntColumn, vocab_size: int) -> IntColumn:
    """int32 [mask_words]: a bit for each of these tokens."""
    bits = np.zeros(32 * mask_words(vocab_size), np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32, copy=False)


@dataclass(slots=True)
class FeatureJoins:
    """What the rows that join in a step change in the device's tables. Floats are there as their bits."""

    slots: IntColumn
    """[J]: rows with features, and rows without whose slot still has a former row's."""
    numbers: IntColumn
    """[5, J]: repetition, presence and frequency penalty, min_p (these float32), min_tokens."""
    allowed_slots: IntColumn
    allowed: IntColumn
    """[slots, words]: a bit for each token that may be chosen."""
    late_slots: IntColumn
    late: IntColumn
    """[slots, words]: a bit for each token that may be chosen once min_tokens are generated."""
    bias_slots: IntColumn
    bias_token: IntColumn
    """[slots, most biases of a row]; token 0 with bias 0 beyond a row's own."""
    bias: IntColumn
    """float32, likewise."""
    sequence_slots: IntColumn
    sequences: IntColumn
    """[slots, most sequences of a row, MAX_BAD_SEQUENCE_TOKENS]: the tokens at the right end, NO_TOKEN before them."""
    recent: IntColumn
    """[slots, MAX_BAD_SEQUENCE_TOKENS]: generated tokens by position modulo that, NOT_YET where there are none."""
    penalised_slots: list[int]
    prompts: list[IntColumn]
    generated: list[IntColumn]
    """Of each of these slots, the known tokens."""


@dataclass(slots=True)
class PromptPart:
    """Positions of prompts whose log-probabilities a step tells: P of them, in the order of its chunks."""

    token_index: IntColumn
    """[P]: of the step's tokens, the one whose logits foretell …"""
    target: IntColumn
    """… this token."""
    positions: list[int]
    """How many, by row …"""
    entries: list[int]
    """… and how many log-probabilities of each."""


@dataclass(slots=True)
class StepFeatures:
    """Which passes a step needs, for N rows to be sampled from."""

    draws: bool
    """A row draws a random number."""
    penalties: bool
    min_p: bool
    masks: bool
    biases: int
    """The most of a row."""
    sequences: int
    """The most of a row."""
    told_rows: IntColumn
    """Which of the N have their log-probabilities told."""
    told_entries: IntColumn
    """How many each of them: its own, and the likeliest."""
    prompt: PromptPart | None

    @property
    def adjusts(self) -> bool:
        """The logits change before they are sampled from."""
        return self.penalties or self.masks or self.biases > 0 or self.sequences > 0


class HostFeatures:
    """Slot-indexed columns; 0 and False where a row does not use a feature."""

    def __init__(self, slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._used = np.zeros(slots, np.bool_)
        """Slots of rows with any feature."""
        self._rows = 0
        """How many these are."""
        self._stale = np.zeros(slots, np.bool_)
        """Slots whose place in the device's tables holds what a row had."""
        self._prompt_length = np.zeros(slots, np.int32)
        self._penalties = np.zeros(slots, np.bool_)
        self._min_p = np.zeros(slots, np.bool_)
        self._allowed = np.zeros(slots, np.bool_)
        self._min_tokens = np.zeros(slots, np.int32)
        self._biases = np.zeros(slots, np.int32)
        self._sequences = np.zeros(slots, np.int32)
        self._entries = np.zeros(slots, np.int32)
        self._prompt_entries = np.zeros(slots, np.int32)
        self._columns: tuple[NDArray[Any], ...] = (
            self._used, self._penalties, self._min_p, self._allowed, self._min_tokens, self._biases, self._sequences,
            self._entries, self._prompt_entries,
        )  # fmt: skip

    @property
    def any(self) -> bool:
        """A row has features."""
        return self._rows > 0

    def leave(self, slots: IntColumn) -> None:
        if self._rows:
            self._rows -= int(self._used[slots].sum())
            for column in self._columns:
                column[slots] = 0

    def join(self, plan: StepPlan) -> FeatureJoins | None:
        """Enters the joining rows' features; returns what of them goes to the device, if anything. Raises
        ProtocolError."""
        slots = plan.join_slot
        self._check(plan)
        penalised = _by_slot(plan.penalty_slot, plan.penalty.reshape(-1, 3))
        self._penalties[plan.penalty_slot] = True
        self._min_p[plan.min_p_slot] = True
        self._allowed[plan.allowed_slot] = True
        self._min_tokens[plan.min_tokens_slot] = plan.min_tokens
        self._biases[plan.bias_slot] = plan.bias_count
        np.add.at(self._sequences, plan.bad_words_slot, 1)
        self._entries[plan.logprobs_slot] = plan.logprobs + 1
        self._prompt_entries[plan.prompt_logprobs_slot] = plan.prompt_logprobs + 1
        if int(self._sequences.max()) > MAX_BAD_SEQUENCES:
            raise ProtocolError(f"plan {plan.step}: over {MAX_BAD_SEQUENCES} bad words of one row")
        self._prompt_length[slots] = plan.join_prompt_length
        adjusted = np.zeros_like(self._used)
        for named in (plan.penalty_slot, plan.min_p_slot, plan.allowed_slot, plan.min_tokens_slot, plan.bias_slot,
                      plan.bad_words_slot):  # fmt: skip
            adjusted[named] = True
        self._used[slots] = adjusted[slots] | (self._entries[slots] > 0) | (self._prompt_entries[slots] > 0)
        self._rows += int(self._used[slots].sum())
        changed = slots[adjusted[slots] | self._stale[slots]]
        self._stale[changed] = adjusted[changed]
        if not len(changed):
            return None
        known = dict(zip(slots.tolist(), np.split(plan.join_token, np.cumsum(plan.join_length)[:-1]), strict=True))
        lengths = dict(zip(slots.tolist(), plan.join_prompt_length.tolist(), strict=True))
        sequence_slots = np.unique(plan.bad_words_slot)
        return FeatureJoins(
            slots=changed,
            numbers=self._numbers(plan, changed, penalised),
            allowed_slots=plan.allowed_slot,
            allowed=plan.allowed_mask,
            late_slots=plan.min_tokens_slot,
            late=self._late(plan),
            bias_slots=plan.bias_slot,
            bias_token=_padded(plan.bias_token, plan.bias_count),
            bias=_padded(plan.bias.view(np.int32), plan.bias_count),
            sequence_slots=sequence_slots,
            sequences=_sequences(plan, sequence_slots),
            recent=_recent([known[slot][lengths[slot] :] for slot in sequence_slots.tolist()]),
            penalised_slots=plan.penalty_slot.tolist(),
            prompts=[known[slot][: lengths[slot]] for slot in plan.penalty_slot.tolist()],
            generated=[known[slot][lengths[slot] :] for slot in plan.penalty_slot.tolist()],
        )

    def step(
        self, sampled_slots: IntColumn, kv_lens: IntColumn, draws: bool, prompt: PromptPart | None
    ) -> StepFeatures | None:
        """What a step that samples from these rows needs, whose lengths are `kv_lens` by then; None: nothing."""
        if not self._rows or not (prompt is not None or self._used[sampled_slots].any()):
            return None
        entries = self._entries[sampled_slots]
        told = np.flatnonzero(entries)
        early = kv_lens - self._prompt_length[sampled_slots] < self._min_tokens[sampled_slots]
        found = StepFeatures(
            draws=draws,
            penalties=bool(self._penalties[sampled_slots].any()),
            min_p=bool(self._min_p[sampled_slots].any()),
            masks=bool((self._allowed[sampled_slots] | early).any()),
            biases=_most(self._biases[sampled_slots]),
            sequences=_most(self._sequences[sampled_slots]),
            told_rows=told.astype(np.int32),
            told_entries=entries[told],
            prompt=prompt,
        )
        return found if found.adjusts or found.min_p or len(told) or prompt is not None else None

    def prompt_part(
        self, plan: StepPlan, computed: IntColumn, first_token: int, tokens: list[IntColumn | None]
    ) -> PromptPart | None:
        """What of prompts the plan's chunks tell; they begin at token `first_token` of the step and after `computed`
        [chunks] tokens of their rows."""
        if not self._rows or not self._prompt_entries[plan.chunk_slot].any():
            return None
        index, target, positions, entries = [], [], [], []
        for slot, length, before in zip(
            plan.chunk_slot.tolist(), plan.chunk_length.tolist(), computed.tolist(), strict=True
        ):
            known, wanted = tokens[slot], int(self._prompt_entries[slot])
            count = min(before + length + 1, int(self._prompt_length[slot])) - (before + 1)
            if wanted and count > 0 and known is not None:
                index.append(np.arange(first_token, first_token + count, dtype=np.int32))
                target.append(known[before + 1 : before + 1 + count])
                positions.append(count)
                entries.append(wanted)
            first_token += length
        if not index:
            return None
        return PromptPart(np.concatenate(index), np.concatenate(target), positions, entries)

    def _numbers(self, plan: StepPlan, slots: IntColumn, penalised: dict[int, NDArray[np.float32]]) -> IntColumn:
        neutral = np.array([1.0, 0.0, 0.0], np.float32)
        min_p = _by_slot(plan.min_p_slot, plan.min_p)
        numbers = np.zeros((5, len(slots)), np.float32)
        for i, slot in enumerate(slots.tolist()):
            numbers[:3, i] = penalised.get(slot, neutral)
            numbers[3, i] = min_p.get(slot, 0.0)
        bits = numbers.view(np.int32)
        bits[4] = self._min_tokens[slots]
        return bits

    def _late(self, plan: StepPlan) -> IntColumn:
        stops = np.split(plan.min_tokens_stop, np.cumsum(plan.min_tokens_stops)[:-1])
        masks = [~pack_mask(ids, self._vocab_size) for ids in stops[: len(plan.min_tokens_slot)]]
        return np.concatenate([NOTHING, *masks])

    def _check(self, plan: StepPlan) -> None:
        """Raises ProtocolError unless the columns fit together and name only joining rows and tokens that exist."""
        words = mask_words(self._vocab_size)
        lengths = plan.bad_words_length
        for fits, what in (
            (len(plan.penalty) == 3 * len(plan.penalty_slot), "penalty"),
            (len(plan.min_p) == len(plan.min_p_slot), "min_p"),
            (len(plan.allowed_mask) == words * len(plan.allowed_slot), "allowed_mask"),
            (len(plan.min_tokens) == len(plan.min_tokens_stops) == len(plan.min_tokens_slot), "min_tokens"),
            (_counts(plan.min_tokens_stops, len(plan.min_tokens_stop), self._vocab_size), "min_tokens_stop"),
            (len(plan.bias_count) == len(plan.bias_slot) and len(plan.bias) == len(plan.bias_token), "bias_token"),
            (_counts(plan.bias_count, len(plan.bias_token), MAX_LOGIT_BIASES), "bias_count"),
            (len(lengths) == len(plan.bad_words_slot), "bad_words_length"),
            (_counts(lengths, len(plan.bad_words_token), MAX_BAD_SEQUENCE_TOKENS), "bad_words_length"),
            (len(plan.logprobs) == len(plan.logprobs_slot) and _within(plan.logprobs, MAX_LOGPROBS + 1), "logprobs"),
            (
                len(plan.prompt_logprobs) == len(plan.prompt_logprobs_slot)
                and _within(plan.prompt_logprobs, MAX_LOGPROBS + 1),
                "prompt_logprobs",
            ),
            (_within(plan.min_tokens_stop, self._vocab_size), "min_tokens_stop"),
            (_within(plan.bias_token, self._vocab_size), "bias_token"),
            (_within(plan.bad_words_token, self._vocab_size), "bad_words_token"),
        ):
            if not fits:
                raise ProtocolError(f"plan {plan.step}: {what} does not fit")
        for once, slots in (
            (True, plan.penalty_slot), (True, plan.min_p_slot), (True, plan.allowed_slot), (True, plan.min_tokens_slot),
            (True, plan.bias_slot), (True, plan.logprobs_slot), (True, plan.prompt_logprobs_slot),
            (False, plan.bad_words_slot),
        ):  # fmt: skip
            if len(slots) and not (
                np.isin(slots, plan.join_slot).all() and (len(np.unique(slots)) == len(slots) or not once)
            ):
                raise ProtocolError(f"plan {plan.step}: a sampling parameter is of a row that does not join, or twice")


def _most(column: IntColumn) -> int:
    return int(column.max()) if len(column) else 0


def _within(tokens: IntColumn, limit: int) -> bool:
    return not len(tokens) or (int(tokens.min()) >= 0 and int(tokens.max()) < limit)


def _counts(counts: IntColumn, total: int, most: int) -> bool:
    return int(counts.sum()) == total and (not len(counts) or (int(counts.min()) >= 1 and int(counts.max()) <= most))


def _by_slot(slots: IntColumn, values: NDArray[Any]) -> dict[int, Any]:
    return dict(zip(slots.tolist(), values, strict=True))


def _padded(flat: NDArray[Any], counts: IntColumn) -> IntColumn:
    """[rows, most of a row], 0 beyond a row's own."""
    out = np.zeros((len(counts), _most(counts)), np.int32)
    out[np.arange(out.shape[1]) < counts[:, None]] = flat
    return out


def _sequences(plan: StepPlan, slots: IntColumn) -> IntColumn:
    rows = np.searchsorted(slots, plan.bad_words_slot)
    most = _most(np.bincount(rows).astype(np.int32)) if len(rows) else 0
    out = np.full((len(slots), most, MAX_BAD_SEQUENCE_TOKENS), NO_TOKEN, np.int32)
    filled = [0] * len(slots)
    pieces = np.split(plan.bad_words_token, np.cumsum(plan.bad_words_length)[:-1]) if len(rows) else []
    for row, tokens in zip(rows.tolist(), pieces, strict=True):
        out[row, filled[row], MAX_BAD_SEQUENCE_TOKENS - len(tokens) :] = tokens
        filled[row] += 1
    return out


def _recent(generated: list[IntColumn]) -> IntColumn:
    out = np.full((len(generated), MAX_BAD_SEQUENCE_TOKENS), NOT_YET, np.int32)
    for row, tokens in enumerate(generated):
        positions = np.arange(max(0, len(tokens) - MAX_BAD_SEQUENCE_TOKENS), len(tokens))
        out[row, positions % MAX_BAD_SEQUENCE_TOKENS] = tokens[positions]
    return out
