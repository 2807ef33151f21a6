"""Sequences in a paged cache, and attention over them by batch-invariant mode's kernel, in any chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tandem.worker.inspection import dense_attention
from tandem.worker.kv_cache import LayerKV

BLOCK_SIZE = 16


class Cached:
    """Sequences of these lengths, random, over blocks that lie anywhere."""

    def __init__(
        self,
        lengths: Sequence[int],
        query_heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        small: bool,
        device: torch.device,
        value_dim: int | None = None,
    ) -> None:
        """`small`: the cache is in 8 bits. `value_dim`: of values, if another than that of keys."""
        self.lengths = tuple(lengths)
        blocks = len(lengths) * -(-max(lengths) // BLOCK_SIZE)
        self.tables = torch.randperm(blocks, device=device).to(torch.int32).view(len(lengths), -1)
        self.keys, self.values = (
            torch.randn(blocks, BLOCK_SIZE, kv_heads, width, device=device)
            .to(dtype)
            .to(torch.float8_e4m3fn if small else dtype)
            for width in (dim, value_dim or dim)
        )
        self.queries = [torch.randn(length, query_heads, dim, device=device).to(dtype) for length in lengths]

    def attend(self, spans: Sequence[tuple[int, int, int]], decode_rows: int, **options: Any) -> Tensor:
        """Queries [start, end) of each (row, start, end) in one batch, of which the first `decode_rows` are single."""
        from tandem.worker.attention.invariant_kernels import attend

        device = self.tables.device
        query = torch.cat([self.queries[row][start:end] for row, start, end in spans])
        lengths = torch.tensor([end - start for _, start, end in spans], device=device)
        out = query.new_full((*query.shape[:2], self.values.shape[3]), float("nan"))
        attend(
            query,
            self.keys,
            self.values,
            self.tables,
            torch.tensor([row for row, _, _ in spans], dtype=torch.int32, device=device),
            torch.repeat_interleave(torch.arange(len(spans), device=device), lengths),
            torch.cat([torch.arange(start, end, device=device) for _, start, end in spans]),
            out,
            decode_rows=decode_rows,
            **options,
        )
        return out


def dense(cached: Cached, row: int, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """What all queries of a row get, in float32: [length, query_heads, dim]."""
    length, query = cached.lengths[row], cached.queries[row].float()
    blocks = cached.tables[row].long()
    key, value = (kept[blocks].flatten(0, 1)[:length].float() for kept in (cached.keys, cached.values))
    (_, query_heads, dim), (_, kv_heads, value_dim) = query.shape, value.shape
    return dense_attention(LayerKV(0, query_heads, kv_heads, dim, value_dim, window, scale, softcap), query, key, value)
