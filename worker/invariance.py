"""Batch-invariant mode: a token's bits do not depend on what else is in its batch.

On CUDA nearly every library kernel makes them depend on it; `row_kernels` tells what is done about that. On a CPU three
things do, and this is what is done about each:

- A matrix product rounds differently for different numbers of rows. Here every product with weights is cut into tiles
  of `ROW_TILE` rows, each the same product of the same shape, filled up with rows of zeros. A TorchFunctionMode does
  so around the unchanged model, and refuses products that it does not know.
- Elementwise kernels treat the end of a tensor, and of each thread's share, apart from its middle. So steps are filled
  up to a multiple of `ROW_TILE` tokens, and at most `MAX_THREADS` threads share the work: then every end falls
  between vectors, not inside one.
- Attention sums over the context. Reference attention does so per query, in tiles of fixed size and order.

There, experts are run one after the other (transformers' "eager" implementation): a token's experts are added up in
ascending order, whoever else they serve. What cannot be proved is checked at load: `check_tiles` here, and whole steps
in `PagedModel`. Bits are the same for one device, library version and number of threads, not across those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .batch import Batch
from .row_kernels import LetsThrough, RowKernels
from .sources import LoadError

ROW_TILE: Final = 16
MAX_THREADS: Final = 2

_MATMULS: Final = frozenset(
    {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.linalg.matmul}
)
_ADDMMS: Final = frozenset({torch.addmm, Tensor.addmm})
_OTHER_PRODUCTS: Final = frozenset(
    getattr(owner, name)
    for owner in (torch, Tensor, functional)
    for name in (
        "einsum baddbmm addbmm tensordot inner chain_matmul bilinear mv dot vdot addmv conv1d conv2d grouped_mm "
        "_grouped_mm scaled_dot_product_attention __rmatmul__"
    ).split()
    if hasattr(owner, name)
)


def configure_threads(requested: int) -> int:
    """Set this process's number of intra-op threads for batch-invariant mode and return it.

    0 chooses one, the same on every machine; a number above MAX_THREADS is refused with LoadError.
    """
    if requested > MAX_THREADS:
        raise LoadError(
            f"batch-invariant mode on a CPU uses at most {MAX_THREADS} threads, {requested} were asked for: with more, "
            "a token's rounding would depend on how a step's work happens to be shared"
        )
    threads = requested or 1
    torch.set_num_threads(threads)
    return threads


def mode_for(device: torch.device) -> RowTiles | RowKernels:
    """What makes a model's own code batch-invariant while it is active."""
    return RowKernels() if device.type == "cuda" else RowTiles()


def experts_implementation(device: torch.device) -> str | None:
    """How transformers shall run a mixture of experts; None: as it does by itself, which on CUDA is by grouped
    products. Those the mode knows, and they add up a token's experts in its own order."""
    return None if device.type == "cuda" else "eager"


class RowTiles(LetsThrough, TorchFunctionMode):
    """While active, products with weights are computed by tiles of ROW_TILE rows."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._own_work:
            return func(*args, **kwargs)
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func in _MATMULS:
            return _matmul(func, *args, **kwargs)
        if func in _ADDMMS and not kwargs and args[1].dim() == args[2].dim() == 2:
            return tiled_product(args[1], args[2], args[0])
        if func in _ADDMMS or func in _OTHER_PRODUCTS:
            raise LoadError(f"batch-invariant mode does not know how to compute {func.__name__}, which the model uses")
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return tiled_product(input, weight.t(), bias)


def _matmul(func: Callable[..., Any], left: Tensor, right: Tensor, **kwargs: Any) -> Tensor:
    if left.shape[-1] == 1 and left.dim() > 1:  # an outer product adds nothing up
        product: Tensor = func(left, right, **kwargs)
        return product
    if right.dim() == 2 and not kwargs:
        return tiled_product(left, right, None)
    raise LoadError(
        f"batch-invariant mode does not know the product of {list(left.shape)} and {list(right.shape)}, which the "
        "model uses outside its attention"
    )


def tiled_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows [..., K] times weight [K, N], plus bias [N], by tiles of ROW_TILE rows: [..., N]."""
    flat = rows.reshape(-1, rows.shape[-1])
    count = flat.shape[0]
    if count % ROW_TILE:
        flat = functional.pad(flat, (0, 0, 0, -count % ROW_TILE))
    elif not flat.is_contiguous():
        flat = flat.contiguous()
    out = flat.new_empty(flat.shape[0], weight.shape[1])
    for start in range(0, flat.shape[0], ROW_TILE):
        tile = slice(start, start + ROW_TILE)
        if bias is None:
            torch.mm(flat[tile], weight, out=out[tile])
        else:
            torch.addmm(bias, flat[tile], weight, out=out[tile])
    return out[:count].view(*rows.shape[:-1], weight.shape[1])


