# Triton reads a kernel's annotations: it takes none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A token for each row, drawn by one kernel: the same token as `sampler.py` draws in plain torch, for CUDA.

A program takes one row. It looks for the border of top-k, then for that of top-p in what is left:

1. From the row's largest logit and 25 below (lower ones weigh nothing) a pass over the row counts and weighs what lies
   at or above each of eight keys, which cuts the range that holds the border to an eighth. That goes on until few
   tokens are left in it.
2. These few are gathered, in the order of their ids, and the border is found among them without the row.
3. The token is found among those gathered, if all that is kept is there, else by one more pass.

Counts and weights are whole numbers and added up as one: a sum's low 40 bits are the weight, the others the count. So
no order of additions can change a result, and nothing depends on the batch. A row without top-k and top-p takes neither
1 nor 2 and does not read its logits.

Imported only where it runs; Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_HELD: int = 2048
"""Tokens that are gathered at most."""
_TILE: int = 2048
"""Tokens that a program looks at at a time. With this and 16 warps, 128 registers a thread suffice."""
_WARPS: int = 16
_ONE = tl.constexpr(1 << 40)
"""One token, in a sum of counts and weights."""
_WEIGHT = tl.constexpr((1 << 40) - 1)
"""The weight's part of such a sum: a row's probabilities are 2 ** 36, nearly."""
_LOWEST = tl.constexpr(-(2**31))


class Drawn(NamedTuple):
    """Of N rows, on the device. A row keeps the tokens whose `ordered_bits` are over its border, and of those at it as
    many as `at_border` says, the lowest ids; of these, what weighs nothing is never drawn."""

    tokens: Tensor
    """[N] int64; 0 for rows that are greedy."""
    border: Tensor
    """[N] int32."""
    at_border: Tensor
    """[N] int32."""


def draw(
    logits: Tensor,
    probabilities: Tensor,
    greedy: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor | None,
    random: Tensor,
) -> Drawn:
    """Draws from float32 logits [N, vocab] and their softmax, both contiguous; vocab up to 2 ** 20.

    greedy bool [N]: rows to leave alone; top_k int32 [N] (0: all), top_p float32 [N], min_p float32 [N], random int64
    [N]: 24 bits. Launches one kernel, whose compiled form depends on the vocabulary alone; does not wait.
    """
    rows, vocab = logits.shape
    device = logits.device
    out = Drawn(
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
    )
    held = torch.empty((rows, 3, _HELD), dtype=torch.int32, device=device)
    _draw[(rows,)](
        logits, probabilities, greedy, top_k, top_p, top_p if min_p is None else min_p, random, *out, held,
        vocab, int(min_p is not None),
        HELD=_HELD, TILE=_TILE, num_warps=_WARPS,
    )  # fmt: skip
    return out


