"""Decode steps as CUDA graphs: what would be hundreds of launches is one.

A graph is captured for each of a few numbers of rows; a step takes the next larger one, and rows that only fill it up
use a slot and a block of their own. A step is two graphs, launched back to back: the forward pass, which also applies
the step's deltas and advances the lengths, and greedy sampling. Rows that draw random numbers are sampled from by
ordinary launches behind the first graph, as are rows that follow a grammar. Steps with chunks are the business of
pieces.py.

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
from torch import Tensor

from .batch import Batch
from .rows import Step
from .staging import Lane
from .state import DeviceState, StagedFeatures, StagedMasks, stage_features

LARGEST_GRAPH: Final = 512
"""Rows of the largest graph, unless another number is given: beyond, a step is long enough to be launched in time."""
_COLUMNS: Final = 3
"""Input columns of a row: slot, block table column that changes (or -1), its block. Behind them is how the
rows' contexts are cut."""


def graph_sizes(most: int) -> list[int]:
    """Numbers of rows to capture when up to `most` rows decode: of the graph that R rows take, at most max(7, R // 3)
    rows only fill up. Between 256 and 512, products of 288 rows take as long as of 320, and of 448 longer than of 512
    (docs/performance.md)."""
    steps = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512]
    size = steps[-1]
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
    masks: StagedMasks | None
    features: StagedFeatures | None


@dataclass(slots=True)
class _Graph:
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
        self._cutting = state.model.cutting
        capacity = self._input_size(most)
        self._input = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._kv_slots = torch.zeros(most, dtype=torch.int64, device=device)
        self._kv_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(most, dtype=torch.int32, device=device)
        self._row_of_token = torch.arange(most, device=device)
        self._host_input = np.zeros(capacity, np.int32)
        self._host_kv_lens = np.zeros(most, np.int32)
        self.pool = torch.cuda.graph_pool_handle()
        """Of device memory, to be shared with graphs that run on the same stream."""
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
        values = self._host_input[: self._input_size(size)]
        slot, column, block = values[: _COLUMNS * size].reshape(_COLUMNS, size)
        slot[:rows], slot[rows:] = step.row_slot, state.slots
        column.fill(-1)
        if len(step.table_index):
            grown_slot, grown_column = np.divmod(step.table_index, state.width)
            at = np.searchsorted(step.row_slot, grown_slot)
            column[at], block[at] = grown_column, step.table_block
        if self._cutting is not None:
            kv_lens = self._host_kv_lens[:size]
            kv_lens[:rows], kv_lens[rows:] = step.kv_lens, 1
            self._cutting.write(kv_lens, values[_COLUMNS * size :])
        features = stage_features(step, lane)
        return StagedDecode(step, lane, size, lane.put(values), masks, features)

    def _input_size(self, size: int) -> int:
        return _COLUMNS * size + (0 if self._cutting is None else self._cutting.room(size))

    @torch.no_grad()
    def run(self, staged: StagedDecode) -> None:
        """The whole step on the current stream, as DeviceState.run. Must follow `stage` before the next `stage`."""
        rows, state, graph = len(staged.step.row_slot), self._state, self._graphs[staged.size]
        self._input[: len(staged.input)].copy_(staged.input)
        graph.forward.replay()
        staged.lane.sampling_begins()
        if staged.step.greedy and staged.masks is None:
            graph.choose.replay()
            tokens = self._tokens[:rows]
        else:
            slots = self._input[:rows].to(torch.int64)
            drawn = state.sample(
                staged.step,
                graph.hidden,
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
        slot, grow_column, _ = self._columns(size)
        # The first run compiles and allocates what a capture must not. All its rows only fill up.
        slot.fill_(self._state.slots)
        grow_column.fill_(-1)
        if self._cutting is not None:
            pieces = np.empty(self._cutting.room(size), np.int32)
            self._cutting.write(np.ones(size, np.int32), pieces)
            self._pieces(size).copy_(torch.from_numpy(pieces))
        stream = torch.cuda.Stream(self._state.model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            hidden = self._forward(size)
            self._choose(size, hidden)
            self._state.model.logits(hidden)  # loads its kernels, for steps that are not greedy
        torch.cuda.current_stream().wait_stream(stream)
        forward, choose = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self.pool):
            hidden = self._forward(size)
        with torch.cuda.graph(choose, pool=self.pool):
            self._choose(size, hidden)
        return _Graph(forward, choose, hidden)

    def _columns(self, size: int) -> Tensor:
        """A view of the device's input for a graph of `size` rows: [columns, size]."""
        return self._input[: _COLUMNS * size].view(_COLUMNS, size)

    def _pieces(self, size: int) -> Tensor:
        return self._input[_COLUMNS * size : self._input_size(size)]

    def _forward(self, size: int) -> Tensor:
        from . import kernels

        state = self._state
        slot, grow_column, grow_block = self._columns(size)
        kernels.open_decode(
            row_slot=slot,
            grow_column=grow_column,
            grow_block=grow_block,
            block_table=state.block_table,
            length=state.length,
            last_token=state.last_token,
            token_ids=self._token_ids,
            positions=self._positions,
            kv_slots=self._kv_slots,
            kv_lens=self._kv_lens,
            block_size=state.block_size,
        )
        batch = Batch(
            lane=0,
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            kv_slots=self._kv_slots[:size],
            row_of_token=self._row_of_token[:size],
            block_tables=state.block_table,
            lines=slot,
            pieces=None if self._cutting is None else self._pieces(size),
            kv_lens=self._kv_lens[:size],
            query_starts=np.arange(size + 1, dtype=np.int32),
            kv_lens_host=np.ones(size, np.int32),
            decode_rows=size,
            block_size=state.block_size,
        )
        return state.model.hidden(batch)

    def _choose(self, size: int, hidden: Tensor) -> None:
        tokens = self._state.model.greedy(hidden)
        self._state.last_token[self._columns(size)[0].to(torch.int64)] = tokens
        self._tokens[:size].copy_(tokens)