def pad_rows(rows: Tensor) -> Tensor:
    """[N, width] filled up with zeros to a multiple of ROW_TILE rows."""
    missing = -rows.shape[0] % ROW_TILE
    return functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def pad_batch(batch: Batch, scratch_block: int) -> Batch:
    """The batch filled up to a multiple of ROW_TILE tokens by one more prefill row, in the scratch block."""
    missing = -batch.num_tokens % ROW_TILE
    if not missing:
        return batch
    # Each filling token stands at position 0, so the row is not a real chunk; nobody reads what it computes.
    scratch_row = batch.block_tables.new_full((1, batch.block_tables.shape[1]), scratch_block)
    return replace(
        batch,
        token_ids=functional.pad(batch.token_ids, (0, missing)),
        positions=functional.pad(batch.positions, (0, missing)),
        kv_slots=functional.pad(batch.kv_slots, (0, missing), value=scratch_block * batch.block_size),
        row_of_token=functional.pad(batch.row_of_token, (0, missing), value=batch.num_rows),
        block_tables=torch.cat([batch.block_tables, scratch_row]),
        kv_lens=functional.pad(batch.kv_lens, (0, 1), value=missing),
        query_starts=np.append(batch.query_starts, batch.num_tokens + missing).astype(np.int32),
        kv_lens_host=np.append(batch.kv_lens_host, missing).astype(np.int32),
    )


@torch.no_grad()
def check_tiles(module: nn.Module) -> None:
    """LoadError unless, for every shape of weight matrix in `module`, a row's bits depend neither on its place in a
    tile nor on the tile's other rows."""
    for weight in _weight_shapes(module):
        product, tile_rows = _product_of(weight)
        generator = torch.Generator(device="cpu").manual_seed(0)
        first, second = (
            torch.randn(tile_rows, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
            for _ in range(2)
        )
        expected = product(first[:1], weight.t(), None)[0]
        tiles = second.repeat(tile_rows, 1, 1)
        tiles.diagonal(dim1=0, dim2=1).copy_(first[0][:, None])
        same = torch.stack([(product(tile, weight.t(), None)[row] == expected).all() for row, tile in enumerate(tiles)])
        if not same.all():
            raise LoadError(
                f"batch-invariant mode does not work here: in a product of {tile_rows} x {weight.shape[1]} with "
                f"{weight.shape[1]} x {weight.shape[0]} ({weight.dtype}, {weight.device}) a row's bits depend on "
                "its place in the tile; try another dtype or number of threads"
            )


def _product_of(weight: Tensor) -> tuple[Callable[[Tensor, Tensor, Tensor | None], Tensor], int]:
    """How the mode multiplies by a weight [N, K], and the rows of its tiles."""
    if weight.device.type != "cuda":
        return tiled_product, ROW_TILE
    from . import invariant_kernels

    return invariant_kernels.product, invariant_kernels.tiling(weight.shape[0], weight.dtype).rows


def _weight_shapes(module: nn.Module) -> list[Tensor]:
    """One [N, K] weight of each shape and dtype: of linear layers, and of experts kept as [experts, N, K]."""
    found: dict[tuple[Any, ...], Tensor] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            if parameter.dim() in (2, 3) and not isinstance(child, nn.Embedding):
                weight: Tensor = parameter if parameter.dim() == 2 else parameter[0]
                found.setdefault((*weight.shape, weight.dtype), weight)
    return list(found.values())
