"""Triton kernels of the step path, for CUDA: each does in one launch what would take torch a handful. Products are in
product_kernels.py.

How they overlap is told in overlap.py. Imported only where they run; Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .overlap import overlap_options

_HEADS: int = 8
"""Heads that one program of `rotate_append` takes."""


def rotate_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Rotary embedding (Su et al. 2021, in the halves layout of GPT-NeoX) of query and key, and the key and value
    written into the cache.

    query [T, query_heads, D], key and value [T, kv_heads, D], any strides but 1 in the last dimension; cos, sin [T, D];
    slots [T] int64: where each token lies in the flat caches keys and values [slots, kv_heads, D], contiguous. Returns
    the rotated query, contiguous. Computes in float32, rounds once.
    """
    tokens, query_heads, dim = query.shape
    kv_heads = key.shape[1]
    out = torch.empty((tokens, query_heads, dim), dtype=query.dtype, device=query.device)
    query_programs = triton.cdiv(query_heads, _HEADS)
    grid = (tokens, query_programs + triton.cdiv(kv_heads, _HEADS))
    _rotate_append[grid](
        query, key, value, cos, sin, slots, out, keys, values,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        cos.stride(0), sin.stride(0), query_heads, kv_heads, query_programs,
        HALF=dim // 2, WIDTH=triton.next_power_of_2(dim // 2), HEADS=_HEADS, num_warps=4,
        **overlap_options(query.device),
    )  # fmt: skip
    return out


