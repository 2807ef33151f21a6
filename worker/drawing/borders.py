"""The border of top-k or top-p, among the tokens held or in the whole row; and the token, if all it may be is held."""

from __future__ import annotations

import triton
import triton.language as tl

from .books import UNALIGNED, least_of, peak_of, top_k_of, top_p_of, total_of
from .gathering import BY_COUNT, FIELDS, FOUND, HELD_ALL, HELD_PART, LAST, MODE, NOT_HELD, OVER, UNFILTERED
from .tokens import (
    DEPTH,
    LOWEST,
    NOTHING,
    key_of,
    needed_of,
    portion_of,
    power_of,
    random_of,
    rate_of,
    share_of,
    weight_at,
    weight_of,
)


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=UNALIGNED)
def find_border(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, seeds, sample_indices, positions, plans, sums, totals, held,
    tokens, borders, at_borders, vocab, tiles, flags,
    HELD: tl.constexpr, FEW: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    plans += row * FIELDS
    mode = tl.load(plans + MODE)
    border = tl.full((), LOWEST, tl.int32)
    left = row * 0
    if mode != UNFILTERED:
        logits += row * vocab
        held += row * (2 * HELD)
        found = tl.load(plans + FOUND)
        top_k = tl.load(plans + BY_COUNT) * top_k_of(top_ks, row, vocab, flags).to(tl.int64)
        top_p = top_p_of(top_ps, row, flags)
        peak = peak_of(peaks + row * tiles, tiles, CHUNK)
        rate = rate_of(tl.load(temperatures + row))
        least = least_of(min_ps, row, flags)
        total = tl.load(totals + row)
        random = random_of(seeds, sample_indices, positions, row)
        over_count = tl.load(plans + OVER).to(tl.int64)
        over_weight = row * 0
        if mode == HELD_PART:
            over_weight = total_of(sums + row * tiles, tiles, CHUNK)
        whole = mode == HELD_ALL
        wanted = row * 0
        if mode == NOT_HELD:
            border, left, wanted = _settle_row(
                logits, vocab, held, peak, rate, least, tl.load(plans + LAST), total, top_k, top_p, HELD, TILE, BINS
            )  # fmt: skip
        elif found <= FEW:
            border, left, wanted, token = _settle_held(
                held, found, whole, vocab, peak, rate, least, over_count, over_weight, total, top_k, top_p, random,
                FEW, HELD,
            )  # fmt: skip
            tl.store(tokens + row, token, whole)
        else:
            border, left, wanted, token = _settle_held(
                held, found, whole, vocab, peak, rate, least, over_count, over_weight, total, top_k, top_p, random,
                HELD, HELD,
            )  # fmt: skip
            tl.store(tokens + row, token, whole)
        if wanted > 0:
            border, above = _search(
                logits, vocab, held, peak, rate, least, border, key_of(peak) + 1, wanted, False, HELD, TILE
            )
            left = tl.cdiv(wanted - above, tl.maximum(weight_at(border, peak, rate, least), 1))
    tl.store(borders + row, border)
    tl.store(at_borders + row, left.to(tl.int32))


@triton.jit
def _settle_held(
    held, found, whole, vocab, peak, rate, least, over_count, over_weight, total, top_k, top_p, random,
    SIZE: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """From up to SIZE tokens held: the border; how many tokens at it are kept; 0, or the weight at and over top-p's
    border, which is to be looked for in the whole row from the border on; the token, if all that is kept is held.

    over_count, over_weight: of the tokens over those held. total: the row's weight. top_k 0: off."""
    place = tl.arange(0, SIZE)
    inside = place < found
    value = tl.load(held + HELD + place, inside, NOTHING).to(tl.float32, bitcast=True)
    key = key_of(value)
    weight = tl.where(inside, weight_of(share_of(power_of(value, peak, rate)), least), 0)
    border = tl.full((), LOWEST, tl.int32)
    left = total * 0
    each = left
    above = left
    wanted = left
    if top_k > 0:
        border, over = _halve(key, inside, inside.to(tl.int64), top_k - over_count)
        left = top_k - over_count - over
        above = over_weight + tl.sum(tl.where(key > border, weight, 0))
        each = weight_at(border, peak, rate, least)
        total = above + left * each
    if top_p < 1.0:
        needed = needed_of(total, top_p)
        if (top_k > 0) & (needed > above):
            left = tl.minimum(left, tl.cdiv(needed - above, tl.maximum(each, 1)))
        elif whole | (top_k == 0):
            border, over = _halve(key, inside, weight, needed - over_weight)
            above = over_weight + over
            each = weight_at(border, peak, rate, least)
            left = tl.cdiv(needed - above, tl.maximum(each, 1))
        else:
            wanted = needed
        total = above + left * each
    token = total * 0
    if whole:
        drawn = portion_of(total, random)
        equal = inside & (key == border)
        kept = (inside & (key > border)) | (equal & (tl.cumsum(equal.to(tl.int32)) <= left))
        reached = tl.cumsum(tl.where(kept, weight, 0))
        first = tl.sum((inside & (reached <= drawn)).to(tl.int32))
        token = tl.minimum(tl.load(held + first, first < found, 2147483647), vocab - 1).to(tl.int64)
    return border, left, wanted, token


@triton.jit
def _settle_row(
    logits, vocab, held, peak, rate, least, last, total, top_k, top_p,
    HELD: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """As `_settle_held`, in the whole row: so many tokens may be the border that none are held yet."""
    border = key_of(peak - (last + 2).to(tl.float32) * (DEPTH / BINS) / rate) - 1
    left = total * 0
    wanted = left
    above = left
    if top_k > 0:
        border, over = _search(
            logits, vocab, held, peak, rate, least, border, key_of(peak) + 1, top_k, True, HELD, TILE
        )
        left = top_k - over
    if top_p < 1.0:
        if top_k > 0:
            above = _over(logits, vocab, peak, rate, least, border, TILE)
            each = weight_at(border, peak, rate, least)
            wanted = needed_of(above + left * each, top_p)
            if wanted > above:
                left = tl.minimum(left, tl.cdiv(wanted - above, tl.maximum(each, 1)))
                wanted = wanted * 0
        else:
            wanted = needed_of(total, top_p)
    return border, left, wanted


@triton.jit
def _halve(key, inside, amount, needed):
    """The largest key at and over which there is what is needed of `amount`, and how much is over it."""
    lo = tl.min(tl.where(inside, key, 2147483647))
    hi = tl.maximum(tl.max(tl.where(inside, key, LOWEST)), lo) + 1
    over = needed * 0
    while hi.to(tl.int64) - lo > 1:
        middle = (lo + (hi.to(tl.int64) - lo >> 1)).to(tl.int32)
        there = tl.sum(tl.where(key >= middle, amount, 0))
        enough = there >= needed
        lo = tl.where(enough, middle, lo)
        hi = tl.where(enough, hi, middle)
        over = tl.where(enough, over, there)
    return lo, over


@triton.jit
def _search(
    logits, vocab, held, peak, rate, least, lo, hi, needed,
    COUNTING: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `_halve`, in the whole row, of counts or of weights: the border in [lo, hi). A pass over the row halves that,
    until its tokens can be held. Each also finds the keys next to the middle, so that many tokens of few different
    logits take few passes."""
    over = needed * 0
    most = tl.full((), 2147483647, tl.int32)  # tokens at and over lo
    fewest = tl.full((), 0, tl.int32)  # and at and over hi
    while (hi.to(tl.int64) - lo > 1) & (most - fewest > HELD):
        middle = (lo + (hi.to(tl.int64) - lo >> 1)).to(tl.int32)
        there = tl.zeros((TILE,), tl.int64)
        many = tl.zeros((TILE,), tl.int32)
        below = tl.full((TILE,), LOWEST, tl.int32)
        above = tl.full((TILE,), 2147483647, tl.int32)
        for start in range(0, vocab, TILE):
            at = start + tl.arange(0, TILE)
            value = tl.load(logits + at, at < vocab, float("-inf"))
            key = key_of(value)
            upper = (key >= middle) & (at < vocab)
            many += upper.to(tl.int32)
            if not COUNTING:
                there += tl.where(upper, weight_of(share_of(power_of(value, peak, rate)), least), 0)
            above = tl.minimum(above, tl.where(upper, key, 2147483647))
            below = tl.maximum(below, tl.where(upper, LOWEST, key))
        count = tl.sum(many)
        if COUNTING:
            amount = count.to(tl.int64)
        else:
            amount = tl.sum(there)
        enough = amount >= needed
        next_above = tl.min(above)
        next_below = tl.max(below)
        lo = tl.where(enough, tl.minimum(tl.maximum(next_above, middle), hi - 1), lo)
        hi = tl.where(enough, hi, tl.maximum(tl.minimum(next_below, middle - 1), lo) + 1)
        over = tl.where(enough, over, amount)
        most = tl.where(enough, count, most)
        fewest = tl.where(enough, fewest, count)
    if hi.to(tl.int64) - lo > 1:
        found = _hold(logits, vocab, held, lo, hi, HELD, TILE)
        place = tl.arange(0, HELD)
        inside = place < found
        value = tl.load(held + HELD + place, inside, NOTHING).to(tl.float32, bitcast=True)
        if COUNTING:
            amounts = inside.to(tl.int64)
        else:
            amounts = tl.where(inside, weight_of(share_of(power_of(value, peak, rate)), least), 0)
        lo, more = _halve(key_of(value), inside, amounts, needed - over)
        over += more
    return lo, over


@triton.jit
def _hold(logits, vocab, held, lo, hi, HELD: tl.constexpr, TILE: tl.constexpr):
    """Puts the logits (their bits) of a row's tokens whose keys lie in [lo, hi) into `held`, as `gather` does but for
    the ids. Returns how many there are."""
    count = tl.full((), 0, tl.int32)
    tl.debug_barrier()  # what was there has been read
    for start in range(0, vocab, TILE):
        at = start + tl.arange(0, TILE)
        value = tl.load(logits + at, at < vocab, float("-inf"))
        key = key_of(value)
        inside = (key >= lo) & (key < hi) & (at < vocab)
        place = count + tl.cumsum(inside.to(tl.int32)) - 1
        tl.store(held + HELD + place, value.to(tl.int32, bitcast=True), inside & (place < HELD))
        count += tl.sum(inside.to(tl.int32))
    tl.debug_barrier()
    return tl.minimum(count, HELD)


@triton.jit
def _over(logits, vocab, peak, rate, least, border, TILE: tl.constexpr):
    """What the tokens over a border weigh."""
    there = tl.zeros((TILE,), tl.int64)
    for start in range(0, vocab, TILE):
        at = start + tl.arange(0, TILE)
        value = tl.load(logits + at, at < vocab, float("-inf"))
        there += tl.where(key_of(value) > border, weight_of(share_of(power_of(value, peak, rate)), least), 0)
    return tl.sum(there)
