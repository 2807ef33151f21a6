"""What the device remembers between steps, and how one step runs on it.

The tensors here are only ever written by kernels of the compute stream, in plan order: that order is the lock. A
decoding row's input token never visits the host: the step before wrote it to `last_token`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .adjustments import Adjustments, StagedJoins, stage_joins
from .attention.sharing import Cutting
from .batch import Batch
from .logprobs import tell
from .model import PagedModel
from .rows import Step
from .sampler import AllowedTokens, SamplingColumns, allow, greedy, sample
from .staging import Lane

PROMPT_PIECE: Final = 128
"""Positions of prompts whose logits are computed at once, to have their log-probabilities told; no more than there are
slots, whose logits there is room for."""


@dataclass(slots=True)
class StagedFeatures:
    """What the features of a step's rows need on the device beside their tables, int32."""

    told_rows: Tensor
    prompt_index: Tensor
    prompt_target: Tensor
    likeliest: int
    """Of each position of prompts."""


def stage_features(step: Step, lane: Lane) -> StagedFeatures | None:
    """Writes it into the step's lane; None if there is nothing."""
    features = step.features
    if features is None or not (len(features.told_rows) or features.prompt is not None):
        return None
    prompt = features.prompt
    nothing = features.told_rows[:0]
    index, target = (nothing, nothing) if prompt is None else (prompt.token_index, prompt.target)
    told_rows, prompt_index, prompt_target = lane.bring([features.told_rows, index, target])
    likeliest = 0 if prompt is None else max(prompt.entries) - 1
    return StagedFeatures(told_rows, prompt_index, prompt_target, likeliest)


@dataclass(slots=True)
class StagedStep:
    """A step whose arrays are in a lane: the device's views of them, all int32."""

    step: Step
    lane: Lane
    join_slot: Tensor
    join_computed: Tensor
    join_prompt_length: Tensor
    join_temperature: Tensor
    join_top_k: Tensor
    join_top_p: Tensor
    join_seed: Tensor
    table_index: Tensor
    table_block: Tensor
    row_slot: Tensor
    row_of_token: Tensor
    token_in_row: Tensor
    chunk_tokens: Tensor
    query_ends: Tensor
    sampled_rows: Tensor
    masks: StagedMasks | None
    joins: StagedJoins | None
    features: StagedFeatures | None
    pieces: Tensor | None
    """See Batch."""


@dataclass(slots=True)
class StagedMasks:
    """Grammar masks that the host may still be working on."""

    rows: Tensor
    """[G] int32: those of the sampled rows that have one."""
    collect: Callable[[], Tensor]
    """To be called once, where they are needed. Lets the device or the caller wait for the host; then the masks are on
    their way to the device: [G, mask_words] int32."""

    def allowed(self) -> AllowedTokens:
        return AllowedTokens(self.rows.to(torch.int64), self.collect())


def stage_masks(step: Step, lane: Lane, collect: Callable[[], Tensor]) -> StagedMasks | None:
    """None for a step none of whose sampled rows has a grammar."""
    if step.grammar is None or not len(step.grammar.at):
        return None
    return StagedMasks(lane.put(step.grammar.at), collect)


def stage(step: Step, lane: Lane, masks: StagedMasks | None, cutting: Cutting | None) -> StagedStep:
    """Writes a step into its lane, on the host. `cutting`: see AttentionBackend."""
    plan, put = step.plan, lane.put
    pieces = None
    if cutting is not None and step.decode_rows:
        cut = np.empty(cutting.room(step.decode_rows), np.int32)
        cutting.write(step.kv_lens[: step.decode_rows], cut)
        pieces = put(cut)
    return StagedStep(
        step=step,
        lane=lane,
        join_slot=put(plan.join_slot),
        join_computed=put(plan.join_computed),
        join_prompt_length=put(plan.join_prompt_length),
        join_temperature=put(plan.join_temperature),
        join_top_k=put(plan.join_top_k),
        join_top_p=put(plan.join_top_p),
        join_seed=put(plan.join_seed.view(np.int32)),
        table_index=put(step.table_index),
        table_block=put(step.table_block),
        row_slot=put(step.row_slot),
        row_of_token=put(step.row_of_token),
        token_in_row=put(step.token_in_row),
        chunk_tokens=put(step.chunk_tokens),
        query_ends=put(step.query_starts[1:]),
        sampled_rows=put(step.sampled_rows),
        masks=masks,
        joins=None if step.joins is None else stage_joins(step.joins, lane),
        features=stage_features(step, lane),
        pieces=pieces,
    )


