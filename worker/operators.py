"""Operators that stand in a compiled model for what kernels of ours do better than a compiler's.

On a CPU they are what their formulas say, in torch; there they serve the tests.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from . import products

LIBRARY: Final = torch.library.Library("tandem", "DEF")
"""All operators of ours; see also attention.ops."""
LIBRARY.define("settled(Tensor values) -> Tensor")
LIBRARY.define("product(Tensor rows, Tensor weight) -> Tensor")
LIBRARY.define("gated_product(Tensor rows, Tensor weight) -> Tensor")
LIBRARY.define("likeliest(Tensor rows, Tensor weight) -> Tensor")
LIBRARY.define("add_norm(Tensor left, Tensor right, Tensor weight, float eps) -> (Tensor, Tensor)")
LIBRARY.define("quantize_rows(Tensor rows) -> (Tensor, Tensor)")
LIBRARY.define("add_norm_quantize(Tensor left, Tensor right, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
LIBRARY.define("scaled_product(Tensor rows, Tensor row_scale, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "scaled_gated_product(Tensor rows, Tensor row_scale, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor"
)

LARGEST: Final = 448.0
"""Of float8 e4m3."""
_LEAST: Final = 1e-12
"""Largest magnitude of a row below which its scale shrinks no further."""


def settled(values: Tensor) -> Tensor:
    """A copy. A compiler that would compute `values` anew for each of their uses computes them once."""
    return values.clone(memory_format=torch.contiguous_format)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [T, K] @ weight [N, K].T: [T, N]."""
    if rows.is_cuda:
        from . import product_kernels

        if product_kernels.takes_product(rows, weight):
            return product_kernels.product(rows, weight)
    return products.product(rows, weight)


def gated_product(rows: Tensor, weight: Tensor) -> Tensor:
    """silu(rows @ gate.T) * (rows @ up.T) for weight [2 N, K], gate above up: [T, N]."""
    if rows.is_cuda:
        from . import kernels, product_kernels

        if product_kernels.takes_gated_product(rows, weight):
            return product_kernels.gated_product(rows, weight)
        return kernels.silu_mul(products.product(rows, weight))
    gate, up = (rows @ weight.t()).chunk(2, dim=1)
    return functional.silu(gate) * up


def likeliest(rows: Tensor, weight: Tensor) -> Tensor:
    """The index of the largest of rows [T, K] @ weight [N, K].T in each row, the lowest among equals: [T] int64."""
    if rows.is_cuda:
        from . import product_kernels

        if product_kernels.takes_likeliest(rows, weight):
            return product_kernels.likeliest(rows, weight)
    return products.product(rows, weight).argmax(dim=-1)


def add_norm(left: Tensor, right: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of left and right [T, H], and its RMSNorm times weight [H]."""
    if left.is_cuda:
        from . import kernels

        return kernels.add_norm(left.contiguous(), right.contiguous(), weight, eps)
    total = left + right
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normed.to(total.dtype)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [T, K] as float8 e4m3 and the scale of each row [T] float32: rows ≈ float8 * scale[:, None]."""
    if rows.is_cuda:
        from . import kernels

        return kernels.quantize_rows(rows.contiguous())
    return quantize_rows_plain(rows)


def quantize_rows_plain(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in torch, on any device."""
    wide = rows.float()
    scale = wide.abs().amax(-1).clamp_min(_LEAST) / LARGEST
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def add_norm_quantize(left: Tensor, right: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm`, whose second result is quantised: the sum, float8 rows, their scales."""
    if left.is_cuda:
        from . import kernels

        return kernels.add_norm_quantize(left.contiguous(), right.contiguous(), weight, eps)
    total, normed = add_norm(left, right, weight, eps)
    return total, *quantize_rows_plain(normed)


def scaled_product(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [T, K] @ weight [N, K].T, both float8, times row_scale [T] and scale [N]: [T, N] in dtype."""
    if rows.is_cuda:
        from . import product_kernels

        if product_kernels.takes_scaled_product(rows, weight):
            return product_kernels.scaled_product(rows, row_scale, weight, scale, dtype)
        # The library's kernels give bfloat16.
        out = torch._scaled_mm(
            rows,
            weight.t(),
            scale_a=row_scale[:, None],
            scale_b=scale[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out.to(dtype)
    wide = rows.float() @ weight.float().t()
    return (wide * row_scale[:, None] * scale[None, :]).to(dtype)


def scaled_gated_product(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`gated_product` in 8 bits, of weight [2 N, K] and scale [2 N]: [T, N] in dtype."""
    if rows.is_cuda:
        from . import kernels, product_kernels

        if product_kernels.takes_scaled_gated_product(rows, weight):
            return product_kernels.scaled_gated_product(rows, row_scale, weight, scale, dtype)
        return kernels.silu_mul(scaled_product(rows, row_scale, weight, scale, dtype))
    gate, up = scaled_product(rows, row_scale, weight, scale, dtype).chunk(2, dim=1)
    return functional.silu(gate) * up


def _shape_of_settled(values: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _shape_of_product(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]))


def _shape_of_gated_product(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0] // 2))


def _shape_of_likeliest(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[:1], dtype=torch.int64)


def _shape_of_add_norm(left: Tensor, right: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return left.new_empty(left.shape), left.new_empty(left.shape)


def _shape_of_quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=torch.float8_e4m3fn), rows.new_empty(rows.shape[:1], dtype=torch.float32)


def _shape_of_add_norm_quantize(
    left: Tensor, right: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return left.new_empty(left.shape), *_shape_of_quantize_rows(left)


def _shape_of_scaled_product(
    rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]), dtype=dtype)


def _shape_of_scaled_gated_product(
    rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0] // 2), dtype=dtype)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("settled", settled, _device)
    LIBRARY.impl("product", product, _device)
    LIBRARY.impl("gated_product", gated_product, _device)
    LIBRARY.impl("likeliest", likeliest, _device)
    LIBRARY.impl("add_norm", add_norm, _device)
torch.library.register_fake("tandem::settled", _shape_of_settled, lib=LIBRARY)
torch.library.register_fake("tandem::product", _shape_of_product, lib=LIBRARY)
torch.library.register_fake("tandem::gated_product", _shape_of_gated_product, lib=LIBRARY)
torch.library.register_fake("tandem::likeliest", _shape_of_likeliest, lib=LIBRARY)
torch.library.register_fake("tandem::add_norm", _shape_of_add_norm, lib=LIBRARY)
for _name, _operator, _shape in (
    ("quantize_rows", quantize_rows, _shape_of_quantize_rows),
    ("add_norm_quantize", add_norm_quantize, _shape_of_add_norm_quantize),
    ("scaled_product", scaled_product, _shape_of_scaled_product),
    ("scaled_gated_product", scaled_gated_product, _shape_of_scaled_gated_product),
):
    for _device in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _operator, _device)
    torch.library.register_fake(f"tandem::{_name}", _shape, lib=LIBRARY)
