"""Paged attention in plain torch: any device, any dtype, float32 inside, the same bits for a query in any batch.

Every query walks its keys in tiles of `TILE` tokens, in ascending order, keeping the running maximum m, the running
sum l and the unnormalised output acc of online softmax (Milakov & Gimelshein 2018; Dao et al. 2022, FlashAttention
algorithm 1). A tile in which a query sees nothing leaves its m, l and acc as they are, bit for bit: m' = max(m, -inf),
the correction factor exp(m - m') is 1 and the tile's weights are 0. So what a query gets depends neither on the other
queries of the batch nor on how many tiles they need, nor on the block size.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache, LayerKV
from .base import AttentionBackend

TILE = 128
"""Tokens per key tile; block sizes divide it, so that a tile is whole blocks."""
_START = -1e30
"""Initial running maximum: finite, so that subtracting it from -inf is not NaN; below any real score."""
_GATHER_BUDGET = 1 << 26
"""Bytes of gathered keys (or values, float32) per tile; queries are taken in chunks that keep to it."""
_CHUNK_MULTIPLE = 16
"""Query chunks are multiples of this: the same as the row tile of batch-invariant matmuls."""


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
        return ReferenceStep(self.cache, batch, per_row_prefill=not self.per_query and not batch.token_ids.is_cuda)


class ReferenceStep:
    def __init__(self, cache: KVCache, batch: Batch, *, per_row_prefill: bool) -> None:
        self.cache = cache
        self.batch = batch
        self.tables = _whole_tiles(batch.block_tables, batch.block_size, cache.scratch_block)
        self.tiled_tokens = batch.decode_rows if per_row_prefill else batch.num_tokens
        # Captured graphs replay with other lengths, so only the CPU may skip tiles by host lengths.
        self.spans = None if batch.token_ids.is_cuda else _token_spans(batch)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        spec = self.cache.spec[layer]
        self.cache.append(layer, self.batch.kv_slots, key, value)
        out = torch.empty(query.shape[0], spec.query_heads, spec.value_dim, dtype=query.dtype, device=query.device)
        chunk = _chunk_size(spec)
        for start in range(0, self.tiled_tokens, chunk):
            end = min(start + chunk, self.tiled_tokens)
            out[start:end] = self._attend_tiled(layer, spec, query, start, end)
        if self.tiled_tokens < self.batch.num_tokens:
            for row in range(self.batch.decode_rows, self.batch.num_rows):
                start, end = int(self.batch.query_starts[row]), int(self.batch.query_starts[row + 1])
                out[start:end] = self._attend_row(layer, spec, query, row, start, end)
        return out

    def _attend_tiled(self, layer: int, spec: LayerKV, query: Tensor, start: int, end: int) -> Tensor:
        """Queries [start, end) by tiles, each with keys of its own: [n, query_heads, value_dim] float32."""
        keys, values = self.cache.flat(layer)
        n, kv_heads = end - start, spec.kv_heads
        group = spec.query_heads // kv_heads
        positions = self.batch.positions[start:end]
        tables = self.tables[self.batch.row_of_token[start:end]]
        q = query[start:end].to(torch.float32).mul(spec.scale).reshape(n * kv_heads, group, spec.head_dim)
        m = torch.full((n, kv_heads, group, 1), _START, dtype=torch.float32, device=query.device)
        total = torch.zeros_like(m)
        acc = torch.zeros(n, kv_heads, group, spec.value_dim, dtype=torch.float32, device=query.device)
        blocks_per_tile = TILE // self.batch.block_size
        in_block = torch.arange(self.batch.block_size, device=query.device)
        in_tile = torch.arange(TILE, device=query.device)
        first, last = self._tile_range(spec, start, end)
        for tile in range(first, last):
            blocks = tables[:, tile * blocks_per_tile : (tile + 1) * blocks_per_tile]
            slots = (blocks[:, :, None] * self.batch.block_size + in_block).flatten()
            kv_positions = in_tile + tile * TILE
            seen = kv_positions <= positions[:, None]
            if spec.window is not None:
                seen &= kv_positions > positions[:, None] - spec.window
            k = keys[slots].to(torch.float32).view(n, TILE, kv_heads, spec.head_dim).transpose(1, 2)
            v = values[slots].to(torch.float32).view(n, TILE, kv_heads, spec.value_dim).transpose(1, 2)
            # Weight 0 does not silence a NaN or inf that a former owner left in a block.
            v = v.masked_fill(~seen[:, None, :, None], 0.0)
            scores = torch.bmm(q, k.reshape(n * kv_heads, TILE, spec.head_dim).transpose(1, 2))
            scores = _softcap(scores, spec.softcap).view(n, kv_heads, group, TILE)
            scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
            m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - m_new)
            correction = torch.exp(m - m_new)
            total = total * correction + weights.sum(-1, keepdim=True)
            added = torch.bmm(weights.reshape(n * kv_heads, group, TILE), v.reshape(n * kv_heads, TILE, spec.value_dim))
            acc = acc * correction + added.view_as(acc)
            m = m_new
        return (acc / total).view(n, spec.query_heads, spec.value_dim)

    def _tile_range(self, spec: LayerKV, start: int, end: int) -> tuple[int, int]:
        """The tiles that some query of [start, end) may see."""
        if self.spans is None:
            return 0, self.tables.shape[1] * self.batch.block_size // TILE
        first, last = self.spans
        low, high = min(first[start:end]), max(last[start:end])
        lowest = 0 if spec.window is None else max(0, low - spec.window + 1)
        return lowest // TILE, high // TILE + 1

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
        k = keys[slots].to(torch.float32).permute(1, 2, 0)
        v = values[slots].to(torch.float32).transpose(0, 1)
        scores = _softcap(torch.matmul(q.permute(1, 2, 0, 3).flatten(1, 2), k), spec.softcap)
        scores = scores.view(spec.kv_heads, group, n, -1)
        query_positions = torch.arange(kv_len - n, kv_len, device=query.device)[:, None]
        hidden = kv_positions > query_positions
        if spec.window is not None:
            hidden |= kv_positions <= query_positions - spec.window
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        out = torch.matmul(weights.flatten(1, 2), v).view(spec.kv_heads, group, n, spec.value_dim)
        return out.permute(2, 0, 1, 3).reshape(n, spec.query_heads, spec.value_dim)


def _softcap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _chunk_size(spec: LayerKV) -> int:
    """Queries per chunk such that one tile's gathered keys stay within the budget."""
    per_query = TILE * spec.kv_heads * max(spec.head_dim, spec.value_dim) * 4
    return max(_CHUNK_MULTIPLE, _GATHER_BUDGET // per_query // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE)


def _whole_tiles(block_tables: Tensor, block_size: int, scratch_block: int) -> Tensor:
    """Block tables [R, W'] int64 whose width is a whole number of tiles."""
    missing = -block_tables.shape[1] % (TILE // block_size)
    return torch.nn.functional.pad(block_tables.to(torch.int64), (0, missing), value=scratch_block)


def _token_spans(batch: Batch) -> tuple[list[int], list[int]]:
    """Each token's position, twice: as the lower and as the upper end of what its chunk must cover."""
    positions: list[int] = []
    for row in range(batch.num_rows):
        n = int(batch.query_starts[row + 1] - batch.query_starts[row])
        kv_len = int(batch.kv_lens_host[row])
        positions.extend(range(kv_len - n, kv_len))
    return positions, positions
