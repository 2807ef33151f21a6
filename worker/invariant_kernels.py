"""Triton kernels of batch-invariant mode on CUDA: products and sums over rows, the same bits for a row in any batch.

A row's result must not depend on how many rows there are, nor on where it stands among them. So

- tiles have one shape, chosen by the weight and its dtype alone; the number of rows only decides how many tiles run.
  A row's place in a tile does not matter: tensor cores compute each row of a product by itself, and in the same way;
- sums run in one order: a product's over the depth in steps of one length, a row's in a fixed number of lanes that
  are added up in the end;
- a kernel is compiled once, whatever the number of rows is. Triton compiles anew for integers that are 1 or divisible
  by 16 and for pointers that are not aligned, and another program may add up in another order: row counts are kept out
  of that (`do_not_specialize`), and pointers are aligned before they get here (`aligned`).

Imported only where it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NARROW: int = 16_384
"""Outputs below which a weight is cut into narrower tiles, since few rows would keep too few multiprocessors busy."""
_LANES: int = 1024
"""Of a row's sum."""
_COLUMNS: int = 256
"""Sums that one program forms where what is added up does not lie side by side."""
_BAND: int = 8
"""Tiles of rows whose programs run side by side, so that they find each other's weights in the cache."""
_ALIGNMENT: int = 16


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: tiles of `rows` x `columns` results, sums over `depth` numbers at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiling(width: int, dtype: torch.dtype) -> Tiling:
    """Of products with a weight of `width` outputs in `dtype`. Never a matter of the rows."""
    if dtype == torch.float32:
        return Tiling(16, 64, 32, warps=4, stages=3)
    if width < _NARROW:
        return Tiling(64, 64, 128, warps=4, stages=3)
    return Tiling(64, 128, 64, warps=4, stages=4)


