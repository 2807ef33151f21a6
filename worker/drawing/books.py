"""What kernels read of a row: its sampling parameters, and its largest logit and its weight from those of its tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import sampler

UNALIGNED: list[str] = ["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "sample_indices", "positions"]
"""Columns, which lie anywhere: or some step would wait for a compiler."""

GREEDY_BELOW = tl.constexpr(sampler.GREEDY_BELOW)
_WHOLE = tl.constexpr(2.0**sampler.WEIGHT_BITS)


@triton.jit
def peak_of(peaks, tiles, CHUNK: tl.constexpr):
    """A row's largest logit."""
    most = tl.full((CHUNK,), float("-inf"), tl.float32)
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        most = tl.maximum(most, tl.load(peaks + tile, tile < tiles, float("-inf")))
    return tl.max(most)


@triton.jit
def total_of(sums, tiles, CHUNK: tl.constexpr):
    total = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        total += tl.load(sums + tile, tile < tiles, 0)
    return tl.sum(total)


@triton.jit
def top_k_of(top_ks, row, vocab, flags):
    """0 if it is off."""
    top_k = tl.load(top_ks + row, (flags & 2) != 0, 0)
    return tl.where(top_k < vocab, top_k, 0)


@triton.jit
def top_p_of(top_ps, row, flags):
    return tl.load(top_ps + row, (flags & 4) != 0, 1.0)


@triton.jit
def least_of(min_ps, row, flags):
    """The share below which min-p leaves a token out."""
    return tl.load(min_ps + row, (flags & 1) != 0, 0.0) * _WHOLE
