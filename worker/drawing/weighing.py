"""How much tiles weigh: the first two passes over the logits, and the one over rows that keep too much to hold it."""

from __future__ import annotations

import triton
import triton.language as tl

from .books import GREEDY_BELOW, UNALIGNED, least_of, peak_of, top_k_of, top_p_of
from .gathering import FIELDS, HELD_PART, MODE
from .tokens import DEPTH, bin_of, key_of, power_of, rate_of, share_of, weight_of


@triton.jit(do_not_specialize=["tiles"])
def find_peaks(logits, peaks, vocab, tiles, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row * vocab + at, at < vocab, float("-inf"))
    tl.store(peaks + row * tiles + tile, tl.max(value))


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=UNALIGNED)
def weigh(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, sums, counts, vocab, tiles, flags,
    TILE: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature >= GREEDY_BELOW:
        at = tile * TILE + tl.arange(0, TILE)
        value = tl.load(logits + row * vocab + at, at < vocab, float("-inf"))
        peak = peak_of(peaks + row * tiles, tiles, CHUNK)
        power = power_of(value, peak, rate_of(temperature))
        weight = weight_of(share_of(power), least_of(min_ps, row, flags))
        tl.store(sums + row * tiles + tile, tl.sum(weight))
        if (top_k_of(top_ks, row, vocab, flags) > 0) | (top_p_of(top_ps, row, flags) < 1.0):
            found = tl.histogram(bin_of(power, BINS), BINS, power >= -DEPTH)
            tl.store(counts + (row * tiles + tile) * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=UNALIGNED)
def keep(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, plans, borders, sums, equals, vocab, tiles, flags,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tl.load(plans + row * FIELDS + MODE) >= HELD_PART:
        at = tile * TILE + tl.arange(0, TILE)
        value = tl.load(logits + row * vocab + at, at < vocab, float("-inf"))
        border = tl.load(borders + row)
        peak = peak_of(peaks + row * tiles, tiles, CHUNK)
        power = power_of(value, peak, rate_of(tl.load(temperatures + row)))
        weight = weight_of(share_of(power), least_of(min_ps, row, flags))
        key = key_of(value)
        tl.store(sums + row * tiles + tile, tl.sum(tl.where(key > border, weight, 0)))
        tl.store(equals + row * tiles + tile, tl.sum(((key == border) & (at < vocab)).to(tl.int32)))
