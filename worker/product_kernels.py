"""Products of few rows by a weight, for CUDA: a decode step reads every weight once, and these read them at the pace of
memory.

What else a model does with such a product joins it: the SiLU gate (`gated_product`), the scales of 8 bits
(`scaled_product`), the search for the likeliest token (`likeliest`). Each has a `takes_…`, which says where it was
found faster than the library; operators.py asks, and leaves the rest to the library (see products). How kernels overlap
is told in overlap.py. Imported only where they run; Triton comes with torch's CUDA builds.
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

_scratches: dict[torch.device, tuple[Tensor, Tensor]] = {}


def takes_product(rows: Tensor, weight: Tensor) -> bool:
    """`product` can compute rows @ weight.T, and was found to do so faster than cuBLAS."""
    width, depth = weight.shape
    return _fits(rows, width, MOST_ROWS, 1) and _splits(width, depth, rows.device) > 0


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
    return _fits(rows, weight.shape[0] // 2, MOST_ROWS, _GATED_DEPTH)


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
    return _fits(rows, weight.shape[0], MOST_SCALED_ROWS, _DEPTH)


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


def takes_scaled_gated_product(rows: Tensor, weight: Tensor) -> bool:
    """`scaled_gated_product` can compute this, and was found to do so faster than the library."""
    return _fits(rows, weight.shape[0] // 2, MOST_SCALED_ROWS, _DEPTH)


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


def takes_likeliest(rows: Tensor, weight: Tensor) -> bool:
    """`likeliest` can compute this, and was found to do so faster than cuBLAS and a search of its result."""
    return _fits(rows, weight.shape[0], MOST_ROWS, _GATED_DEPTH)


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


def _fits(rows: Tensor, width: int, most: int, step: int) -> bool:
    """Up to `most` rows, whole tiles of columns, and whole steps through the depth."""
    count, depth = rows.shape
    return count <= most and width % _TILE == 0 and depth % step == 0 and rows.is_contiguous()


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


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _padded(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


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
        _prefetch(near)
        if GATED:
            _prefetch(near + to_second)
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
def _prefetch(addresses):
    """Asks for the lines of these addresses into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


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
