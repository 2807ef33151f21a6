"""Batch-invariant mode on CUDA: the operations of an unchanged model, those that depend on the batch by our kernels.

Libraries for GPUs choose a kernel, and with it the order of a sum, by the number of rows, for products as for sums.
Elementwise operations, copies and gathers do not depend on it, nor do maxima and sums of integers, which are the same
in any order. So the mode sits below the model, where torch dispatches each operation to its device, and knows them
all: those that are safe pass, products, sums and what is made of them are computed by `invariant_kernels`, sorting
becomes stable, and whatever else the model asks for is refused by name. What waits for the device is refused likewise,
so every model that the mode takes can be captured in CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from .sources import LoadError

_SAFE: Final = frozenset(
    (
        "all amax amin any arange argmax argmin cat constant_pad_nd copy_ embedding empty empty_like "
        "empty_strided fill_ flip floor_divide floor_divide_ full full_like gather glu histc index index_copy "
        "index_copy_ index_put index_put_ index_select lift_fresh linspace log_sigmoid_forward masked_fill_ "
        "max.dim min.dim new_empty new_full new_ones new_zeros ones ones_like polar prelu repeat "
        "_reshape_alias scalar_tensor scatter.src scatter.value scatter_.src scatter_.value stack _to_copy tril triu "
        "_unsafe_view zero_ zeros zeros_like"
    ).split()
)
"""Names of operations that move numbers, make them, compare them, count them (histc), or are elementwise though torch
does not mark them so; beside views and the elementwise operations that it marks."""
_EXACT_OF_INTEGERS: Final = frozenset("sum cumsum prod index_add index_add_ scatter_add scatter_add_".split())
"""Safe where they add integers."""


class LetsThrough:
    """A mode that can be told to look away for a while."""

    _own_work = False

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Let everything through: what is inside is invariant by construction (attention)."""
        self._own_work = True
        try:
            yield
        finally:
            self._own_work = False


