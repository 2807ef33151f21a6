"""The host's picture of the device batch, and the layout of one step.

The host applies every plan to small NumPy columns first. Lengths are known ahead of the device (a decoding row grows by
one token a step, whatever the token is), so the layout of step N + 1 is ready while step N runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..protocol.errors import ProtocolError
from ..protocol.messages import StepPlan
from .features import FeatureJoins, HostFeatures, StepFeatures
from .grammars.slots import GrammarSlots, GrammarStep

IntColumn: TypeAlias = NDArray[np.int32]


@dataclass(slots=True)
class Step:
    """What one step computes: R rows of T tokens, N of which are sampled from. All arrays are int32, on the host."""

    plan: StepPlan
    table_index: IntColumn
    """Entries of the flat block table [slots * width] that change before the step …"""
    table_block: IntColumn
    """… and the block ids that they get."""
    row_slot: IntColumn
    """[R]: decoding slots in ascending order, then the chunks' slots in the plan's order."""
    decode_rows: int
    query_starts: IntColumn
    """[R + 1]: row r's tokens are [query_starts[r], query_starts[r + 1])."""
    kv_lens: IntColumn
    """[R]: tokens of the row once the step has run."""
    row_of_token: IntColumn
    """[T]"""
    token_in_row: IntColumn
    """[T]: 0 for a row's first token of this step."""
    chunk_tokens: IntColumn
    """[T - decode_rows]: ids of the tokens that are known; decoding rows take theirs from the device."""
    sampled_rows: IntColumn
    """[N]: rows whose last token is sampled from: all decoding rows, and chunks that end their row's known tokens."""
    greedy: bool
    """No sampled row draws a random number or has features."""
    any_top_k: bool
    any_top_p: bool
    grammar: GrammarStep | None
    """None where no row has anything to do with a grammar."""
    features: StepFeatures | None
    """None: no row uses any."""
    joins: FeatureJoins | None
    """What joining rows change in the tables of features; None: nothing."""

    @property
    def num_tokens(self) -> int:
        return len(self.row_of_token)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values the step reads if all its rows decode, else 0."""
        return int(self.kv_lens.sum()) if self.decode_rows == len(self.row_slot) else 0


class HostRows:
    """Slot-indexed columns of what the plans so far have made of the device batch."""

    def __init__(self, slots: int, width: int, num_blocks: int, max_tokens: int, vocab_size: int) -> None:
        self.slots = slots
        self.width = width
        """Columns of the block table."""
        self._block_limit = num_blocks
        self._max_tokens = max_tokens
        self._owned = np.zeros(slots, np.bool_)
        self._decoding = np.zeros(slots, np.bool_)
        self._computed = np.zeros(slots, np.int32)
        self._num_blocks = np.zeros(slots, np.int32)
        self._samples = np.zeros(slots, np.bool_)
        self._top_k = np.zeros(slots, np.bool_)
        self._top_p = np.zeros(slots, np.bool_)
        self._tokens: list[IntColumn | None] = [None] * slots
        self._grammars = GrammarSlots(slots)
        self._features = HostFeatures(slots, vocab_size)

    def apply(self, plan: StepPlan, block_size: int) -> Step:
        """Moves the columns past `plan` and returns the step's layout.

        Raises ProtocolError, with the columns in no defined state, for a plan that does not follow from those before.
        """
        self._leave(plan.leave)
        joined_index, joined_block = self._join(plan)
        joins = self._features.join(plan) if len(plan.join_slot) else None
        grown_index = self._grow(plan)
        decoding = np.flatnonzero(self._decoding).astype(np.int32)
        chunk_tokens = self._chunk_tokens(plan)
        prompt = self._features.prompt_part(plan, self._computed[plan.chunk_slot], len(decoding), self._tokens)
        row_slot = np.concatenate([decoding, plan.chunk_slot])
        lengths = np.concatenate([np.ones(len(decoding), np.int32), plan.chunk_length])
        query_starts = np.zeros(len(row_slot) + 1, np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        total = int(query_starts[-1])
        if not 0 < total <= self._max_tokens:
            raise ProtocolError(
                f"plan {plan.step} has {total} tokens; this worker takes 1 to {self._max_tokens} a step"
            )
        self._computed[row_slot] += lengths
        kv_lens = self._computed[row_slot]
        if (kv_lens > self._num_blocks[row_slot] * block_size).any():
            raise ProtocolError(f"plan {plan.step} computes a token for which its row has no block")
        sampled_rows = self._sampled_rows(plan, len(decoding))
        row_of_token = np.repeat(np.arange(len(row_slot), dtype=np.int32), lengths)
        sampled_slots = row_slot[sampled_rows]
        draws = bool(self._samples[sampled_slots].any())
        features = self._features.step(sampled_slots, kv_lens[sampled_rows], draws, prompt)
        return Step(
            plan=plan,
            table_index=np.concatenate([joined_index, grown_index]),
            table_block=np.concatenate([joined_block, plan.grow_block]),
            row_slot=row_slot,
            decode_rows=len(decoding),
            query_starts=query_starts,
            kv_lens=kv_lens,
            row_of_token=row_of_token,
            token_in_row=np.arange(total, dtype=np.int32) - query_starts[row_of_token],
            chunk_tokens=chunk_tokens,
            sampled_rows=sampled_rows,
            greedy=not draws and features is None,
            any_top_k=bool(self._top_k[sampled_slots].any()),
            any_top_p=bool(self._top_p[sampled_slots].any()),
            grammar=self._grammars.apply(plan, sampled_slots, len(decoding)),
            features=features,
            joins=joins,
        )

    def _leave(self, slots: IntColumn) -> None:
        self._require(slots, owned=True, what="leave")
        self._owned[slots] = False
        self._decoding[slots] = False
        self._features.leave(slots)
        for slot in slots:
            self._tokens[slot] = None

    def _join(self, plan: StepPlan) -> tuple[IntColumn, IntColumn]:
        """Enters the joining rows; returns the block table's entries that they set."""
        slots, counts, lengths = plan.join_slot, plan.join_num_blocks, plan.join_length
        if not len(slots):
            return slots, plan.join_block
        self._require(slots, owned=False, what="join")
        per_row: tuple[NDArray[Any], ...] = (
            plan.join_number, plan.join_attempt, plan.join_prompt_length, lengths, plan.join_computed, counts,
            plan.join_temperature, plan.join_top_k, plan.join_top_p, plan.join_seed,
        )  # fmt: skip
        if any(len(column) != len(slots) for column in per_row):
            raise ProtocolError(f"plan {plan.step}: the join columns differ in length")
        if (counts < 0).any() or (counts > self.width).any() or counts.sum() != len(plan.join_block):
            raise ProtocolError(f"plan {plan.step}: join_num_blocks does not fit join_block")
        if (lengths < 1).any() or lengths.sum() != len(plan.join_token):
            raise ProtocolError(f"plan {plan.step}: join_length does not fit join_token")
        self._require_blocks(plan.join_block)
        self._owned[slots] = True
        self._computed[slots] = plan.join_computed
        self._num_blocks[slots] = counts
        self._samples[slots] = plan.join_temperature > 0
        self._top_k[slots] = plan.join_top_k > 0
        self._top_p[slots] = plan.join_top_p < 1
        for slot, tokens in zip(slots, np.split(plan.join_token, np.cumsum(lengths)[:-1]), strict=True):
            self._tokens[slot] = tokens
        starts = np.cumsum(counts) - counts
        within = np.arange(len(plan.join_block), dtype=np.int32) - np.repeat(starts, counts)
        index = np.repeat(slots * self.width, counts) + within
        return index.astype(np.int32), plan.join_block

    def _grow(self, plan: StepPlan) -> IntColumn:
        """Counts the new blocks; returns the block table's entries that they set."""
        slots = plan.grow_slot
        self._require(slots, owned=True, what="grow")
        self._require_blocks(plan.grow_block)
        if len(slots) != len(plan.grow_block) or (self._num_blocks[slots] >= self.width).any():
            raise ProtocolError(f"plan {plan.step}: grow_slot does not fit grow_block or the block table")
        index = slots * self.width + self._num_blocks[slots]
        self._num_blocks[slots] += 1
        return index.astype(np.int32)

    def _chunk_tokens(self, plan: StepPlan) -> IntColumn:
        """The ids of the chunks' tokens, one chunk after the other."""
        self._require(plan.chunk_slot, owned=True, what="chunk")
        if len(plan.chunk_length) != len(plan.chunk_slot):
            raise ProtocolError(f"plan {plan.step}: chunk_length does not fit chunk_slot")
        pieces = [plan.chunk_slot[:0]]
        for slot, length in zip(plan.chunk_slot, plan.chunk_length, strict=True):
            tokens, start = self._tokens[slot], int(self._computed[slot])
            if tokens is None or length < 1 or start + length > len(tokens):
                raise ProtocolError(f"plan {plan.step}: slot {slot} has no {length} known tokens from {start} on")
            pieces.append(tokens[start : start + length])
        return np.concatenate(pieces)

    def _sampled_rows(self, plan: StepPlan, decode_rows: int) -> IntColumn:
        """All decoding rows, and the chunks that reached their row's end; those slots decode from the next step on."""
        completed = []
        for index, slot in enumerate(plan.chunk_slot):
            tokens = self._tokens[slot]
            if tokens is not None and self._computed[slot] == len(tokens):
                completed.append(decode_rows + index)
                self._decoding[slot] = True
                self._tokens[slot] = None
        return np.concatenate([np.arange(decode_rows, dtype=np.int32), np.array(completed, np.int32)])

    def _require(self, slots: IntColumn, *, owned: bool, what: str) -> None:
        if not len(slots):
            return
        if slots.min() < 0 or slots.max() >= self.slots:
            raise ProtocolError(f"{what}: a slot is outside 0 to {self.slots - 1}")
        if (self._owned[slots] != owned).any() or len(np.unique(slots)) != len(slots):
            raise ProtocolError(f"{what}: a slot is named twice or is {'not in use' if owned else 'in use already'}")

    def _require_blocks(self, blocks: IntColumn) -> None:
        if len(blocks) and (blocks.min() < 0 or blocks.max() >= self._block_limit):
            raise ProtocolError(f"a block id is outside 0 to {self._block_limit - 1}")