class DeviceState:
    """Slot-indexed tensors of one worker."""

    def __init__(self, model: PagedModel, *, slots: int, width: int, block_size: int) -> None:
        device = model.device

        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots + 1, dtype=dtype, device=device)

        self.model = model
        self.slots = slots
        """The slot of this number is none of the scheduler's: rows that only fill a batch up use it."""
        self.width = width
        self.block_size = block_size
        self.block_table = torch.full((slots + 1, width), model.scratch_block, dtype=torch.int32, device=device)
        self.length = column(torch.int32)
        """Tokens whose keys and values are computed: the position of the next."""
        self.last_token = column(torch.int64)
        """The token sampled last: the next input of a decoding row."""
        self.prompt_length = column(torch.int32)
        self.temperature = column(torch.float32)
        self.top_k = column(torch.int32)
        self.top_p = column(torch.float32)
        self.seed = column(torch.int64)
        self.adjustments = Adjustments(slots, model.vocab_size, device)
        self.head_rows: Sequence[int] = ()
        """Ascending: the model's head runs for the next larger number of rows. For others its kernels may have to be
        loaded first, and for that the driver waits until the device has nothing left to do."""

    def clear(self) -> None:
        """As new, in the same memory, which captured graphs know."""
        self.block_table.fill_(self.model.scratch_block)
        columns = (
            self.length,
            self.last_token,
            self.prompt_length,
            self.temperature,
            self.top_k,
            self.top_p,
            self.seed,
        )
        for column in columns:
            column.zero_()
        self.adjustments.clear()

    @torch.no_grad()
    def run(self, staged: StagedStep) -> None:
        """One whole step on the current stream: deltas, forward pass, sampling; its tokens end in the lane. Waits for
        nothing."""
        self._apply(staged)
        batch, slots = self._prepare(staged)
        rows, count = staged.sampled_rows, len(staged.step.sampled_rows)
        last = (staged.query_ends[rows] - 1).to(torch.int64)
        wanted = self._filled_up(last) if count else last
        if staged.features is not None and len(staged.features.prompt_index):
            every = self.model.hidden(batch, in_pieces=True)
            self._tell_prompts(staged.features, every, staged.lane)
            hidden = every[wanted]
        else:
            hidden = self.model.hidden(batch, in_pieces=True, wanted=wanted)
        if count:
            staged.lane.sampling_begins()
            tokens = self.sample(
                staged.step,
                hidden,
                slots[rows],
                batch.kv_lens[rows],
                staged.masks,
                staged.features,
                staged.lane,
            )
            self.last_token[slots[rows]] = tokens
            staged.lane.sampled_device[:count] = tokens

    def _filled_up(self, last: Tensor) -> Tensor:
        """Positions of hidden rows, and others behind them whose tokens nobody reads; see `head_rows`."""
        at = bisect_left(self.head_rows, len(last))
        if at == len(self.head_rows):
            return last
        return torch.nn.functional.pad(last, (0, self.head_rows[at] - len(last)))

    def _apply(self, staged: StagedStep) -> None:
        if len(staged.step.table_index):
            self.block_table.view(-1)[staged.table_index.to(torch.int64)] = staged.table_block
        if len(staged.step.plan.join_slot):
            slots = staged.join_slot.to(torch.int64)
            self.length[slots] = staged.join_computed
            self.prompt_length[slots] = staged.join_prompt_length
            self.temperature[slots] = staged.join_temperature.view(torch.float32)
            self.top_k[slots] = staged.join_top_k
            self.top_p[slots] = staged.join_top_p.view(torch.float32)
            self.seed[slots] = _int64(staged.join_seed)
        if staged.joins is not None:
            self.adjustments.join(staged.joins)

    def _prepare(self, staged: StagedStep) -> tuple[Batch, Tensor]:
        """The batch that the model computes, and its rows' slots ([R] int64). Advances `length`."""
        step = staged.step
        slots = staged.row_slot.to(torch.int64)
        row_of_token = staged.row_of_token.to(torch.int64)
        positions = (self.length[slots][row_of_token] + staged.token_in_row).to(torch.int64)
        query_ends = staged.query_ends
        query_lens = torch.diff(query_ends, prepend=query_ends.new_zeros(1))
        kv_lens = self.length[slots] + query_lens
        self.length[slots] = kv_lens
        width = -(-int(step.kv_lens.max()) // self.block_size)
        tables = self.block_table[slots, :width]
        blocks = tables[row_of_token, positions // self.block_size].to(torch.int64)
        batch = Batch(
            lane=staged.lane.index,
            token_ids=torch.cat([self.last_token[slots[: step.decode_rows]], staged.chunk_tokens.to(torch.int64)]),
            positions=positions,
            kv_slots=blocks * self.block_size + positions % self.block_size,
            row_of_token=row_of_token,
            block_tables=tables,
            kv_lens=kv_lens,
            query_starts=step.query_starts,
            kv_lens_host=step.kv_lens,
            decode_rows=step.decode_rows,
            block_size=self.block_size,
            pieces=staged.pieces,
        )
        return batch, slots

    def sample(
        self,
        step: Step,
        hidden: Tensor,
        slots: Tensor,
        kv_lens: Tensor,
        masks: StagedMasks | None,
        staged: StagedFeatures | None,
        lane: Lane,
    ) -> Tensor:
        """A token for each of N rows: hidden [N or more, hidden], slots [N] int64, kv_lens [N]. Returns [N] int64.
        `masks`, if there are any, are waited for. Log-probabilities that were asked for come back through the lane."""
        count = len(slots)
        if step.greedy and masks is None:
            return self.model.greedy(hidden)[:count]
        features = step.features
        position = kv_lens - self.prompt_length[slots]
        logits = given = self.model.logits(hidden)[:count]
        if masks is not None:
            logits = allow(logits, masks.allowed())
        if features is not None and features.adjusts:
            logits = self.adjustments.apply(features, logits, slots, position)
        if step.greedy or (features is not None and not features.draws):
            tokens = greedy(logits)
        else:
            columns = SamplingColumns(
                temperature=self.temperature[slots],
                top_k=self.top_k[slots],
                top_p=self.top_p[slots],
                min_p=self.adjustments.min_p(slots) if features is not None and features.min_p else None,
                seed=self.seed[slots],
                sample_index=torch.zeros_like(kv_lens),
                position=position,
                any_top_k=step.any_top_k,
                any_top_p=step.any_top_p,
            )
            tokens = sample(logits, columns)
        if features is not None:
            self.adjustments.note(features, slots, position, tokens)
            if staged is not None and len(features.told_rows):
                rows = staged.told_rows.to(torch.int64)
                likeliest = int(features.told_entries.max()) - 1
                lane.told = lane.take(tell(given[rows], tokens[rows], likeliest, self.model.log_softmax))
        return tokens

    def _tell_prompts(self, staged: StagedFeatures, hidden: Tensor, lane: Lane) -> None:
        """Log-probabilities of the tokens that chunks of prompts consist of, in pieces, for the memory."""
        piece = min(PROMPT_PIECE, self.slots)
        likeliest = staged.likeliest
        parts = [
            tell(self.model.logits(hidden[index.to(torch.int64)]), target, likeliest, self.model.log_softmax)
            for index, target in zip(staged.prompt_index.split(piece), staged.prompt_target.split(piece), strict=True)
        ]
        lane.prompt_told = lane.take(torch.cat(parts))


def _int64(halves: Tensor) -> Tensor:
    """int64 values from int32 pairs, low half first: a view would need an 8-byte aligned offset."""
    low = halves[0::2].to(torch.int64) & 0xFFFFFFFF
    return low | (halves[1::2].to(torch.int64) << 32)
