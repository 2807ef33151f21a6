"""Triton kernels of the step path, for CUDA: each does in one launch what would take torch a handful.

Imported only where they run; Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS: int = 8
"""Heads that one program of `rotate_append` takes."""
_PAGES: int = 256
"""Block ids that one program of `open_decode` copies at a time."""


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
    )  # fmt: skip
    return out


@triton.jit
def _rotate_append(
    query, key, value, cos, sin, slots, out, keys, values,
    query_token, query_head, key_token, key_head, value_token, value_head,
    cos_token, sin_token, query_heads, kv_heads, query_programs,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
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
        target = out + (token * query_heads + head[:, None]) * (2 * HALF) + lane[None, :]
    else:
        head = (part - query_programs) * HEADS + tl.arange(0, HEADS)
        mask = (head < kv_heads)[:, None] & inside[None, :]
        source = key + token * key_token + head[:, None] * key_head + lane[None, :]
        slot = tl.load(slots + token)
        at = (slot * kv_heads + head[:, None]) * (2 * HALF) + lane[None, :]
        target = keys + at
        from_value = value + token * value_token + head[:, None] * value_head + lane[None, :]
        tl.store(values + at, tl.load(from_value, mask), mask)
        tl.store(values + at + HALF, tl.load(from_value + HALF, mask), mask)
    low = tl.load(source, mask, 0.0).to(tl.float32)
    high = tl.load(source + HALF, mask, 0.0).to(tl.float32)
    tl.store(target, low * cos_low - high * sin_low, mask)
    tl.store(target + HALF, high * cos_high + low * sin_high, mask)


def open_decode(
    *,
    row_slot: Tensor,
    grow_column: Tensor,
    grow_block: Tensor,
    page_starts: Tensor,
    block_table: Tensor,
    length: Tensor,
    last_token: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    kv_lens: Tensor,
    page_indices: Tensor,
    block_size: int,
) -> None:
    """Opens a step of R decoding rows: applies their new blocks, advances their lengths, and lays out the batch.

    Read: row_slot, grow_column (-1: no new block), grow_block, page_starts [R] int32; block_table [slots + 1, W] int32;
    last_token [slots + 1] int64. The last slot is the padding's: its length stays 0. Updated: block_table, length
    [slots + 1] int32. Written: token_ids, positions, kv_slots [R] int64, kv_lens [R] int32, and page_indices, where row
    r's block ids begin at page_starts[r].
    """
    _open_decode[(row_slot.shape[0],)](
        row_slot, grow_column, grow_block, page_starts, block_table, length, last_token,
        token_ids, positions, kv_slots, kv_lens, page_indices,
        block_table.shape[1], block_table.shape[0] - 1, BLOCK_SIZE=block_size, PAGES=_PAGES, num_warps=1,
    )  # fmt: skip


@triton.jit
def _open_decode(
    row_slot, grow_column, grow_block, page_starts, block_table, length, last_token,
    token_ids, positions, kv_slots, kv_lens, page_indices,
    width, padding, BLOCK_SIZE: tl.constexpr, PAGES: tl.constexpr,
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
    pages = computed // BLOCK_SIZE + 1
    start = tl.load(page_starts + row)
    first = 0
    while first < pages:
        column = first + tl.arange(0, PAGES)
        blocks = tl.load(table + column, column < pages, 0)
        tl.store(page_indices + start + column, tl.where(column == grown, block, blocks), column < pages)
        first += PAGES
