"""Operators that stand in a compiled model for what kernels of ours do better than a compiler's.

On a CPU they are what their formulas say, in torch; there they serve the tests.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

LIBRARY: Final = torch.library.Library("tandem", "DEF")
"""All operators of ours; see also attention.ops."""
LIBRARY.define("settled(Tensor values) -> Tensor")
LIBRARY.define("product(Tensor rows, Tensor weight) -> Tensor")
LIBRARY.define("gated_product(Tensor rows, Tensor weight) -> Tensor")
LIBRARY.define("likeliest(Tensor rows, Tensor weight) -> Tensor")
LIBRARY.define("add_norm(Tensor left, Tensor right, Tensor weight, float eps) -> (Tensor, Tensor)")


def settled(values: Tensor) -> Tensor:
    """A copy. A compiler that would compute `values` anew for each of their uses computes them once."""
    return values.clone(memory_format=torch.contiguous_format)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [T, K] @ weight [N, K].T: [T, N]."""
    if rows.is_cuda:
        from . import kernels

        if kernels.takes_product(rows, weight):
            return kernels.product(rows, weight)
    return rows @ weight.t()


def gated_product(rows: Tensor, weight: Tensor) -> Tensor:
    """silu(rows @ gate.T) * (rows @ up.T) for weight [2 N, K], gate above up: [T, N]."""
    if rows.is_cuda:
        from . import kernels

        if kernels.takes_gated_product(rows, weight):
            return kernels.gated_product(rows, weight)
        return kernels.silu_mul(rows @ weight.t())
    gate, up = (rows @ weight.t()).chunk(2, dim=1)
    return functional.silu(gate) * up


def likeliest(rows: Tensor, weight: Tensor) -> Tensor:
    """The index of the largest of rows [T, K] @ weight [N, K].T in each row, the lowest among equals: [T] int64."""
    if rows.is_cuda:
        from . import kernels

        if kernels.takes_likeliest(rows, weight):
            return kernels.likeliest(rows, weight)
    return (rows @ weight.t()).argmax(dim=-1)


def add_norm(left: Tensor, right: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of left and right [T, H], and its RMSNorm times weight [H]."""
    if left.is_cuda:
        from . import kernels

        return kernels.add_norm(left.contiguous(), right.contiguous(), weight, eps)
    total = left + right
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normed.to(total.dtype)


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
