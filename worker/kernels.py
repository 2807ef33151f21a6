"""Triton kernels of the step path, for CUDA: each does in one launch what would take torch a handful.

How they overlap is told in overlap.py. Imported only where they run; Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .overlap import overlap_options

MOST_ROWS: int = 32
"""Rows up to which `product` and `gated_product` were found faster than cuBLAS."""
MOST_SCALED_ROWS: int = 64
"""Rows up to which the products in 8 bits were found faster than torch's."""
_TILE: int = 64
_GATED_DEPTH: int = 64
_DEPTH: int = 128
_AHEAD: int = 2
"""Lines of 128 bytes of each of its weights' rows that a program asks for before its input is there."""
_LEAST_FILL: float = 0.9
"""Share of the multiprocessors that the programs of `product` must keep busy in their last wave: below, cuBLAS wins."""
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


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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


def takes_product(rows: Tensor, weight: Tensor) -> bool:
    """`product` can compute rows @ weight.T, and was found to do so faster than cuBLAS."""
    (count, depth), width = rows.shape, weight.shape[0]
    if count > MOST_ROWS or width % _TILE or not rows.is_contiguous():
        return False
    splits = _splits(width, depth, rows.device)
    return splits > 0


@cache
def _splits(width: int, depth: int, device: torch.device) -> int:
    """Into how many parts to divide the sum over `depth` so that the programs fill the device evenly; 0: none does."""
    multiprocessors = _multiprocessors(device)
    for splits in (1, 2, 4, 8):
        programs = width // _TILE * splits
        waves = -(-programs // multiprocessors)
        if depth % (splits * _DEPTH) == 0 and programs >= _LEAST_FILL * waves * multiprocessors and waves <= 2:
            return splits
    return 0


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [T, K] @ weight [N, K].T: [T, N], for a handful of rows; see `takes_product`.

    Reads the weights at the pace of memory. Parts of a sum are added up in a fixed order, by the last to end.
    """
    (count, depth), width = rows.shape, weight.shape[0]
    device = rows.device
    splits = _splits(width, depth, device)
    tiles, tall = width // _TILE, _padded(count)
    out = torch.empty((count, width), dtype=rows.dtype, device=device)
    parts, arrived = _scratch(device, splits * tiles * _TILE * tall, tiles)
    _product[(tiles, splits)](
        rows, weight, out, out, out, parts, arrived, count, width, 0, depth,
        ROWS=tall, TILE=_TILE, DEPTH=_DEPTH, SPLITS=splits, GATED=False, SCALED=False, LINE=64, AHEAD=_AHEAD,
        num_warps=4, num_stages=4, **overlap_options(device),
    )  # fmt: skip
    return out


def takes_gated_product(rows: Tensor, weight: Tensor) -> bool:
    """`gated_product` can compute this, and was found to do so faster than cuBLAS."""
    (count, depth), width = rows.shape, weight.shape[0] // 2
    return count <= MOST_ROWS and width % _TILE == 0 and depth % _GATED_DEPTH == 0 and rows.is_contiguous()


def gated_product(rows: Tensor, weight: Tensor) -> Tensor:
    """silu(rows @ gate.T) * (rows @ up.T) for rows [T, K] and weight [2 N, K], the gate's above the other's: [T, N]."""
    (count, depth), width = rows.shape, weight.shape[0] // 2
    out = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    _product[(width // _TILE, 1)](
        rows, weight, out, out, out, out, out, count, width, width * depth, depth,
        ROWS=_padded(count), TILE=_TILE, DEPTH=_GATED_DEPTH, SPLITS=1, GATED=True, SCALED=False, LINE=64, AHEAD=_AHEAD,
        num_warps=4, num_stages=4, **overlap_options(rows.device),
    )  # fmt: skip
    return out


def takes_scaled_product(rows: Tensor, weight: Tensor) -> bool:
    """`scaled_product` can compute this, and was found to do so faster than the library."""
    (count, depth), width = rows.shape, weight.shape[0]
    return count <= MOST_SCALED_ROWS and width % _TILE == 0 and depth % _DEPTH == 0 and rows.is_contiguous()


def scaled_product(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`product` of float8 rows and weight, times row_scale [T] and scale [N] float32: [T, N] in dtype."""
    (count, depth), width = rows.shape, weight.shape[0]
    device = rows.device
    step = 2 * _DEPTH if depth % (2 * _DEPTH) == 0 else _DEPTH
    splits = _scaled_splits(width, depth, step, device)
    tiles, tall = width // _TILE, _padded(count)
    out = torch.empty((count, width), dtype=dtype, device=device)
    parts, arrived = _scratch(device, splits * tiles * _TILE * tall, tiles)
    _product[(tiles, splits)](
        rows, weight, row_scale, scale, out, parts, arrived, count, width, 0, depth,
        ROWS=tall, TILE=_TILE, DEPTH=step, SPLITS=splits, GATED=False, SCALED=True, LINE=128, AHEAD=_AHEAD,
        num_warps=4, num_stages=6, **overlap_options(device),
    )  # fmt: skip
    return out


@cache
def _scaled_splits(width: int, depth: int, step: int, device: torch.device) -> int:
    """As `_splits`; where none fills the device well, 1 is still better than the library."""
    multiprocessors = _multiprocessors(device)
    for splits in (1, 2, 4):
        programs = width // _TILE * splits
        waves = -(-programs // multiprocessors)
        if depth % (splits * step) == 0 and programs >= _LEAST_FILL * waves * multiprocessors:
            return splits
    return 1


def takes_scaled_gated_product(rows: Tensor, weight: Tensor) -> bool:
    """`scaled_gated_product` can compute this, and was found to do so faster than the library."""
    (count, depth), width = rows.shape, weight.shape[0] // 2
    return count <= MOST_SCALED_ROWS and width % _TILE == 0 and depth % _DEPTH == 0 and rows.is_contiguous()


def scaled_gated_product(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`gated_product` of float8 rows and weight [2 N, K], times row_scale [T] and scale [2 N]: [T, N] in dtype."""
    (count, depth), width = rows.shape, weight.shape[0] // 2
    out = torch.empty((count, width), dtype=dtype, device=rows.device)
    _product[(width // _TILE, 1)](
        rows, weight, row_scale, scale, out, out, out, count, width, width * depth, depth,
        ROWS=_padded(count), TILE=_TILE, DEPTH=_DEPTH, SPLITS=1, GATED=True, SCALED=True, LINE=128, AHEAD=_AHEAD,
        num_warps=4, num_stages=4, **overlap_options(rows.device),
    )  # fmt: skip
    return out


def _padded(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


_scratches: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _scratch(device: torch.device, parts: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Room for partial sums and a counter for each tile, which is 0 between kernels. Kernels of one stream share it."""
    found = _scratches.get(device)
    if found is None or found[0].numel() < parts or found[1].numel() < tiles:
        if found is not None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a product's scratch memory would grow while a graph is captured")
        found = (
            torch.empty(max(parts, 1 << 20), dtype=torch.float32, device=device),
            torch.zeros(max(tiles, 4096), dtype=torch.int32, device=device),
        )
        _scratches[device] = found
    return found


@triton.jit
def _product(
    rows, weight, row_scale, scale, out, parts, arrived, count, width, to_second, depth: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, LINE: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * TILE + tl.arange(0, TILE)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    share: tl.constexpr = depth // SPLITS
    from_weight = weight + n[:, None].to(tl.int64) * depth + split * share + k[None, :]
    from_rows = rows + m[None, :] * depth + split * share + k[:, None]
    inside = (m < count)[None, :]
    if OVERLAP:
        # The weights are no other kernel's: they may come as near as the L2 cache before the rows are there.
        line = tl.arange(0, AHEAD)
        near = weight + n[:, None].to(tl.int64) * depth + split * share + line[None, :] * LINE
        prefetch(near)
        if GATED:
            prefetch(near + to_second)
        gdc_wait()
    total = tl.zeros((TILE, ROWS), tl.float32)
    second = tl.zeros((TILE, ROWS), tl.float32)
    for _ in range(0, share, DEPTH):
        x = tl.load(from_rows, inside, 0.0)
        total = tl.dot(tl.load(from_weight), x, total)
        if GATED:
            second = tl.dot(tl.load(from_weight + to_second), x, second)
        from_weight += DEPTH
        from_rows += DEPTH
    if OVERLAP:
        gdc_launch_dependents()  # not before: the next kernel's programs would take room from this one's
    to = out + m[None, :] * width + n[:, None]
    if GATED:
        if SCALED:
            total = _scaled(total, row_scale, scale, m, count, n)
            second = _scaled(second, row_scale, scale, m, count, width + n)
        gate = total.to(out.dtype.element_ty).to(tl.float32)
        up = second.to(out.dtype.element_ty).to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
        tl.store(to, (activated * up).to(out.dtype.element_ty), inside)
    elif SPLITS == 1:
        if SCALED:
            total = _scaled(total, row_scale, scale, m, count, n)
        tl.store(to, total.to(out.dtype.element_ty), inside)
    else:
        part = parts + tile * (SPLITS * TILE * ROWS) + tl.arange(0, TILE)[:, None] * ROWS + m[None, :]
        tl.store(part + split * (TILE * ROWS), total)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            total = tl.zeros((TILE, ROWS), tl.float32)
            for other in range(SPLITS):
                total += tl.load(part + other * (TILE * ROWS), cache_modifier=".cg")
            if SCALED:
                total = _scaled(total, row_scale, scale, m, count, n)
            tl.store(to, total.to(out.dtype.element_ty), inside)
            tl.store(arrived + tile, 0)


@triton.jit
def _scaled(total, row_scale, scale, m, count, n):
    of_row = tl.load(row_scale + m, m < count, 0.0)
    return total * (tl.load(scale + n)[:, None] * of_row[None, :])


@triton.jit
def prefetch(addresses):
    """Asks for the lines of these addresses into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


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


def takes_likeliest(rows: Tensor, weight: Tensor) -> bool:
    """`likeliest` can compute this, and was found to do so faster than cuBLAS and a search of its result."""
    (count, depth), width = rows.shape, weight.shape[0]
    return count <= MOST_ROWS and width % _TILE == 0 and depth % _GATED_DEPTH == 0 and rows.is_contiguous()


def likeliest(rows: Tensor, weight: Tensor) -> Tensor:
    """The index of the largest of rows [T, K] @ weight [N, K].T in each row, the lowest among equals: [T] int64.

    Products are compared as they would be stored, in rows' dtype.
    """
    (count, depth), width = rows.shape, weight.shape[0]
    tiles, tall = width // _TILE, _padded(count)
    largest = torch.empty((tall, tiles), dtype=torch.float32, device=rows.device)
    at = torch.empty((tall, tiles), dtype=torch.int32, device=rows.device)
    out = torch.empty(count, dtype=torch.int64, device=rows.device)
    _largest_of_tile[(tiles,)](
        rows, weight, largest, at, count, tiles, depth,
        ROWS=tall, TILE=_TILE, DEPTH=_GATED_DEPTH, num_warps=4, num_stages=6,
    )  # fmt: skip
    _largest_of_row[(count,)](largest, at, out, tiles, BLOCK=triton.next_power_of_2(tiles), num_warps=8)
    return out


@triton.jit
def _largest_of_tile(
    rows, weight, largest, at, count, tiles, depth: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n = tile * TILE + tl.arange(0, TILE)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    from_weight = weight + n[:, None].to(tl.int64) * depth + k[None, :]
    from_rows = rows + m[None, :] * depth + k[:, None]
    inside = (m < count)[None, :]
    total = tl.zeros((TILE, ROWS), tl.float32)
    for _ in range(0, depth, DEPTH):
        total = tl.dot(tl.load(from_weight), tl.load(from_rows, inside, 0.0), total)
        from_weight += DEPTH
        from_rows += DEPTH
    stored = total.to(rows.dtype.element_ty).to(tl.float32)
    best, where = tl.max(stored, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(largest + m * tiles + tile, best)
    tl.store(at + m * tiles + tile, tile * TILE + where)


@triton.jit
def _largest_of_row(largest, at, out, tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tile = tl.arange(0, BLOCK)
    inside = tile < tiles
    values = tl.load(largest + row * tiles + tile, inside, float("-inf"))
    _, where = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row, tl.load(at + row * tiles + where).to(tl.int64))