def aligned(values: Tensor) -> Tensor:
    """The same values, contiguous and at an address that kernels are compiled for."""
    values = values.contiguous()
    return values.clone() if values.data_ptr() % _ALIGNMENT else values


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [T, K] @ weight [K, N], of any strides, plus bias [N]: [T, N] in their dtype, summed up in float32.

    All in one dtype, of 16 bits or float32; the latter exactly, without TF32. Raises TypeError for another weight's.
    """
    _require_one_dtype(rows, weight)
    (count, depth), width = rows.shape, weight.shape[1]
    out = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    if not out.numel():
        return out
    tile = tiling(width, rows.dtype)
    grid = (triton.cdiv(count, tile.rows) * triton.cdiv(width, tile.columns),)
    _product[grid](
        aligned(rows), weight, out if bias is None else bias, out, count, width, depth,
        weight.stride(0), weight.stride(1), BIAS=bias is not None, BAND=_BAND, **_launched(tile, depth),
    )  # fmt: skip
    return out


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """For each of G groups its rows times its weight: rows [T, K], weight [G, K, N] of any strides: [T, N].

    Group g's rows end before row `ends[g]` ([G] int32, ascending) and begin where the last group's end. What becomes
    of rows behind the last end is not defined. Does not wait for the device. Raises as `product`.
    """
    _require_one_dtype(rows, weight)
    (count, depth), (groups, _, width) = rows.shape, weight.shape
    out = torch.empty((count, width), dtype=rows.dtype, device=rows.device)
    if not out.numel():
        return out
    tile = tiling(width, rows.dtype)
    most = min(count, triton.cdiv(count, tile.rows) + groups)
    _grouped_product[(most, triton.cdiv(width, tile.columns))](
        aligned(rows), weight, aligned(ends), out, width, depth, groups,
        weight.stride(0), weight.stride(1), weight.stride(2), GROUPS=triton.next_power_of_2(groups),
        **_launched(tile, depth),
    )  # fmt: skip
    return out


def _require_one_dtype(rows: Tensor, weight: Tensor) -> None:
    if rows.dtype != weight.dtype:
        raise TypeError(f"a product of {rows.dtype} and {weight.dtype}; both must be of one dtype")


def _launched(tile: Tiling, depth: int) -> dict[str, Any]:
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "WHOLE": depth % tile.depth == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit(do_not_specialize=["count"])
def _product(
    rows, weight, bias, out, count, width, depth, weight_depth, weight_width,
    BIAS: tl.constexpr, BAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    # Tiles of a band of rows lie side by side in time, whatever their columns are.
    tall, wide = tl.cdiv(count, ROWS), tl.cdiv(width, COLUMNS)
    band = tl.program_id(0) // (BAND * wide)
    height = tl.minimum(tall - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * wide)
    row = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    column = within // height * COLUMNS + tl.arange(0, COLUMNS)
    total = _tile(
        rows, weight, row, count, column, width, depth, weight_depth, weight_width, ROWS, COLUMNS, DEPTH, WHOLE
    )
    if BIAS:
        total += tl.load(bias + column, column < width, 0.0).to(tl.float32)[None, :]
    inside = (row < count)[:, None] & (column < width)[None, :]
    target = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), inside)


@triton.jit
def _grouped_product(
    rows, weight, ends, out, width, depth, groups, weight_group, weight_depth, weight_width,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    end = tl.load(ends + group, group < groups, 0)
    start = tl.load(ends + group - 1, (group > 0) & (group < groups), 0)
    tiles = tl.where(group < groups, tl.cdiv(end - start, ROWS), 0)
    tiles_to = tl.cumsum(tiles)
    own = tl.sum((tiles_to <= tile).to(tl.int32))  # the group of this tile
    if own < groups:
        is_own = group == own
        place = tile - tl.sum(tl.where(is_own, tiles_to - tiles, 0))
        first = tl.sum(tl.where(is_own, start, 0))
        last = tl.sum(tl.where(is_own, end, 0))
        row = first + place * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = _tile(
            rows, weight + own.to(tl.int64) * weight_group, row, last, column, width, depth, weight_depth,
            weight_width, ROWS, COLUMNS, DEPTH, WHOLE,
        )  # fmt: skip
        inside = (row < last)[:, None] & (column < width)[None, :]
        target = out + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(target, total.to(out.dtype.element_ty), inside)


@triton.jit
def _tile(
    rows, weight, row, end, column, width, depth, weight_depth, weight_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows `row`, before `end`, times columns `column`, before `width`: [ROWS, COLUMNS] float32."""
    k = tl.arange(0, DEPTH)
    left = rows + row.to(tl.int64)[:, None] * depth + k[None, :]
    right = weight + k[:, None] * weight_depth + column.to(tl.int64)[None, :] * weight_width
    in_row, in_column = (row < end)[:, None], (column < width)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        if WHOLE:
            a = tl.load(left, in_row, 0.0)
            b = tl.load(right, in_column, 0.0)
        else:
            inside = start + k < depth
            a = tl.load(left, in_row & inside[None, :], 0.0)
            b = tl.load(right, in_column & inside[:, None], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += DEPTH
        right += DEPTH * weight_depth
    return total


def row_sums(values: Tensor, *, mean: bool = False) -> Tensor:
    """Sums, or means, of values [..., N] over the last dimension: [...] float32."""
    width = values.shape[-1]
    flat = aligned(values).view(-1, width)
    out = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
    if out.numel():
        _row_sums[(flat.shape[0],)](flat, out, WIDTH=width, LANES=_lanes(width), MEAN=mean, num_warps=4)
    return out


def column_sums(values: Tensor, *, mean: bool = False) -> Tensor:
    """Sums, or means, of values [A, N, B] over the middle: [A, B] float32, added up one after the other."""
    many, height, width = values.shape
    out = torch.empty((many, width), dtype=torch.float32, device=values.device)
    if out.numel():
        _column_sums[(many, triton.cdiv(width, _COLUMNS))](
            aligned(values), out, HEIGHT=height, WIDTH=width, COLUMNS=_COLUMNS, MEAN=mean, num_warps=4
        )
    return out


def softmax(values: Tensor, dtype: torch.dtype, *, log: bool = False) -> Tensor:
    """Softmax of values [..., N] over the last dimension, or its logarithm, computed in float32: [..., N] in dtype."""
    width = values.shape[-1]
    flat = aligned(values).view(-1, width)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if out.numel():
        _softmax[(flat.shape[0],)](flat, out, WIDTH=width, LANES=_lanes(width), LOG=log, num_warps=4)
    return out


def _lanes(width: int) -> int:
    lanes: int = min(_LANES, triton.next_power_of_2(width))
    return lanes


@triton.jit
def _row_sums(values, out, WIDTH: tl.constexpr, LANES: tl.constexpr, MEAN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, WIDTH, LANES):
        at = start + lane
        total += tl.load(values + row * WIDTH + at, at < WIDTH, 0.0).to(tl.float32)
    result = tl.sum(total)
    if MEAN:
        result = result / WIDTH
    tl.store(out + row, result)


@triton.jit
def _column_sums(
    values, out, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, MEAN: tl.constexpr
):  # fmt: skip
    slab = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for line in range(HEIGHT):
        total += tl.load(values + (slab * HEIGHT + line) * WIDTH + column, inside, 0.0).to(tl.float32)
    if MEAN:
        total = total / HEIGHT
    tl.store(out + slab * WIDTH + column, total, inside)


@triton.jit
def _softmax(values, out, WIDTH: tl.constexpr, LANES: tl.constexpr, LOG: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    lane = tl.arange(0, LANES)
    most = tl.full((LANES,), float("-inf"), tl.float32)
    for start in range(0, WIDTH, LANES):
        at = start + lane
        most = tl.maximum(most, tl.load(values + row + at, at < WIDTH, float("-inf")).to(tl.float32))
    largest = tl.max(most)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, WIDTH, LANES):
        at = start + lane
        total += tl.exp(tl.load(values + row + at, at < WIDTH, float("-inf")).to(tl.float32) - largest)
    weight = tl.sum(total)
    shift = tl.log(weight)
    for start in range(0, WIDTH, LANES):
        at = start + lane
        above = tl.load(values + row + at, at < WIDTH, 0.0).to(tl.float32) - largest
        if LOG:
            result = above - shift
        else:
            result = tl.exp(above) / weight
        tl.store(out + row + at, result.to(out.dtype.element_ty), at < WIDTH)
