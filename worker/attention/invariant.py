"""Paged attention on CUDA in batch-invariant mode; see invariant_kernels.py."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache
from .base import AttentionBackend, AttentionStep


class InvariantAttention(AttentionBackend):
    """Needs nothing from the host but the number of decoding rows: a step of decoding rows can be captured."""

    name: ClassVar[str] = "invariant"

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def begin(self, batch: Batch) -> InvariantStep:
        return InvariantStep(self.cache, batch)


class InvariantStep(AttentionStep):
    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self.cache = cache
        self.kv_slots = batch.kv_slots
        self._batch = batch
        lines = batch.lines
        if lines is None:  # so that steps in graphs, which need lines, and others run the same code
            lines = torch.arange(batch.num_rows, dtype=torch.int32, device=batch.kv_lens.device)
        self._lines = lines

    def attend_cached(self, layer: int, query: Tensor, out: Tensor | None = None) -> Tensor:
        from .invariant_kernels import attend

        spec, batch = self.cache.spec[layer], self._batch
        if out is None:
            out = torch.empty(query.shape[0], spec.query_heads, spec.value_dim, dtype=query.dtype, device=query.device)
        attend(
            query, self.cache.keys[layer], self.cache.values[layer], batch.block_tables, self._lines,
            batch.row_of_token, batch.positions, out,
            decode_rows=batch.decode_rows, scale=spec.scale, window=spec.window, softcap=spec.softcap,
        )  # fmt: skip
        return out
