"""The drawing kernels put together: which run for a step's rows, how they are launched, and the memory between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from .. import sampler
from .borders import find_border
from .choosing import choose
from .gathering import FIELDS, decide, gather
from .weighing import find_peaks, keep, weigh

if TYPE_CHECKING:
    from ..sampler import SamplingColumns

_TILE: int = 4096
"""Tokens of a tile."""
_HELD: int = 8192
"""Tokens that are gathered at most."""
_FEW: int = 1024
"""Up to so many of them are looked at by shorter code."""
_BINS: int = 128
_CHUNK: int = 32
"""Tiles whose books a program looks at at a time."""


class Drawn(NamedTuple):
    """Of N rows, on the device. A row keeps the tokens whose `ordered_bits` are over its border, and of those at it as
    many as `at_border` says, the lowest ids; of these, what weighs nothing is never drawn."""

    tokens: Tensor
    """[N] int64."""
    border: Tensor
    """[N] int32; the lowest for rows that are greedy or keep all."""
    at_border: Tensor
    """[N] int32."""


def draw(logits: Tensor, columns: SamplingColumns) -> Drawn:
    """`sampler.sample` of float32 logits [N, vocab], contiguous; vocab up to 2 ** 20. Launches seven kernels, or three
    if no row filters, whose compiled forms depend on the vocabulary alone; does not wait. Raises ValueError."""
    rows, vocab = logits.shape
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, and have strides {logits.stride()}")
    if vocab > sampler.LARGEST_DRAWN:
        raise ValueError(f"a vocabulary of {vocab} tokens: sums of weights hold up to {sampler.LARGEST_DRAWN}")
    device, tiles = logits.device, triton.cdiv(vocab, _TILE)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    out = Drawn(empty(rows, dtype=torch.int64), empty(rows), empty(rows))
    peaks, sums = empty(rows, tiles, dtype=torch.float32), empty(rows, tiles, dtype=torch.int64)
    plans, equals = empty(rows, FIELDS.value), empty(rows, tiles)
    filters = columns.any_top_k or columns.any_top_p
    counts = empty(rows, tiles, _BINS) if filters else equals
    min_p = columns.top_p if columns.min_p is None else columns.min_p
    given = tuple(one.contiguous() for one in (columns.temperature, columns.top_k, columns.top_p, min_p))
    flags = int(columns.min_p is not None) | int(columns.any_top_k) << 1 | int(columns.any_top_p) << 2
    counters = tuple(one.contiguous() for one in (columns.seed, columns.sample_index, columns.position))
    of_tiles, of_rows = (rows, tiles), (rows,)
    find_peaks[of_tiles](logits, peaks, vocab, tiles, TILE=_TILE, num_warps=8)
    weigh[of_tiles](
        logits, peaks, *given, sums, counts, vocab, tiles, flags,
        TILE=_TILE, BINS=_BINS, CHUNK=_CHUNK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    if filters:
        offsets, totals, held = empty(rows, tiles), empty(rows, dtype=torch.int64), empty(rows, 2, _HELD)
        decide[of_rows](
            *given, sums, counts, plans, offsets, totals, vocab, tiles, flags,
            HELD=_HELD, BINS=_BINS, CHUNK=_CHUNK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        gather[of_tiles](
            logits, peaks, *given, plans, offsets, sums, held, vocab, tiles, flags,
            HELD=_HELD, TILE=_TILE, BINS=_BINS, CHUNK=_CHUNK, num_warps=16, maxnreg=64, enable_fp_fusion=False,
        )  # fmt: skip
        find_border[of_rows](
            logits, peaks, *given, *counters, plans, sums, totals, held, *out, vocab, tiles, flags,
            HELD=_HELD, FEW=_FEW, TILE=_TILE, BINS=_BINS, CHUNK=_CHUNK, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
        keep[of_tiles](
            logits, peaks, *given, plans, out.border, sums, equals, vocab, tiles, flags,
            TILE=_TILE, CHUNK=_CHUNK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    choose[of_rows](
        logits, peaks, *given, *counters, plans, sums, equals, *out, vocab, tiles, flags,
        TILE=_TILE, CHUNK=_CHUNK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out
