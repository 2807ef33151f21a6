"""Attention of single queries over the paged cache, for CUDA: what decoding rows take.

A program takes one piece of one row's context and one key head, with all the query heads that share it, or, with even
spans, a few pieces that follow each other. Contexts are cut so that the programs keep every multiprocessor busy
(sharing.py, spans.py); the last piece of a row to end merges the row's pieces, in their order. Within a piece, keys are
walked in tiles with the running maximum, sum and output of online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).

Imported only where it runs. How kernels overlap is told in worker/overlap.py.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..overlap import overlap_options
from .sharing import PIECE_COLUMNS, TILE
from .spans import SpanKind, even_spans

_LOG2_E: float = 1.4426950408889634
_QUERIES: int = 16
"""Rows of the smallest product that tensor cores take."""


class Scratch:
    """Where the pieces of rows wait for each other: of one kernel at a time, on one stream."""

    def __init__(self, pieces: int, rows: int, kv_heads: int, width: int, device: torch.device) -> None:
        """For up to `pieces` pieces of `rows` rows of at most `kv_heads` key heads; `width`: query heads x head_dim."""
        self._pieces, self._rows = pieces, rows
        self.sums = torch.empty(pieces * 2 * width, dtype=torch.float32, device=device)
        self.outputs = torch.empty(pieces * width, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(rows * kv_heads, dtype=torch.int32, device=device)

    def suffices(self, pieces: int, rows: int) -> bool:
        return pieces <= self._pieces and rows <= self._rows


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lines: Tensor | None,
    lengths: Tensor,
    pieces: Tensor | None,
    out: Tensor,
    scratch: Scratch | None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    warps: int = 4,
    stages: int = 3,
    spans: Tensor | None = None,
) -> Any:
    """Attends for R rows with one query each, which stands at the end of its context; writes `out`.

    query, out [R, query_heads, D], contiguous, 16 bits; keys, values [blocks, block_size, kv_heads, D], 16 bits or
    float8_e4m3fn; tables [*, W] int32 block ids, contiguous; lines [R] int32: the line of `tables` that is a row's, or
    None: the row's own number; lengths [R] int32. pieces [PIECE_COLUMNS, P] int32 as `share_out` makes them, with
    `scratch` for as many; None: each row in one piece. A program whose window leaves nothing of its piece computes
    nothing.

    spans [S + 1] int32: pieces are cut by `even_spans`, for this `window`, and program s of each key head takes those
    from spans[s] to spans[s + 1]; None: each piece has a program. Returns the compiled kernel (None in Triton's
    interpreter).
    """
    rows, query_heads, dim = query.shape
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    group = query_heads // kv_heads
    if spans is not None:
        programs = spans.shape[0] - 1
    else:
        programs = rows if pieces is None else pieces.shape[1]
    return _attend[(kv_heads, programs)](
        query, keys, values, tables, lines if lines is not None else tables, lengths,
        pieces if pieces is not None else tables, out,
        out if scratch is None else scratch.sums,
        out if scratch is None else scratch.outputs,
        out if scratch is None else scratch.arrived,
        tables.shape[1], 0 if pieces is None else pieces.shape[1], scale * (1.0 if softcap else _LOG2_E),
        window or 0, softcap or 0.0, spans,
        KV_HEADS=kv_heads, GROUP=group, QUERIES=max(_QUERIES, triton.next_power_of_2(group)),
        DIM=dim, WIDTH=triton.next_power_of_2(dim), BLOCK_SIZE=block_size, TILE=TILE, LINES=lines is not None,
        PIECES=pieces is not None, WINDOW=window is not None, SOFTCAP=softcap is not None,
        HALF=keys.dtype == torch.float8_e4m3fn, EVEN=spans is not None, num_warps=warps, num_stages=stages,
        **overlap_options(query.device),
    )  # fmt: skip


def programs_at_once(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    warps: int,
    stages: int,
) -> int:
    """How many programs of `attend` with spans a multiprocessor runs at once, for one row's query [1, query_heads, D]
    and the cache of such layers, of which the first token is read. Compiles and runs the kernel that they take; waits.

    Raises RuntimeError if the CUDA driver does not tell."""
    kv_heads, device = keys.shape[2], query.device
    kind = SpanKind(1, window)
    pieces, spans = np.empty((PIECE_COLUMNS, kind.pieces(1)), np.int32), np.empty(kind.spans + 1, np.int32)
    even_spans(np.ones(1, np.int32), kind, pieces, spans)
    zero, one = (torch.full((1,), value, dtype=torch.int32, device=device) for value in (0, 1))
    kernel = attend(
        query, keys, values, zero[None], zero, one, torch.from_numpy(pieces).to(device), torch.empty_like(query),
        Scratch(kind.pieces(1), 1, kv_heads, query[0].numel(), device),
        scale=scale, window=window, softcap=softcap, warps=warps, stages=stages,
        spans=torch.from_numpy(spans).to(device),
    )  # fmt: skip
    torch.cuda.synchronize(device)
    found = ctypes.c_int()
    failed = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(found), ctypes.c_void_p(kernel.function), 32 * warps, ctypes.c_size_t(kernel.metadata.shared)
    )
    if failed or found.value < 1:
        raise RuntimeError(
            f"the CUDA driver did not tell how many programs of the decode kernel run at once: error {failed}, "
            f"{found.value} programs"
        )
    return found.value


@triton.jit(  # or some step would wait for a compiler
    do_not_specialize=["width", "num_pieces", "window"], do_not_specialize_on_alignment=["pieces", "spans"]
)
def _attend(
    query, keys, values, tables, lines, lengths, pieces, out, sums, outputs, arrived,
    width, num_pieces, scale, window, softcap, spans,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, LINES: tl.constexpr, PIECES: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    piece = tl.program_id(1)
    if OVERLAP:
        gdc_wait()
    if EVEN:
        begin = tl.load(spans + piece)
        stop = tl.load(spans + piece + 1)
        for one in range(begin, stop):
            _attend_piece(
                query, keys, values, tables, lines, lengths, pieces, out, sums, outputs, arrived,
                head, one, one + 1 == stop, width, num_pieces, scale, window, softcap,
                KV_HEADS, GROUP, QUERIES, DIM, WIDTH, BLOCK_SIZE, TILE, LINES, PIECES, WINDOW, SOFTCAP, HALF, OVERLAP,
            )  # fmt: skip
    else:
        _attend_piece(
            query, keys, values, tables, lines, lengths, pieces, out, sums, outputs, arrived,
            head, piece, True, width, num_pieces, scale, window, softcap,
            KV_HEADS, GROUP, QUERIES, DIM, WIDTH, BLOCK_SIZE, TILE, LINES, PIECES, WINDOW, SOFTCAP, HALF, OVERLAP,
        )  # fmt: skip


@triton.jit
def _bounds(lengths, pieces, piece, num_pieces, PIECES: tl.constexpr):
    """Row of a piece (-1: there is none), its first token and its end."""
    if PIECES:
        row = tl.load(pieces + piece)
        first = tl.load(pieces + num_pieces + piece)
        end = tl.load(pieces + 2 * num_pieces + piece)
    else:
        row = piece
        first = 0
        end = tl.load(lengths + row)
    return row, first, end


@triton.jit
def _attend_piece(
    query, keys, values, tables, lines, lengths, pieces, out, sums, outputs, arrived,
    head, piece, last, width, num_pieces, scale, window, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, LINES: tl.constexpr, PIECES: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One piece, one key head. `last`: of its program, which then lets the next kernel in behind its main loop."""
    row, first, end = _bounds(lengths, pieces, piece, num_pieces, PIECES)
    part = 0
    parts = 1
    if PIECES:
        part = tl.load(pieces + 3 * num_pieces + piece)
        parts = tl.load(pieces + 4 * num_pieces + piece)
    if row >= 0:
        length = tl.load(lengths + row)
        line = row
        if LINES:
            line = tl.load(lines + row)
        table = tables + line.to(tl.int64) * width
        g = tl.arange(0, QUERIES)
        d = tl.arange(0, WIDTH)
        t = tl.arange(0, TILE)
        in_row = (g < GROUP)[:, None] & (d < DIM)[None, :]
        at_query = (row.to(tl.int64) * KV_HEADS + head) * (GROUP * DIM) + g[:, None] * DIM + d[None, :]
        q = tl.load(query + at_query, in_row, 0.0)
        if HALF:  # what float8 converts to in hardware, without loss
            q = q.to(tl.float16)
        most = tl.full((QUERIES,), -1e30, tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, WIDTH), tl.float32)
        lowest = 0
        if WINDOW:
            lowest = tl.maximum(length - window, 0)
            first = tl.maximum(first, lowest // TILE * TILE)
        for start in range(first, end, TILE):
            at = start + t
            inside = at < end
            block = tl.load(table + at // BLOCK_SIZE, inside, 0)
            slot = (block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE) * (KV_HEADS * DIM) + head * DIM
            loaded = inside[:, None] & (d < DIM)[None, :]
            k = tl.load(keys + slot[:, None] + d[None, :], loaded, 0.0)
            v = tl.load(values + slot[:, None] + d[None, :], loaded, 0.0)
            if HALF:
                k = k.to(tl.float16)
                v = v.to(tl.float16)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if SOFTCAP:  # tanh(x) = 1 - 2 / (e ** 2x + 1)
                bent = 1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0)
                scores = bent * softcap * 1.4426950408889634
            seen = inside
            if WINDOW:
                seen = inside & (at >= lowest)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(most - higher)
            total = total * fade + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            most = higher
        if OVERLAP and last:
            gdc_launch_dependents()
        if parts == 1:
            tl.store(out + at_query, (acc / total[:, None]).to(out.dtype.element_ty), in_row)
        else:
            own = (piece * KV_HEADS + head).to(tl.int64)
            tl.store(sums + own * (2 * GROUP) + g, most, g < GROUP)
            tl.store(sums + own * (2 * GROUP) + GROUP + g, total, g < GROUP)
            tl.store(outputs + own * (GROUP * DIM) + g[:, None] * DIM + d[None, :], acc, in_row)
            tl.debug_barrier()
            counter = arrived + row * KV_HEADS + head
            before = tl.atomic_add(counter, 1, sem="acq_rel")
            if before == parts - 1:
                most = tl.full((QUERIES,), -1e30, tl.float32)
                total = tl.zeros((QUERIES,), tl.float32)
                acc = tl.zeros((QUERIES, WIDTH), tl.float32)
                for other in range(parts):
                    its = ((piece - part + other) * KV_HEADS + head).to(tl.int64)
                    of_it = tl.load(sums + its * (2 * GROUP) + g, g < GROUP, 0.0, cache_modifier=".cg")
                    sum_of_it = tl.load(sums + its * (2 * GROUP) + GROUP + g, g < GROUP, 0.0, cache_modifier=".cg")
                    acc_of_it = tl.load(
                        outputs + its * (GROUP * DIM) + g[:, None] * DIM + d[None, :], in_row, 0.0, cache_modifier=".cg"
                    )
                    higher = tl.maximum(most, of_it)
                    fade = tl.exp2(most - higher)
                    share = tl.exp2(of_it - higher)
                    total = total * fade + sum_of_it * share
                    acc = acc * fade[:, None] + acc_of_it * share[:, None]
                    most = higher
                tl.store(out + at_query, (acc / total[:, None]).to(out.dtype.element_ty), in_row)
                tl.store(counter, 0)
