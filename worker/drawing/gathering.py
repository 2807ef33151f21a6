"""Which tokens may be the border of top-k or top-p, told by the counts of bins, and those tokens gathered."""

from __future__ import annotations

import triton
import triton.language as tl

from .books import GREEDY_BELOW, UNALIGNED, least_of, peak_of, top_k_of, top_p_of, total_of
from .tokens import DEPTH, bin_of, needed_of, power_of, rate_of, share_of, weight_of

_SLACK = tl.constexpr(1e-5)
"""By how much, relatively, the share of a token may lie outside of what its bin's edges say: rounding."""

# What is known of a row, of which `plans` has FIELDS.
FIELDS = tl.constexpr(8)
MODE = tl.constexpr(0)
START = tl.constexpr(1)
"""The first bin that is gathered …"""
LAST = tl.constexpr(2)
"""… and the last, which may hold the border."""
FOUND = tl.constexpr(3)
"""How many tokens these bins hold."""
OVER = tl.constexpr(4)
"""How many tokens lie in the bins before."""
BY_COUNT = tl.constexpr(5)
"""top-k leaves something out."""

UNFILTERED = tl.constexpr(0)
HELD_ALL = tl.constexpr(1)
"""All that may be kept is gathered."""
HELD_PART = tl.constexpr(2)
"""All that may be the border is gathered."""
NOT_HELD = tl.constexpr(3)
"""Too much for that."""


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=UNALIGNED)
def decide(
    temperatures, top_ks, top_ps, min_ps, sums, counts, plans, offsets, totals, vocab, tiles, flags,
    HELD: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    plans += row * FIELDS
    counts += row * tiles * BINS
    top_k = top_k_of(top_ks, row, vocab, flags)
    top_p = top_p_of(top_ps, row, flags)
    mode = tl.full((), UNFILTERED, tl.int32)
    if (tl.load(temperatures + row) >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0)):
        total = total_of(sums + row * tiles, tiles, CHUNK)
        tl.store(totals + row, total)
        bins = tl.arange(0, BINS)
        count = tl.zeros((BINS,), tl.int32)
        for start in range(0, tiles, CHUNK):
            count += tl.sum(_counts(counts, start, tiles, BINS, CHUNK), axis=0)
        upto = tl.cumsum(count)
        by_count = (top_k > 0) & (tl.sum(count) > top_k)
        first = tl.full((), 0, tl.int32)
        last = first
        if by_count:
            last = tl.sum((upto < top_k).to(tl.int32))
            first = last
        elif top_p < 1.0:
            first, last = _bins_of_top_p(count, bins, total, top_p, least_of(min_ps, row, flags), BINS)
        if by_count | (top_p < 1.0):
            everything = tl.sum(tl.where(bins == last, upto, 0))
            over = tl.sum(tl.where(bins < first, count, 0))
            whole = everything <= HELD
            first = tl.where(whole, 0, first)
            over = tl.where(whole, 0, over)
            found = everything - over
            mode = tl.where(whole, HELD_ALL, tl.where(found <= HELD, HELD_PART, NOT_HELD))
            tl.store(plans + START, first)
            tl.store(plans + LAST, last)
            tl.store(plans + FOUND, found)
            tl.store(plans + OVER, over)
            tl.store(plans + BY_COUNT, by_count.to(tl.int32))
            before = tl.full((), 0, tl.int32)
            for start in range(0, tiles, CHUNK):
                here = _counts(counts, start, tiles, BINS, CHUNK)
                here = tl.sum(tl.where(((bins >= first) & (bins <= last))[None, :], here, 0), axis=1)
                tile = start + tl.arange(0, CHUNK)
                tl.store(offsets + row * tiles + tile, before + tl.cumsum(here) - here, tile < tiles)
                before += tl.sum(here)
    tl.store(plans + MODE, mode)


@triton.jit
def _counts(counts, start, tiles, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """[CHUNK, BINS]: of the tiles from `start` on."""
    tile = start + tl.arange(0, CHUNK)
    return tl.load(counts + tile[:, None] * BINS + tl.arange(0, BINS)[None, :], (tile < tiles)[:, None], 0)


@triton.jit
def _bins_of_top_p(count, bins, total, top_p, least, BINS: tl.constexpr):
    """Between which bins the border lies. A token weighs something between what tokens at its bin's edges would, or
    nothing where min-p may leave it out; rounding down takes up to 1 away."""
    edge = bins.to(tl.float32) * (DEPTH / BINS)
    upper = tl.exp2(-edge + DEPTH) * (1.0 + _SLACK)
    lower = tl.exp2(-edge + (DEPTH - DEPTH / BINS)) * (1.0 - _SLACK)
    many = count.to(tl.float64)
    most = many * tl.where(upper >= least, upper, 0.0).to(tl.float64)
    fewest = many * tl.where(lower >= least, tl.maximum(lower - 1.0, 0.0), 0.0).to(tl.float64)
    needed = needed_of(total, top_p)
    spare = (total - needed).to(tl.float64)
    # With a bin and those before it there is enough, or with what lies after it there would be too much …
    enough = (tl.cumsum(fewest) >= needed.to(tl.float64)) | (tl.sum(most) - tl.cumsum(most) <= spare)
    last = tl.min(tl.where(enough, bins, BINS - 1))
    # … and there cannot be enough yet.
    short = (tl.cumsum(most) < needed.to(tl.float64)) | (tl.sum(fewest) - tl.cumsum(fewest) > spare)
    return tl.minimum(tl.sum(short.to(tl.int32)), last), last


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=UNALIGNED)
def gather(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, plans, offsets, sums, held, vocab, tiles, flags,
    HELD: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Puts ids and logits (their bits) into `held`; and into `sums`, what the bins before weigh."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    mode = tl.load(plans + row * FIELDS + MODE)
    if (mode == HELD_ALL) | (mode == HELD_PART):
        at = tile * TILE + tl.arange(0, TILE)
        value = tl.load(logits + row * vocab + at, at < vocab, float("-inf"))
        first = tl.load(plans + row * FIELDS + START)
        last = tl.load(plans + row * FIELDS + LAST)
        place = tl.load(offsets + row * tiles + tile) - 1
        peak = peak_of(peaks + row * tiles, tiles, CHUNK)
        power = power_of(value, peak, rate_of(tl.load(temperatures + row)))
        bin = tl.where(power >= -DEPTH, bin_of(power, BINS), BINS)
        inside = (bin >= first) & (bin <= last)
        if tl.sum(inside.to(tl.int32)) > 0:
            put = place + tl.cumsum(inside.to(tl.int32))
            held += row * (2 * HELD)
            tl.store(held + put, at, inside)
            tl.store(held + HELD + put, value.to(tl.int32, bitcast=True), inside)
        if mode == HELD_PART:
            weight = weight_of(share_of(power), least_of(min_ps, row, flags))
            tl.store(sums + row * tiles + tile, tl.sum(tl.where(bin < first, weight, 0)))
