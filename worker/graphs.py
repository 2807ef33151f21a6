"""Decode steps as CUDA graphs: what would be hundreds of launches is one.

A graph is captured for each of a few numbers of rows; a step takes the next larger one, and rows that only fill it up
use a slot and a block of their own. A step is two graphs, launched back to back: the forward pass, which also applies
the step's deltas and advances the lengths, and greedy sampling. Rows that draw random numbers are sampled from by
ordinary launches behind the first graph, as are rows that follow a grammar. Steps with chunks are no business of this
module.

Graphs read their input from one place on the device, where a copy on the compute stream puts it: so they belong to no
lane. All share one memory pool, since only one runs at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention.base import DecodeAttention
from .batch import Batch
from .rows import Step
from .staging import Lane
from .state import DeviceState, StagedFeatures, StagedMasks, stage_features

LARGEST_GRAPH: Final = 512
"""Rows of the largest graph, unless another number is given: beyond, a step is long enough to be launched in time."""
_COLUMNS: Final = 4
"""Input columns of a row: slot, block table column that changes (or -1), its block, tokens in the last block. One more
has an entry for the end: where the row's block ids begin."""


def graph_sizes(most: int) -> list[int]:
    """Numbers of rows to capture when up to `most` rows decode: a step wastes at most a third of its rows."""
    steps = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    size = 256
    while size < most:
        size += size // 4
        steps.append(size)
    return [*(size for size in steps if size < most), most]


@dataclass(slots=True)
class StagedDecode:
    """A decode step whose input is in a lane."""

    step: Step
    lane: Lane
    size: int
    input: Tensor
    page_starts: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    masks: StagedMasks | None
    features: StagedFeatures | None


@dataclass(slots=True)
class _Graph:
    attention: DecodeAttention
    forward: torch.cuda.CUDAGraph
    choose: torch.cuda.CUDAGraph
    hidden: Tensor


