"""Decoding rows over a paged cache: attention over them in float64, and by the decode kernel in all its ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tandem.worker.attention.flashinfer import DecodeWay
from tandem.worker.attention.sharing import PIECE_COLUMNS, share_out
from tandem.worker.attention.spans import SpanKind, even_spans

BLOCK_SIZE = 16
WAYS = {
    "equal": DecodeWay(programs=2, stages=3),
    "even": DecodeWay(),
    "even, three stages": DecodeWay(stages=3),
}
Shape: TypeAlias = tuple[int, int, int, int | None, float | None]
"""Query heads, key heads, dimension, window, soft cap."""
SHAPES: dict[str, Shape] = {
    "128": (32, 8, 128, None, None),
    "64, window": (28, 4, 64, 100, None),
    "256, window, soft cap": (8, 8, 256, 65, 30.0),
    "96, soft cap": (40, 2, 96, None, 5.0),
}


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One query [heads, D] over key and value [T, kv_heads, D]: [heads, D] float64."""
    group = query.shape[0] // key.shape[1]
    if window is not None:
        key, value = key[-window:], value[-window:]
    keys = key.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.einsum("ht,thd->hd", scores.softmax(-1), value.double().repeat_interleave(group, dim=1))


@dataclass(slots=True)
class DecodeCase:
    """Random numbers; a row's line of the block tables is some other line than its own."""

    lengths: Sequence[int]
    query: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    lines: Tensor
    kv_lens: Tensor
    window: int | None
    softcap: float | None
    scratch: Any

    @property
    def scale(self) -> float:
        return float(self.query.shape[2] ** -0.5)

    def blocks(self, row: int) -> Tensor:
        """[W] int64"""
        return self.tables[self.lines[row].long()].long()

    def expected(self) -> Tensor:
        """[R, query_heads, D] float64"""
        rows = []
        for row, length in enumerate(self.lengths):
            # float8 cannot be indexed on every device, but read it can be.
            key, value = (cache.float()[self.blocks(row)].flatten(0, 1)[:length] for cache in (self.keys, self.values))
            rows.append(exact(self.query[row], key, value, self.scale, self.window, self.softcap))
        return torch.stack(rows)

    def attended(self, way: DecodeWay, cut: int | None, *, own_lines: bool = False) -> Tensor:
        """By the kernel, contexts cut for `cut` spans, or into so many pieces; None: not cut."""
        from tandem.worker.attention import kernels

        pieces, spans = (None, None) if cut is None else self._cut(way, cut)
        out = torch.full_like(self.query, float("nan"))
        kernels.attend(
            self.query,
            self.keys,
            self.values,
            self.tables[self.lines.long()].contiguous() if own_lines else self.tables,
            None if own_lines else self.lines,
            self.kv_lens,
            pieces,
            out,
            None if cut is None else self.scratch,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            warps=way.warps,
            stages=way.stages,
            spans=spans,
        )
        return out

    def _cut(self, way: DecodeWay, cut: int) -> tuple[Tensor, Tensor | None]:
        lengths, device = np.array(self.lengths, np.int32), self.query.device
        if not way.even:
            return torch.from_numpy(share_out(lengths, cut, np.empty((PIECE_COLUMNS, cut), np.int32))).to(device), None
        kind = SpanKind(cut, self.window)
        pieces = np.empty((PIECE_COLUMNS, kind.pieces(len(lengths))), np.int32)
        spans = np.empty(kind.spans + 1, np.int32)
        even_spans(lengths, kind, pieces, spans)
        return torch.from_numpy(pieces).to(device), torch.from_numpy(spans).to(device)


def make_case(
    lengths: Sequence[int],
    shape: Shape,
    cache_dtype: torch.dtype,
    device: torch.device,
    most: int,
    dtype: torch.dtype = torch.bfloat16,
) -> DecodeCase:
    """`most`: pieces, or spans, that contexts may be cut for. `dtype`: the queries'."""
    from tandem.worker.attention.kernels import Scratch

    query_heads, kv_heads, dim, window, softcap = shape
    torch.manual_seed(1)
    rows, lines, width = len(lengths), len(lengths) + 3, -(-max(lengths) // BLOCK_SIZE)
    keys, values = (
        torch.randn(lines * width, BLOCK_SIZE, kv_heads, dim, device=device).to(dtype).to(cache_dtype) for _ in range(2)
    )
    return DecodeCase(
        lengths=lengths,
        query=torch.randn(rows, query_heads, dim, device=device).to(dtype),
        keys=keys,
        values=values,
        tables=torch.randperm(lines * width, device=device).to(torch.int32).view(lines, width),
        lines=torch.randperm(lines, device=device)[:rows].to(torch.int32),
        kv_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        window=window,
        softcap=softcap,
        scratch=Scratch(rows + most, rows, kv_heads, query_heads * dim, device),
    )


def worst_error(found: Tensor, expected: Tensor) -> float:
    """Of all rows, relative."""
    return float(((found.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())
