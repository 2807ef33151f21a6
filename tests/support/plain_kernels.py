"""What worker/invariant_kernels.py computes, in plain torch: to see what models ask for where there is no Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    stops = ends.tolist()
    groups = zip([0, *stops], stops, weight, strict=False)
    return torch.cat([rows[start:stop] @ own for start, stop, own in groups])


def row_sums(values: Tensor, *, mean: bool = False) -> Tensor:
    return values.float().mean(-1) if mean else values.float().sum(-1)


def column_sums(values: Tensor, *, mean: bool = False) -> Tensor:
    return row_sums(values.transpose(1, 2), mean=mean)


def softmax(values: Tensor, dtype: torch.dtype, *, log: bool = False) -> Tensor:
    wide = values.float()
    return (wide.log_softmax(-1) if log else wide.softmax(-1)).to(dtype)