class RowKernels(LetsThrough, TorchDispatchMode):
    """While active, operations are computed so that no row's result depends on the other rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._own_work:
            return func(*args, **kwargs)
        name = func.name()
        if _is_safe(func):
            _require_harmless(name, args, kwargs)
            return func(*args, **kwargs)
        if name.partition("::")[2].partition(".")[0] in _EXACT_OF_INTEGERS and _counts(args[0], kwargs):
            return func(*args, **kwargs)
        if name in _COMPUTED:
            return _COMPUTED[name](*args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        raise LoadError(f"batch-invariant mode does not know how to compute {name}, which the model uses")


@cache
def _is_safe(func: OpOverload) -> bool:
    name = func.name().partition("::")[2]
    return func.is_view or torch.Tag.pointwise in func.tags or name in _SAFE or name.partition(".")[0] in _SAFE


def _require_harmless(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """LoadError if an operation that is safe by itself is not so with these arguments."""
    problem = None
    match name.partition("::")[2].partition(".")[0]:
        case "index" if _selects(args[1]):
            problem = "by a mask: how much comes out, the host would have to wait for"
        case "index_put" | "index_put_":
            adds = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
            number = args[2].numel() == 1 and args[2].device.type == "cpu"  # which torch fills in without counting
            if adds and not _counts(args[0], {}):
                problem = "by adding up, in any order"
            elif _selects(args[1]) and not number:
                problem = "by a mask: where what goes, the host would have to wait for"
        case "_to_copy" if (device := kwargs.get("device")) is not None:
            if torch.device(device).type == "cpu" != args[0].device.type:
                problem = "to the host, which would have to wait for it"
        case "copy_" if isinstance(args[1], Tensor):
            if args[0].device.type == "cpu" != args[1].device.type:
                problem = "to the host, which would have to wait for it"
    if problem is not None:
        raise LoadError(f"batch-invariant mode does not know {name} {problem}; the model uses it so")


def _selects(indices: Sequence[Tensor | None]) -> bool:
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _counts(values: Tensor, options: Mapping[str, Any]) -> bool:
    """A sum of these values is one of integers; it may say that they become such first."""
    dtype: torch.dtype = options.get("dtype") or values.dtype
    return not dtype.is_floating_point and not dtype.is_complex


def _mm(left: Tensor, right: Tensor) -> Tensor:
    from . import invariant_kernels

    return invariant_kernels.product(left, right)


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    from . import invariant_kernels

    if bias.dim() != 1 or beta != 1 or alpha != 1:
        raise LoadError(
            f"batch-invariant mode knows products plus a bias, not plus {list(bias.shape)} times {beta} with a factor "
            f"of {alpha}, which the model uses"
        )
    return invariant_kernels.product(left, right, bias)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    if left.shape[-1] == 1:  # an outer product adds nothing up
        return left * right
    raise LoadError(
        f"batch-invariant mode does not know the product of {list(left.shape)} and {list(right.shape)}, which the "
        "model uses outside its attention"
    )


def _grouped_mm(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    from . import invariant_kernels

    if left.dim() != 2 or right.dim() != 3 or offs is None or bias is not None or out_dtype not in (None, left.dtype):
        raise LoadError(
            f"batch-invariant mode does not know the grouped product of {list(left.shape)} and {list(right.shape)}, "
            "which the model uses"
        )
    return invariant_kernels.grouped_product(left, right, offs.to(torch.int32))


def _summed(values: Tensor, dims: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None, mean: bool) -> Tensor:
    """torch.sum or torch.mean over `dims`."""
    from . import invariant_kernels

    wanted = sorted({dim % values.dim() for dim in dims or range(values.dim())})
    kept = [dim for dim in range(values.dim()) if dim not in wanted]
    if len(wanted) == 1 and kept and wanted[0] < values.dim() - 1:
        shape = values.shape
        many, width = math.prod(shape[: wanted[0]]), math.prod(shape[wanted[0] + 1 :])
        flat = values.reshape(many, shape[wanted[0]], width)
        sums = invariant_kernels.column_sums(flat, mean=mean)
    else:
        flat = values.permute(*kept, *wanted).reshape(*(values.shape[dim] for dim in kept), -1)
        sums = invariant_kernels.row_sums(flat, mean=mean)
    left = [1 if dim in wanted else size for dim, size in enumerate(values.shape) if keepdim or dim not in wanted]
    return sums.reshape(left).to(dtype or values.dtype)


def _sum(
    values: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return _summed(values, dims, keepdim, dtype, mean=False)


def _mean(
    values: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return _summed(values, dims, keepdim, dtype, mean=True)


def _softmax(values: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _softmaxed(values, dim, half_to_float, log=False)


def _log_softmax(values: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _softmaxed(values, dim, half_to_float, log=True)


def _softmaxed(values: Tensor, dim: int, half_to_float: bool, log: bool) -> Tensor:
    from . import invariant_kernels

    dtype = torch.float32 if half_to_float else values.dtype
    return invariant_kernels.softmax(values.movedim(dim, -1), dtype, log=log).movedim(-1, dim)


def _native_layer_norm(
    values: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from . import invariant_kernels

    over = len(shape)
    wide = values.float()
    flat = wide.flatten(-over)
    mean = invariant_kernels.row_sums(flat, mean=True).reshape(*values.shape[:-over], *[1] * over)
    centred = wide - mean
    variance = invariant_kernels.row_sums(centred.square().flatten(-over), mean=True).reshape(mean.shape)
    inverse = torch.rsqrt(variance + eps)
    out = centred * inverse
    if weight is not None:
        out = out * weight.float()
    if bias is not None:
        out = out + bias.float()
    return out.to(values.dtype), mean, inverse


def _fused_rms_norm(
    values: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    from . import invariant_kernels

    over = len(shape)
    wide = values.float()
    mean = invariant_kernels.row_sums(wide.square().flatten(-over), mean=True)
    inverse = torch.rsqrt(mean + (torch.finfo(values.dtype).eps if eps is None else eps))
    inverse = inverse.reshape(*values.shape[:-over], *[1] * over)
    out = wide * inverse
    if weight is not None:
        out = out * weight.float()
    return out.to(values.dtype), inverse


def _sort(
    values: Tensor, dim: int = -1, descending: bool = False, *, stable: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Of equals the first come first, or the algorithm, which goes by the shape, would decide."""
    found = torch.ops.aten.sort.stable(values, stable=True, dim=dim, descending=descending)
    return found[0], found[1]


def _topk(values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    ordered, order = _sort(values, dim, largest)
    return ordered.narrow(dim, 0, k), order.narrow(dim, 0, k)


_COMPUTED: Final[dict[str, Callable[..., Any]]] = {
    "aten::mm": _mm,
    "aten::addmm": _addmm,
    "aten::bmm": _bmm,
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "aten::sum": _sum,
    "aten::sum.dim_IntList": _sum,
    "aten::mean": _mean,
    "aten::mean.dim": _mean,
    "aten::_softmax": _softmax,
    "aten::_log_softmax": _log_softmax,
    "aten::native_layer_norm": _native_layer_norm,
    "aten::_fused_rms_norm": _fused_rms_norm,
    "aten::sort": _sort,
    "aten::sort.stable": _sort,
    "aten::topk": _topk,
}