@triton.jit(  # or some step would wait for a compiler
    do_not_specialize=["uses_min_p"],
    do_not_specialize_on_alignment=[
        "greedy",
        "top_ks",
        "top_ps",
        "min_ps",
        "random",
        "tokens",
        "borders",
        "at_borders",
    ],
)
def _draw(
    logits, probabilities, greedy, top_ks, top_ps, min_ps, random, tokens, borders, at_borders, held, vocab, uses_min_p,
    HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    probabilities += row * vocab
    held += row * (3 * HELD)
    token = row * 0
    border = tl.full((), _LOWEST, tl.int32)
    left = row * 0
    if tl.load(greedy + row) == 0:
        top_k = tl.load(top_ks + row).to(tl.int64)
        top_p = tl.load(top_ps + row)
        by_count = (top_k > 0) & (top_k < vocab)
        filtered = by_count | (top_p < 1.0)
        min_p = tl.load(min_ps + row, uses_min_p != 0, 0.0)
        least = _largest(probabilities, tl.where(min_p > 0.0, vocab, 0), 0.0, TILE) * min_p
        total = _weigh(probabilities, least, tl.where(filtered, 0, vocab), TILE)
        count = 0  # of the tokens in `held`, when all that is kept is there
        each = row * 0  # what a token at the border weighs
        if filtered:
            largest = _largest(logits, vocab, float("-inf"), TILE)
            end = _key(largest) + 1
            border = _key(largest - 25.0) - 1
            above = row * 0
            if by_count:
                border, above, equal, _, count = _find(
                    logits, probabilities, held, vocab, least, border + 1, end, above, top_k, top_p, 40, True, count,
                    HELD, TILE,
                )  # fmt: skip
                left = tl.minimum(top_k - (above >> 40), equal >> 40)
                each = (equal & _WEIGHT) // tl.maximum(equal >> 40, 1)
                total = (above & _WEIGHT) + left * each
            if top_p < 1.0:
                needed = _needed(total, top_p)
                lacking = needed - (above & _WEIGHT)
                if by_count & (lacking > 0):
                    left = tl.minimum(left, tl.cdiv(lacking, tl.maximum(each, 1)))
                else:
                    border, above, equal, needed, count = _find(
                        logits, probabilities, held, vocab, least, border + 1, end, above, needed, top_p, 0,
                        by_count == 0, count, HELD, TILE,
                    )  # fmt: skip
                    each = (equal & _WEIGHT) // tl.maximum(equal >> 40, 1)
                    lacking = needed - (above & _WEIGHT)
                    left = tl.minimum(tl.cdiv(lacking, tl.maximum(each, 1)), equal >> 40)
            total = (above & _WEIGHT) + left * each
        drawn = (total * tl.load(random + row)) >> 24
        if count > 0:
            token = _choose_held(held, count, least, border, left, drawn, HELD)
        else:
            token = _choose(logits, probabilities, vocab, least, border, left, each, drawn, filtered, TILE)
        token = tl.minimum(token, vocab - 1)  # only NaN logits get there
    tl.store(tokens + row, token)
    tl.store(borders + row, border)
    tl.store(at_borders + row, left.to(tl.int32))


@triton.jit
def _find(
    logits, probabilities, held, vocab, least, lo, hi, at_lo, needed, top_p, shift, fresh, count,
    HELD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The border in [lo, hi), where at and over lo there are `at_lo` and at and over hi there is nothing: the largest
    key at and over which there is what is needed, of counts (shift 40) or of weights (shift 0). fresh: at_lo is not
    known yet, nor is what is needed, of weights.

    Returns the border, what is over it, what is at it, what is needed, and how many tokens are held if those held are
    all that the first lo let in (else 0). `count`: as returned before, for a lower lo. If exactly what is needed is
    over some key, that is a border as well, at which nothing is needed: that ends the search early.
    """
    end = hi
    above = at_lo * 0
    passes = 0
    searching = count == 0
    while searching:
        lo, hi, at_lo, above, needed = _split(
            logits, probabilities, vocab, least, lo, hi, at_lo, above, needed, top_p, shift, fresh & (passes == 0),
            passes < 4, TILE,
        )  # fmt: skip
        passes += 1
        few = (at_lo - above) >> 40 <= HELD
        searching = (_amount(at_lo, shift) > needed) & (hi.to(tl.int64) - lo > 1) & (few == 0)
    if (_amount(at_lo, shift) > needed) & (hi.to(tl.int64) - lo > 1):
        if count > 0:
            found = count
        else:
            whole = at_lo >> 40 <= HELD
            hi = tl.where(whole, end, hi)
            above = tl.where(whole, 0, above)
            found = ((at_lo - above) >> 40).to(tl.int32)
            count = tl.where(whole, found, 0)
            _gather(logits, probabilities, held, vocab, lo, hi, HELD, TILE)
        lo, at_lo, above = _halve(held, found, least, lo, hi, at_lo, above, needed, shift, HELD)
    exact = _amount(at_lo, shift) <= needed
    return tl.where(exact, lo - 1, lo), tl.where(exact, at_lo, above), tl.where(exact, 0, at_lo - above), needed, count


@triton.jit
def _split(
    logits, probabilities, vocab, least, lo, hi, at_lo, above, needed, top_p, shift, fresh, by_value,
    TILE: tl.constexpr,
):  # fmt: skip
    """One pass: [lo, hi) shrinks to the eighth that holds the border. Eighths are of values, which lie more evenly than
    keys; or of keys, which come to an end."""
    t1 = _between(lo, hi, 1, by_value)
    t2 = _between(lo, hi, 2, by_value)
    t3 = _between(lo, hi, 3, by_value)
    t4 = _between(lo, hi, 4, by_value)
    t5 = _between(lo, hi, 5, by_value)
    t6 = _between(lo, hi, 6, by_value)
    t7 = _between(lo, hi, 7, by_value)
    s0 = tl.zeros((TILE,), tl.int64)
    s1 = tl.zeros((TILE,), tl.int64)
    s2 = tl.zeros((TILE,), tl.int64)
    s3 = tl.zeros((TILE,), tl.int64)
    s4 = tl.zeros((TILE,), tl.int64)
    s5 = tl.zeros((TILE,), tl.int64)
    s6 = tl.zeros((TILE,), tl.int64)
    s7 = tl.zeros((TILE,), tl.int64)
    for start in tl.range(0, vocab, TILE, num_stages=3):
        at = start + tl.arange(0, TILE)
        key = _key(tl.load(logits + at, at < vocab, float("-inf")))
        inside = (key >= lo) & (key < hi) & (at < vocab)
        one = tl.where(inside, _weight(tl.load(probabilities + at, inside, 0.0), least) + _ONE, 0)
        s0 += one
        s1 += tl.where(key >= t1, one, 0)
        s2 += tl.where(key >= t2, one, 0)
        s3 += tl.where(key >= t3, one, 0)
        s4 += tl.where(key >= t4, one, 0)
        s5 += tl.where(key >= t5, one, 0)
        s6 += tl.where(key >= t6, one, 0)
        s7 += tl.where(key >= t7, one, 0)
    from_lo = above + tl.sum(s0)
    at_lo = tl.where(fresh, from_lo, at_lo)
    needed = tl.where(fresh & (shift == 0), _needed(at_lo & _WEIGHT, top_p), needed)
    over = above
    lo, hi, at_lo, above = _shrink(t1, over + tl.sum(s1), lo, hi, at_lo, above, needed, shift)
    lo, hi, at_lo, above = _shrink(t2, over + tl.sum(s2), lo, hi, at_lo, above, needed, shift)
    lo, hi, at_lo, above = _shrink(t3, over + tl.sum(s3), lo, hi, at_lo, above, needed, shift)
    lo, hi, at_lo, above = _shrink(t4, over + tl.sum(s4), lo, hi, at_lo, above, needed, shift)
    lo, hi, at_lo, above = _shrink(t5, over + tl.sum(s5), lo, hi, at_lo, above, needed, shift)
    lo, hi, at_lo, above = _shrink(t6, over + tl.sum(s6), lo, hi, at_lo, above, needed, shift)
    lo, hi, at_lo, above = _shrink(t7, over + tl.sum(s7), lo, hi, at_lo, above, needed, shift)
    return lo, hi, at_lo, above, needed


@triton.jit
def _shrink(key, at_key, lo, hi, at_lo, above, needed, shift):
    """The range after what is at and over `key` has been added up."""
    enough = _amount(at_key, shift) >= needed
    raises = enough & (key > lo)
    lowers = (enough == 0) & (key < hi)
    return (
        tl.where(raises, key, lo),
        tl.where(lowers, key, hi),
        tl.where(raises, at_key, at_lo),
        tl.where(lowers, at_key, above),
    )


@triton.jit
def _between(lo, hi, eighths, by_value):
    """A key within [lo, hi), over lo if there is one."""
    low, high = _value(lo), _value(hi)
    of_values = _key(low + (high - low) * (eighths * 0.125))
    of_keys = (lo + ((hi.to(tl.int64) - lo) * eighths >> 3)).to(tl.int32)
    key = tl.where(by_value, of_values, of_keys)
    return tl.maximum(tl.minimum(key, hi - 1), tl.minimum(lo + 1, hi - 1))


@triton.jit
def _gather(logits, probabilities, held, vocab, lo, hi, HELD: tl.constexpr, TILE: tl.constexpr):
    """Puts ids, keys and probabilities (their bits) of the tokens in [lo, hi) into `held`, by id."""
    count = 0
    tl.debug_barrier()  # what was there has been read
    for start in tl.range(0, vocab, TILE, num_stages=3):
        at = start + tl.arange(0, TILE)
        key = _key(tl.load(logits + at, at < vocab, float("-inf")))
        inside = (key >= lo) & (key < hi) & (at < vocab)
        here = tl.sum(inside.to(tl.int32))
        if here > 0:
            place = count + tl.cumsum(inside.to(tl.int32)) - 1
            inside = inside & (place < HELD)
            probability = tl.load(probabilities + at, inside, 0.0)
            tl.store(held + place, at, inside)
            tl.store(held + HELD + place, key, inside)
            tl.store(held + 2 * HELD + place, probability.to(tl.int32, bitcast=True), inside)
        count += here
    tl.debug_barrier()


@triton.jit
def _halve(held, found, least, lo, hi, at_lo, above, needed, shift, HELD: tl.constexpr):
    """As `_split`, among those held, until the range is one key or exactly what is needed is over its lower end."""
    place = tl.arange(0, HELD)
    key = tl.load(held + HELD + place, place < found, 0)
    weight = _weight(tl.load(held + 2 * HELD + place, place < found, 0).to(tl.float32, bitcast=True), least)
    one = tl.where((place < found) & (key >= lo) & (key < hi), weight + _ONE, 0)
    over = above
    while (hi.to(tl.int64) - lo > 1) & (_amount(at_lo, shift) > needed):
        middle = (lo + (hi.to(tl.int64) - lo >> 1)).to(tl.int32)
        at_middle = over + tl.sum(tl.where(key >= middle, one, 0))
        lo, hi, at_lo, above = _shrink(middle, at_middle, lo, hi, at_lo, above, needed, shift)
    return lo, at_lo, above


@triton.jit
def _choose_held(held, count, least, border, left, drawn, HELD: tl.constexpr):
    """The first token with whose weight the sum of those before it is over `drawn`."""
    place = tl.arange(0, HELD)
    inside = place < count
    key = tl.load(held + HELD + place, inside, 0)
    weight = _weight(tl.load(held + 2 * HELD + place, inside, 0).to(tl.float32, bitcast=True), least)
    equal = inside & (key == border)
    kept = (inside & (key > border)) | (equal & (tl.cumsum(equal.to(tl.int32)) <= left))
    reached = tl.cumsum(tl.where(kept, weight, 0))
    first = tl.sum((inside & (reached <= drawn)).to(tl.int32))
    return tl.load(held + first, first < count, 2147483647).to(tl.int64)


@triton.jit
def _choose(logits, probabilities, vocab, least, border, left, each, drawn, filtered, TILE: tl.constexpr):
    """As `_choose_held`, in the whole row; without filters its logits are not read. vocab, if there is none."""
    reached = drawn * 0
    equals = drawn * 0
    tile = vocab
    reached_before = drawn * 0
    equals_before = drawn * 0
    for start in tl.range(0, vocab, TILE, num_stages=3):
        at = start + tl.arange(0, TILE)
        over, equal = _kept(logits, at, vocab, border, filtered)
        weight = _weight(tl.load(probabilities + at, over, 0.0), least)
        both = tl.sum(tl.where(over, weight, 0) + tl.where(equal, _ONE, 0))
        taken = tl.minimum(both >> 40, left - equals)
        after = reached + (both & _WEIGHT) + taken * each
        here = (reached <= drawn) & (after > drawn)
        tile = tl.where(here, start, tile)
        reached_before = tl.where(here, reached, reached_before)
        equals_before = tl.where(here, equals, equals_before)
        reached = after
        equals += taken
    at = tile + tl.arange(0, TILE)
    over, equal = _kept(logits, at, vocab, border, filtered)
    kept = over | (equal & (equals_before + tl.cumsum(equal.to(tl.int32)) <= left))
    weight = _weight(tl.load(probabilities + at, kept, 0.0), least)
    sums = reached_before + tl.cumsum(tl.where(kept, weight, 0))
    return (tile + tl.sum(((at < vocab) & (sums <= drawn)).to(tl.int32))).to(tl.int64)


@triton.jit
def _kept(logits, at, vocab, border, filtered):
    """Which tokens are over the border, and which are at it."""
    inside = at < vocab
    key = _key(tl.load(logits + at, inside & filtered, 0.0))  # without filters, all are over the lowest border
    return inside & (key > border), inside & (key == border)


@triton.jit
def _largest(values, count, least, TILE: tl.constexpr):
    """Of the first `count`, and `least`."""
    most = tl.full((TILE,), least, tl.float32)
    for start in tl.range(0, count, TILE, num_stages=3):
        at = start + tl.arange(0, TILE)
        most = tl.maximum(most, tl.load(values + at, at < count, least))
    return tl.max(most)


@triton.jit
def _weigh(probabilities, least, count, TILE: tl.constexpr):
    """The sum of the first `count` weights."""
    total = tl.zeros((TILE,), tl.int64)
    for start in tl.range(0, count, TILE, num_stages=3):
        at = start + tl.arange(0, TILE)
        total += _weight(tl.load(probabilities + at, at < count, 0.0), least)
    return tl.sum(total)


@triton.jit
def _weight(probability, least):
    """`sampler.WEIGHT_BITS`; 0 for what min-p leaves out, and for NaN."""
    return tl.where(probability >= least, probability * 68719476736.0, 0.0).to(tl.int64)


@triton.jit
def _needed(total, top_p):
    """`sampler._needed`, for top_p below 1."""
    share = top_p.to(tl.float64) * (1.0 - 2.0**-20)
    return tl.maximum(tl.ceil(total.to(tl.float64) * share).to(tl.int64), 1)


@triton.jit
def _amount(both, shift):
    """The count (shift 40) or the weight (shift 0) of a sum of both."""
    return (both >> shift) & _WEIGHT


@triton.jit
def _key(value):
    """`sampler.ordered_bits`."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