@triton.jit
def _rotate_append(
    query, key, value, cos, sin, slots, out, keys, values,
    query_token, query_head, key_token, key_head, value_token, value_head,
    cos_token, sin_token, query_heads, kv_heads, query_programs,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    inside = lane < HALF
    cos_low = tl.load(cos + token * cos_token + lane, inside, 0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + token * cos_token + HALF + lane, inside, 0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + token * sin_token + lane, inside, 0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + token * sin_token + HALF + lane, inside, 0.0).to(tl.float32)[None, :]
    if part < query_programs:
        head = part * HEADS + tl.arange(0, HEADS)
        mask = (head < query_heads)[:, None] & inside[None, :]
        source = query + token * query_token + head[:, None] * query_head + lane[None, :]
        low = tl.load(source, mask, 0.0).to(tl.float32)
        high = tl.load(source + HALF, mask, 0.0).to(tl.float32)
        target = out + (token * query_heads + head[:, None]) * (2 * HALF) + lane[None, :]
        tl.store(target, (low * cos_low - high * sin_low).to(out.dtype.element_ty), mask)
        tl.store(target + HALF, (high * cos_high + low * sin_high).to(out.dtype.element_ty), mask)
    else:
        head = (part - query_programs) * HEADS + tl.arange(0, HEADS)
        mask = (head < kv_heads)[:, None] & inside[None, :]
        source = key + token * key_token + head[:, None] * key_head + lane[None, :]
        low = tl.load(source, mask, 0.0).to(tl.float32)
        high = tl.load(source + HALF, mask, 0.0).to(tl.float32)
        slot = tl.load(slots + token)
        at = (slot * kv_heads + head[:, None]) * (2 * HALF) + lane[None, :]
        # Rounded as in a cache of 16 bits first, so that a smaller one holds what that one would be quantised to.
        low_key = (low * cos_low - high * sin_low).to(key.dtype.element_ty).to(tl.float32)
        high_key = (high * cos_high + low * sin_high).to(key.dtype.element_ty).to(tl.float32)
        tl.store(keys + at, low_key.to(keys.dtype.element_ty), mask)
        tl.store(keys + at + HALF, high_key.to(keys.dtype.element_ty), mask)
        from_value = value + token * value_token + head[:, None] * value_head + lane[None, :]
        low_value = tl.load(from_value, mask, 0.0).to(tl.float32)
        high_value = tl.load(from_value + HALF, mask, 0.0).to(tl.float32)
        tl.store(values + at, low_value.to(values.dtype.element_ty), mask)
        tl.store(values + at + HALF, high_value.to(values.dtype.element_ty), mask)


def open_decode(
    *,
    row_slot: Tensor,
    grow_column: Tensor,
    grow_block: Tensor,
    block_table: Tensor,
    length: Tensor,
    last_token: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    kv_lens: Tensor,
    block_size: int,
) -> None:
    """Opens a step of R decoding rows: applies their new blocks, advances their lengths, and lays out the batch.

    Read: row_slot, grow_column (-1: no new block), grow_block [R] int32; block_table [slots + 1, W] int32; last_token
    [slots + 1] int64. The last slot is the padding's: its length stays 0. Updated: block_table, length [slots + 1]
    int32. Written: token_ids, positions, kv_slots [R] int64, kv_lens [R] int32.
    """
    _open_decode[(row_slot.shape[0],)](
        row_slot, grow_column, grow_block, block_table, length, last_token,
        token_ids, positions, kv_slots, kv_lens,
        block_table.shape[1], block_table.shape[0] - 1, BLOCK_SIZE=block_size, num_warps=1,
    )  # fmt: skip


@triton.jit
def _open_decode(
    row_slot, grow_column, grow_block, block_table, length, last_token,
    token_ids, positions, kv_slots, kv_lens,
    width, padding, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(row_slot + row).to(tl.int64)
    computed = tl.load(length + slot)
    grown = tl.load(grow_column + row)
    block = tl.load(grow_block + row)
    table = block_table + slot * width
    if grown >= 0:
        tl.store(table + grown, block)
    tl.store(length + slot, tl.where(slot == padding, 0, computed + 1))
    # What this program has just stored is taken from its register: a load need not see it.
    current = tl.load(table + computed // BLOCK_SIZE)
    current = tl.where(grown == computed // BLOCK_SIZE, block, current)
    tl.store(token_ids + row, tl.load(last_token + slot))
    tl.store(positions + row, computed.to(tl.int64))
    tl.store(kv_slots + row, current.to(tl.int64) * BLOCK_SIZE + computed % BLOCK_SIZE)
    tl.store(kv_lens + row, computed + 1)


def add_norm(left: Tensor, right: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of left and right [T, H], rounded, and that sum's RMSNorm (Zhang & Sennrich 2019) times weight [H].

    As transformers' RMSNorm computes it: in float32, rounded to the input's dtype before the weight is multiplied.
    Contiguous rows.
    """
    rows, width = left.shape
    total, out = torch.empty_like(left), torch.empty_like(left)
    _add_norm[(rows,)](
        left, right, weight, total, out, out, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width), QUANTIZE=False,
        num_warps=8, **overlap_options(left.device),
    )  # fmt: skip
    return total, out


@triton.jit
def _add_norm(
    left, right, weight, total, out, scales, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(weight + column, inside, 0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    at = row * WIDTH + column
    added = tl.load(left + at, inside, 0.0).to(tl.float32) + tl.load(right + at, inside, 0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + at, rounded, inside)
    values = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values) / WIDTH + eps)
    normed = (values * inverse).to(total.dtype.element_ty)
    weighted = (normed.to(tl.float32) * scale.to(tl.float32)).to(total.dtype.element_ty)
    if QUANTIZE:
        wide = weighted.to(tl.float32)
        of_row = tl.maximum(tl.max(tl.abs(wide)), 1e-12) / 448.0
        tl.store(out + at, (wide / of_row).to(out.dtype.element_ty), inside)
        tl.store(scales + row, of_row)
    else:
        tl.store(out + at, weighted, inside)


def add_norm_quantize(left: Tensor, right: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm`, whose second result is quantised: the sum, float8 e4m3 rows, the scale of each row [T] float32."""
    rows, width = left.shape
    total = torch.empty_like(left)
    out = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=left.device)
    scales = torch.empty(rows, dtype=torch.float32, device=left.device)
    _add_norm[(rows,)](
        left, right, weight, total, out, scales, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width), QUANTIZE=True,
        num_warps=8, **overlap_options(left.device),
    )  # fmt: skip
    return total, out, scales


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [T, K], contiguous, as float8 e4m3, and the scale of each row [T] float32."""
    count, width = rows.shape
    out = torch.empty((count, width), dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(count, dtype=torch.float32, device=rows.device)
    _quantize_rows[(count,)](
        rows, out, scales, WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=8, **overlap_options(rows.device)
    )
    return out, scales


@triton.jit
def _quantize_rows(rows, out, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(rows + row * WIDTH + column, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values)), 1e-12) / 448.0
    tl.store(out + row * WIDTH + column, (values / scale).to(out.dtype.element_ty), inside)
    tl.store(scales + row, scale)


def silu_mul(halves: Tensor) -> Tensor:
    """silu(gate) * up for [T, 2 N] that holds gate and up side by side: [T, N]."""
    count, width = halves.shape[0], halves.shape[1] // 2
    out = torch.empty((count, width), dtype=halves.dtype, device=halves.device)
    _silu_mul[(count, triton.cdiv(width, 1024))](halves, out, width, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _silu_mul(halves, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(halves + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(halves + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (activated * up).to(out.dtype.element_ty), inside)
