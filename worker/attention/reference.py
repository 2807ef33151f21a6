"""Paged attention in plain torch: any device, any dtype, float32 inside, the same bits for a query in any batch.

Every query walks its keys in tiles of `TILE` tokens, in ascending order, keeping the running maximum m, the running
sum l and the unnormalised output acc of online softmax (Milakov & Gimelshein 2018; Dao et al. 2022, FlashAttention
algorithm 1). A tile in which a query sees nothing leaves its m, l and acc as they are, bit for bit: m' = max(m, -inf),
the correction factor exp(m - m') is 1 and the tile's weights are 0. So what a query gets depends neither on the other
queries of the batch nor on how many tiles they need, nor on the block size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache, LayerKV, select_slots
from .base import AttentionBackend, AttentionStep

TILE = 128
"""Tokens per key tile; block sizes divide it, so that a tile is whole blocks."""
_START = -1e30
"""Initial running maximum: finite, so that subtracting it from -inf is not NaN; below any real score."""
_GATHER_BUDGET = 1 << 26
"""Bytes of keys (or values, float32) that a chunk of queries may gather per tile."""


class ReferenceAttention(AttentionBackend):
    """See the module. With `per_query`, every query is computed by the same operations on the same shapes whatever
    its batch is; without it, prefill rows on a CPU take one matmul per row, which is quicker."""

    name: ClassVar[str] = "reference"

    def __init__(self, cache: KVCache, *, per_query: bool) -> None:
        if TILE % cache.block_size:
            raise ValueError(f"reference attention needs a block size that divides {TILE}, got {cache.block_size}")
        self.cache = cache
        self.per_query = per_query

    def begin(self, batch: Batch) -> ReferenceStep:
        return ReferenceStep(self.cache, batch, per_query=self.per_query)


class ReferenceStep(AttentionStep):
    def __init__(self, cache: KVCache, batch: Batch, *, per_query: bool) -> None:
        self.cache = cache
        self.batch = batch
        self.kv_slots = batch.kv_slots
        self.per_query = per_query
        tables = batch.block_tables if batch.lines is None else batch.block_tables[batch.lines.to(torch.int64)]
        self.tables = _whole_tiles(tables, batch.block_size, cache.scratch_block)
        # A captured graph replays with other lengths, so only a CPU may go by what the host knows of them.
        self.by_host = not batch.token_ids.is_cuda
        starts = batch.query_starts.tolist()
        tiled = batch.decode_rows if self.by_host else batch.num_rows
        self.prefill = [(row, starts[row], starts[row + 1]) for row in range(tiled, batch.num_rows)]
        self.scattered = starts[tiled]

    def attend_cached(self, layer: int, query: Tensor, out: Tensor | None = None) -> Tensor:
        spec = self.cache.spec[layer]
        if out is None:
            out = torch.empty(query.shape[0], spec.query_heads, spec.value_dim, dtype=query.dtype, device=query.device)
        chunk = max(1, _GATHER_BUDGET // (TILE * spec.kv_heads * max(spec.head_dim, spec.value_dim) * 4))
        for start, end in _chunks(0, self.scattered, chunk):
            tiles = self._tiles(spec, self.batch.kv_lens_host[start:end] - 1)
            rows = self.batch.row_of_token[start:end]
            out[start:end] = self._attend_tiled(_Scattered(self, layer, rows), spec, query, start, end, tiles)
        for row, first, last in self.prefill:
            if not self.per_query:
                out[first:last] = self._attend_row(layer, spec, query, row, first, last)
                continue
            kv_len = int(self.batch.kv_lens_host[row])
            for start, end in _chunks(first, last, chunk):
                tiles = self._tiles(spec, np.array([kv_len - last + start, kv_len - last + end - 1]))
                keys = _Shared(self, layer, row, kv_len)
                out[start:end] = self._attend_tiled(keys, spec, query, start, end, tiles)
        return out

    def _attend_tiled(
        self, tiled: _Scattered | _Shared, spec: LayerKV, query: Tensor, start: int, end: int, tiles: range
    ) -> Tensor:
        """Queries [start, end) by tiles: [n, query_heads, value_dim] float32."""
        n, kv_heads = end - start, spec.kv_heads
        group = spec.query_heads // kv_heads
        positions = self.batch.positions[start:end, None]
        q = query[start:end].to(torch.float32).mul(spec.scale).reshape(n, kv_heads, group, spec.head_dim)
        m = torch.full((n, kv_heads, group, 1), _START, dtype=torch.float32, device=query.device)
        total = torch.zeros_like(m)
        acc = torch.zeros(n, kv_heads, group, spec.value_dim, dtype=torch.float32, device=query.device)
        for tile in tiles:
            kv_positions = torch.arange(tile * TILE, (tile + 1) * TILE, device=query.device)
            unseen = kv_positions > positions
            if spec.window is not None:
                unseen |= kv_positions <= positions - spec.window
            tiled.load(tile, unseen)
            scores = _softcap(tiled.scores(q), spec.softcap)
            scores = scores.masked_fill_(unseen[:, None, None, :], float("-inf"))
            m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - m_new)
            correction = torch.exp(m - m_new)
            total = total * correction + weights.sum(-1, keepdim=True)
            acc = acc * correction + tiled.weighted(weights)
            m = m_new
        return (acc / total).view(n, spec.query_heads, spec.value_dim)

    def _tiles(self, spec: LayerKV, positions: NDArray[np.int32]) -> range:
        """The tiles that some query at one of `positions` may see."""
        if not self.by_host:
            return range(self.tables.shape[1] * self.batch.block_size // TILE)
        lowest = 0 if spec.window is None else max(0, int(positions.min()) - spec.window + 1)
        return range(lowest // TILE, int(positions.max()) // TILE + 1)

    def _attend_row(self, layer: int, spec: LayerKV, query: Tensor, row: int, start: int, end: int) -> Tensor:
        """Queries [start, end) of one row against that row's keys at once: [n, query_heads, value_dim] float32."""
        keys, values = self.cache.flat(layer)
        n, kv_len, block_size = end - start, int(self.batch.kv_lens_host[row]), self.batch.block_size
        lowest = 0 if spec.window is None else max(0, kv_len - n - spec.window + 1)
        blocks = self.tables[row, lowest // block_size : -(-kv_len // block_size)]
        kv_positions = torch.arange(lowest // block_size * block_size, kv_len, device=query.device)
        slots = (blocks[:, None] * block_size + torch.arange(block_size, device=query.device)).flatten()
        slots = slots[: kv_positions.shape[0]]
        group = spec.query_heads // spec.kv_heads
        q = query[start:end].to(torch.float32).mul(spec.scale).reshape(n, spec.kv_heads, group, spec.head_dim)
        k = select_slots(keys, slots).permute(1, 2, 0)
        v = select_slots(values, slots).transpose(0, 1)
        scores = _softcap(torch.matmul(q.permute(1, 2, 0, 3).flatten(1, 2), k), spec.softcap)
        scores = scores.view(spec.kv_heads, group, n, -1)
        query_positions = torch.arange(kv_len - n, kv_len, device=query.device)[:, None]
        hidden = kv_positions > query_positions
        if spec.window is not None:
            hidden |= kv_positions <= query_positions - spec.window
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        out = torch.matmul(weights.flatten(1, 2), v).view(spec.kv_heads, group, n, spec.value_dim)
        return out.permute(2, 0, 1, 3).reshape(n, spec.query_heads, spec.value_dim)


class _Scattered:
    """Tiles of queries that each have keys of their own: gathered per query."""

    def __init__(self, step: ReferenceStep, layer: int, rows: Tensor) -> None:
        self.step, self.layer = step, layer
        self.tables = step.tables[rows]

    def load(self, tile: int, unseen: Tensor) -> None:
        n, cache = unseen.shape[0], self.step.cache
        spec, (keys, values) = cache.spec[self.layer], cache.flat(self.layer)
        rows = _head_rows(self.tables, tile, cache.block_size, spec.kv_heads)
        self.keys = _gather(keys, rows).view(n * spec.kv_heads, TILE, spec.head_dim)
        gathered = _gather(values, rows).view(n, spec.kv_heads, TILE, spec.value_dim)
        # Weight 0 does not silence a NaN or inf that a former owner left in a block.
        gathered.masked_fill_(unseen[:, None, :, None], 0.0)
        self.values = gathered.view(n * spec.kv_heads, TILE, spec.value_dim)

    def scores(self, query: Tensor) -> Tensor:
        n, kv_heads, group, _ = query.shape
        return _bmm(query.flatten(0, 1), self.keys.transpose(1, 2)).view(n, kv_heads, group, TILE)

    def weighted(self, weights: Tensor) -> Tensor:
        n, kv_heads, group, _ = weights.shape
        return _bmm(weights.flatten(0, 1), self.values).view(n, kv_heads, group, -1)


class _Shared:
    """Tiles of queries of one row: its keys are gathered once and lent to every query, each of which is still a
    product of its own, of the same shape as in `_Scattered`, and so has the same bits."""

    def __init__(self, step: ReferenceStep, layer: int, row: int, kv_len: int) -> None:
        self.step, self.layer, self.kv_len = step, layer, kv_len
        self.tables = step.tables[row : row + 1]

    def load(self, tile: int, unseen: Tensor) -> None:
        cache = self.step.cache
        spec, (keys, values) = cache.spec[self.layer], cache.flat(self.layer)
        rows = _head_rows(self.tables, tile, cache.block_size, spec.kv_heads)
        self.keys = _gather(keys, rows).view(spec.kv_heads, TILE, spec.head_dim)
        self.values = _gather(values, rows).view(spec.kv_heads, TILE, spec.value_dim)
        self.values[:, max(0, self.kv_len - tile * TILE) :] = 0.0  # as above; what is before is the row's own

    def scores(self, query: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:3], TILE)
        for head, keys in enumerate(self.keys):
            out[:, head] = _bmm(query[:, head], keys.t().expand(query.shape[0], -1, -1))
        return out

    def weighted(self, weights: Tensor) -> Tensor:
        out = weights.new_empty(*weights.shape[:3], self.values.shape[2])
        for head, values in enumerate(self.values):
            out[:, head] = _bmm(weights[:, head], values.expand(weights.shape[0], -1, -1))
        return out


def _head_rows(tables: Tensor, tile: int, block_size: int, kv_heads: int) -> Tensor:
    """Where the tile's tokens lie in a flat cache seen as [slots * kv_heads, dim], head by head:
    [n * kv_heads * TILE] for block tables [n, whole tiles]."""
    per_tile = TILE // block_size
    blocks = tables[:, None, tile * per_tile : (tile + 1) * per_tile, None]
    slots = (blocks * block_size + torch.arange(block_size, device=tables.device)).flatten(2)
    return (slots * kv_heads + torch.arange(kv_heads, device=tables.device)[None, :, None]).flatten()


def _gather(cache: Tensor, rows: Tensor) -> Tensor:
    """Rows of a flat cache [slots, kv_heads, dim], float32. (index_select is many times quicker here than indexing.)"""
    return select_slots(cache.view(-1, cache.shape[2]), rows)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """torch.bmm, never of a single pair: that one would be shared among threads, and rounded, in another way."""
    if left.shape[0] > 1:
        return torch.bmm(left, right)
    return torch.bmm(left.expand(2, -1, -1), right.expand(2, -1, -1))[:1]


def _chunks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, size):
        yield at, min(at + size, end)


def _softcap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _whole_tiles(block_tables: Tensor, block_size: int, scratch_block: int) -> Tensor:
    """Block tables [R, W'] int64 whose width is a whole number of tiles."""
    missing = -block_tables.shape[1] % (TILE // block_size)
    return torch.nn.functional.pad(block_tables.to(torch.int64), (0, missing), value=scratch_block)
