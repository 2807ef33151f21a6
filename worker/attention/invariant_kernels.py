"""Attention over the paged cache in batch-invariant mode, for CUDA: decoding rows and chunks by one kernel.

A program takes one key head, some of the query heads that share it, and either one decoding row's token or a few
consecutive tokens of the chunks. Every query walks its keys in tiles of one length that begin at multiples of it, in
ascending order, with the running maximum, sum and output of online softmax (Milakov & Gimelshein 2018; Dao et al.
2022). Its tile of queries has one shape, too, however many queries are in it.

So a query's bits depend on its own context alone. That other queries of its tile need earlier or later tiles of keys
changes nothing: in those it sees nothing, its maximum stays, so what it has is multiplied by exactly 1, and what is
added is exactly 0. Contexts are not cut among programs.

Imported only where it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..invariant_kernels import aligned

_LOG2_E: float = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Shape:
    """A program's tiles: `queries` (tokens x heads) by `keys`."""

    queries: int
    keys: int
    warps: int
    stages: int


def shape(dim: int, dtype: torch.dtype) -> Shape:
    """For heads of `dim` numbers and queries in `dtype`. Never a matter of the batch."""
    if dtype == torch.float32:
        return Shape(16, 32, warps=4, stages=2)
    return Shape(64, 64, warps=4, stages=3) if dim <= 128 else Shape(64, 32, warps=8, stages=3)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lines: Tensor,
    row_of_token: Tensor,
    positions: Tensor,
    out: Tensor,
    *,
    decode_rows: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Attends for T tokens whose keys and values are in the cache already; writes `out`.

    query [T, query_heads, D]; keys [blocks, block_size, kv_heads, D] and values [blocks, block_size, kv_heads, V] in
    query's dtype or float8_e4m3fn; tables [*, W] int32 block ids, contiguous; lines [R] int32: the line of `tables`
    that is a row's; row_of_token, positions [T] int64, a row's tokens consecutive; out [T, query_heads, V], contiguous,
    in query's dtype. The first `decode_rows` rows have one token each.
    """
    tokens, query_heads, dim = query.shape
    block_size, kv_heads, value_dim = values.shape[1:]
    group = query_heads // kv_heads
    tile = shape(max(dim, value_dim), query.dtype)
    heads = min(tile.queries, triton.next_power_of_2(group))
    parts, per_program = triton.cdiv(group, heads), tile.queries // heads
    programs = decode_rows + triton.cdiv(tokens - decode_rows, per_program)
    if not programs:
        return
    small = keys.dtype == torch.float8_e4m3fn
    _attend[(programs, kv_heads * parts)](
        aligned(query), keys, values, tables, lines, row_of_token, positions, out,
        tables.shape[1], tokens, decode_rows, scale * (_LOG2_E if softcap is None else 1.0), window or 0,
        1.0 if softcap is None else float(softcap),
        KV_HEADS=kv_heads, GROUP=group, HEADS=heads, PARTS=parts, QUERIES=tile.queries, DIM=dim, VALUE_DIM=value_dim,
        WIDTH=max(16, triton.next_power_of_2(dim)), VALUE_WIDTH=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_SIZE=block_size, TILE=tile.keys, WINDOW=window is not None,
        SOFTCAP=softcap is not None, HALF=small and query.dtype != torch.float32,
        SINGLE=query.dtype == torch.float32, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["width", "tokens", "decode_rows", "window"],
    do_not_specialize_on_alignment=["tables", "lines", "row_of_token", "positions"],
)
def _attend(
    query, keys, values, tables, lines, row_of_token, positions, out,
    width, tokens, decode_rows, scale, window, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HALF: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = tl.program_id(1) // PARTS
    chunk = decode_rows + (program - decode_rows) * (QUERIES // HEADS)
    first = tl.where(program < decode_rows, program, chunk)
    last = tl.where(program < decode_rows, program, tl.minimum(chunk + QUERIES // HEADS, tokens) - 1)
    q = tl.arange(0, QUERIES)
    g = tl.program_id(1) % PARTS * HEADS + q % HEADS
    d = tl.arange(0, WIDTH)
    e = tl.arange(0, VALUE_WIDTH)
    t = tl.arange(0, TILE)
    token = first + q // HEADS
    present = (token <= last) & (g < GROUP)
    line_of_query = (token.to(tl.int64) * KV_HEADS + head) * GROUP + g
    loaded = tl.load(query + line_of_query[:, None] * DIM + d[None, :], present[:, None] & (d < DIM)[None, :], 0.0)
    if HALF:  # what float8 converts to in hardware, without loss
        loaded = loaded.to(tl.float16)
    own_row = tl.load(row_of_token + token, present, -1)
    position = tl.load(positions + token, present, 0).to(tl.int32)
    # Tokens of several rows may share a program: it computes for one row after the other, from the beginning.
    first_row = tl.load(row_of_token + first).to(tl.int32)
    last_row = tl.load(row_of_token + last).to(tl.int32)
    for row in tl.range(first_row, last_row + 1):
        own = present & (own_row == row)
        highest = tl.max(tl.where(own, position, 0))
        begin = 0
        if WINDOW:
            lowest = tl.min(tl.where(own, position, 2147483647)) - window + 1
            begin = tl.maximum(lowest, 0) // TILE * TILE
        table = tables + tl.load(lines + row).to(tl.int64) * width
        most = tl.full((QUERIES,), -1e30, tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, VALUE_WIDTH), tl.float32)
        for start in range(begin, highest + 1, TILE):
            at = start + t
            inside = at <= highest
            block = tl.load(table + at // BLOCK_SIZE, inside, 0)
            slot = (block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE) * KV_HEADS + head
            k = tl.load(keys + slot[:, None] * DIM + d[None, :], inside[:, None] & (d < DIM)[None, :], 0.0)
            v = tl.load(
                values + slot[:, None] * VALUE_DIM + e[None, :], inside[:, None] & (e < VALUE_DIM)[None, :], 0.0
            )
            if HALF:
                k = k.to(tl.float16)
                v = v.to(tl.float16)
            if SINGLE:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            scores = tl.dot(loaded, tl.trans(k), input_precision="ieee") * scale
            if SOFTCAP:  # tanh(x) = 1 - 2 / (e ** 2x + 1)
                scores = (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0)) * softcap * 1.4426950408889634
            seen = at[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(most - higher)
            total = total * fade + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            most = higher
        total = tl.where(own, total, 1.0)
        tl.store(
            out + line_of_query[:, None] * VALUE_DIM + e[None, :],
            (acc / total[:, None]).to(out.dtype.element_ty),
            own[:, None] & (e < VALUE_DIM)[None, :],
        )