class DecodeGraphs:
    """Graphs over one DeviceState and one KV cache, both of which must stay where they are."""

    def __init__(self, state: DeviceState, sizes: Sequence[int], progress: Callable[[str, float], None]) -> None:
        """Captures now, which takes a second or so for ten sizes. Nothing else may run on the device meanwhile."""
        device = state.model.device
        self._state = state
        self._sizes = sorted(set(sizes))
        most = self._sizes[-1]
        self._input = torch.zeros((_COLUMNS + 1) * most + 1, dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._kv_slots = torch.zeros(most, dtype=torch.int64, device=device)
        self._kv_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._page_indices = torch.zeros(most * state.width, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(most, dtype=torch.int32, device=device)
        self._row_of_token = torch.arange(most, device=device)
        self._no_tables = torch.empty((0, 0), dtype=torch.int32, device=device)
        self._host_input = np.zeros((_COLUMNS + 1) * most + 1, np.int32)
        self._host_kv_lens = np.zeros(most, np.int32)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, _Graph] = {}
        for done, size in enumerate(reversed(self._sizes)):  # the largest first: the others fit into its memory
            progress("capturing CUDA graphs", done / len(self._sizes))
            self._graphs[size] = self._capture(size)
        progress("capturing CUDA graphs", 1.0)

    def take(self, step: Step) -> bool:
        """The step is one of these: all its rows decode, none joins, and new blocks are theirs, one each."""
        rows = len(step.row_slot)
        if step.decode_rows != rows or len(step.plan.join_slot) or rows > self._sizes[-1]:
            return False
        if not len(step.table_index):
            return True
        slots = step.table_index // self._state.width
        at = np.minimum(np.searchsorted(step.row_slot, slots), rows - 1)
        return bool((step.row_slot[at] == slots).all()) and len(np.unique(at)) == len(at)

    def stage(self, step: Step, lane: Lane, masks: StagedMasks | None) -> StagedDecode:
        """Writes a step that `take` accepted into its lane, on the host."""
        rows, state = len(step.row_slot), self._state
        size = self._sizes[bisect_left(self._sizes, rows)]
        values = self._host_input[: (_COLUMNS + 1) * size + 1]
        slot, column, block, last_page_len = values[: _COLUMNS * size].reshape(_COLUMNS, size)
        page_starts = values[_COLUMNS * size :]
        slot[:rows], slot[rows:] = step.row_slot, state.slots
        column.fill(-1)
        if len(step.table_index):
            grown_slot, grown_column = np.divmod(step.table_index, state.width)
            at = np.searchsorted(step.row_slot, grown_slot)
            column[at], block[at] = grown_column, step.table_block
        kv_lens = self._host_kv_lens[:size]
        kv_lens[:rows], kv_lens[rows:] = step.kv_lens, 1
        pages = (kv_lens + (state.block_size - 1)) // state.block_size
        np.subtract(kv_lens, (pages - 1) * state.block_size, out=last_page_len)
        page_starts[0] = 0
        np.cumsum(pages, out=page_starts[1:])
        features = stage_features(step, lane)
        return StagedDecode(step, lane, size, lane.put(values), page_starts, kv_lens, masks, features)

    @torch.no_grad()
    def run(self, staged: StagedDecode) -> None:
        """The whole step on the current stream, as DeviceState.run. Must follow `stage` before the next `stage`."""
        rows, state, graph = len(staged.step.row_slot), self._state, self._graphs[staged.size]
        self._input[: len(staged.input)].copy_(staged.input)
        graph.attention.plan(staged.lane.index, staged.page_starts, staged.kv_lens)
        graph.forward.replay()
        staged.lane.sampling_begins()
        if staged.step.greedy and staged.masks is None:
            graph.choose.replay()
            tokens = self._tokens[:rows]
        else:
            slots = self._input[:rows].to(torch.int64)
            drawn = state.sample(
                staged.step,
                graph.hidden[:rows],
                slots,
                self._kv_lens[:rows],
                staged.masks,
                staged.features,
                staged.lane,
            )
            state.last_token[slots] = drawn
            tokens = drawn
        staged.lane.sampled_device[:rows].copy_(tokens)

    def _capture(self, size: int) -> _Graph:
        columns, page_starts = self._columns(size)
        slot, _, _, last_page_len = columns
        attention = self._state.model.open_decode(size, page_starts, last_page_len, self._page_indices)
        # The first run compiles and allocates what a capture must not. All its rows only fill up.
        slot.fill_(self._state.slots)
        columns[1].fill_(-1)
        stream = torch.cuda.Stream(self._state.model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._choose(size, self._forward(size, attention))
        torch.cuda.current_stream().wait_stream(stream)
        forward, choose = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            hidden = self._forward(size, attention)
        with torch.cuda.graph(choose, pool=self._pool):
            self._choose(size, hidden)
        return _Graph(attention, forward, choose, hidden)

    def _columns(self, size: int) -> tuple[Tensor, Tensor]:
        """Views of the device's input for a graph of `size` rows: [columns, size], and where page lists begin."""
        end = _COLUMNS * size
        return self._input[:end].view(_COLUMNS, size), self._input[end : end + size + 1]

    def _forward(self, size: int, attention: DecodeAttention) -> Tensor:
        from . import kernels

        state = self._state
        (slot, grow_column, grow_block, _), page_starts = self._columns(size)
        kernels.open_decode(
            row_slot=slot,
            grow_column=grow_column,
            grow_block=grow_block,
            page_starts=page_starts,
            block_table=state.block_table,
            length=state.length,
            last_token=state.last_token,
            token_ids=self._token_ids,
            positions=self._positions,
            kv_slots=self._kv_slots,
            kv_lens=self._kv_lens,
            page_indices=self._page_indices,
            block_size=state.block_size,
        )
        batch = Batch(
            lane=0,
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            kv_slots=self._kv_slots[:size],
            row_of_token=self._row_of_token[:size],
            block_tables=state.block_table[slot.to(torch.int64)] if attention.reads_block_tables else self._no_tables,
            kv_lens=self._kv_lens[:size],
            query_starts=np.arange(size + 1, dtype=np.int32),
            kv_lens_host=np.ones(size, np.int32),
            decode_rows=size,
            block_size=state.block_size,
        )
        return state.model.decode_hidden(attention, batch)

    def _choose(self, size: int, hidden: Tensor) -> None:
        tokens = self._state.model.greedy(hidden)
        self._state.last_token[self._columns(size)[0][0].to(torch.int64)] = tokens
        self._tokens[:size].copy_(tokens)
