"""The token of a row: that of its largest logit if it is greedy, else where its kept weights reach a random number."""

from __future__ import annotations

import triton
import triton.language as tl

from .books import GREEDY_BELOW, UNALIGNED, least_of, peak_of, total_of
from .gathering import FIELDS, HELD_ALL, MODE, UNFILTERED
from .tokens import LOWEST, key_of, portion_of, power_of, random_of, rate_of, share_of, weight_at, weight_of


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=UNALIGNED)
def choose(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, seeds, sample_indices, positions, plans, sums, equals,
    tokens, borders, at_borders, vocab, tiles, flags,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    peaks += row * tiles
    sums += row * tiles
    equals += row * tiles
    filters = (flags >> 1) != 0
    mode = tl.load(plans + row * FIELDS + MODE, filters, UNFILTERED)
    peak = peak_of(peaks, tiles, CHUNK)
    temperature = tl.load(temperatures + row)
    lanes = tl.arange(0, TILE)
    if filters == 0:
        tl.store(borders + row, LOWEST)
        tl.store(at_borders + row, 0)
    if temperature < GREEDY_BELOW:
        tile = tiles
        for start in range(0, tiles, CHUNK):
            at = start + tl.arange(0, CHUNK)
            value = tl.load(peaks + at, at < tiles, float("-inf"))
            tile = tl.minimum(tile, tl.min(tl.where((value == peak) & (at < tiles), at, tiles)))
        at = tile * TILE + lanes
        value = tl.load(logits + at, at < vocab, float("-inf"))
        token = tl.min(tl.where((value == peak) & (at < vocab), at, vocab - 1))
        tl.store(tokens + row, token.to(tl.int64))
    elif mode != HELD_ALL:
        rate = rate_of(temperature)
        least = least_of(min_ps, row, flags)
        border = tl.full((), LOWEST, tl.int32)
        left = row * 0
        each = left
        if mode != UNFILTERED:
            border = tl.load(borders + row)
            left = tl.load(at_borders + row).to(tl.int64)
            each = weight_at(border, peak, rate, least)
            total = total_of(sums, tiles, CHUNK) + left * each
        else:
            total = total_of(sums, tiles, CHUNK)
        drawn = portion_of(total, random_of(seeds, sample_indices, positions, row))
        tile, reached, equals_before = _tile_of(sums, equals, tiles, mode != UNFILTERED, left, each, drawn, CHUNK)
        at = tile * TILE + lanes
        value = tl.load(logits + at, at < vocab, float("-inf"))
        weight = weight_of(share_of(power_of(value, peak, rate)), least)
        key = key_of(value)
        equal = (key == border) & (at < vocab)
        kept = (key > border) | (equal & (equals_before + tl.cumsum(equal.to(tl.int32)) <= left))
        reached += tl.cumsum(tl.where(kept, weight, 0))
        token = tile * TILE + tl.sum(((at < vocab) & (reached <= drawn)).to(tl.int32))
        tl.store(tokens + row, tl.minimum(token, vocab - 1).to(tl.int64))  # beyond only if nothing weighs anything


@triton.jit
def _tile_of(sums, equals, tiles, filtered, left, each, drawn, CHUNK: tl.constexpr):
    """The first tile with whose weight the sum of those before it is over `drawn`; that sum, and how many tokens at the
    border lie before it. The last tile, if there is none."""
    found = tiles - 1
    reached = drawn * 0
    equals_before = drawn * 0
    reached_there = reached
    equals_there = reached
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        equal = tl.load(equals + tile, (tile < tiles) & filtered, 0).to(tl.int64)
        before = equals_before + tl.cumsum(equal) - equal
        taken = tl.minimum(tl.maximum(left - before, 0), equal)
        amount = tl.load(sums + tile, tile < tiles, 0) + taken * each
        upto = reached + tl.cumsum(amount)
        here = (upto > drawn) & (upto - amount <= drawn)
        some = tl.sum(here.to(tl.int32)) > 0
        found = tl.where(some, tl.sum(tl.where(here, tile, 0)), found)
        reached_there = tl.where(some, tl.sum(tl.where(here, upto - amount, 0)), reached_there)
        equals_there = tl.where(some, tl.sum(tl.where(here, before, 0)), equals_there)
        reached += tl.sum(amount)
        equals_before += tl.sum(equal)
    return found, reached_there, equals_there
