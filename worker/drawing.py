# Triton reads a kernel's annotations: it takes none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A token for each row, drawn by kernels: the same token as `sampler.sample` draws in plain torch, for CUDA.

Rows are cut into tiles, and most kernels give a tile to a program, so that the whole device works on however few rows.
What a kernel needs of other tiles an earlier one has left in memory: nothing waits for another program.

1. `_peaks`: the largest logit of each tile.
2. `_weigh`: how much each tile weighs. Of rows with top-k or top-p also how many of its tokens lie in each of `_BINS`
   bins, by how far their logits are below the row's largest.
3. `_decide`, a row to a program: in which bins the border lies. Counts tell for top-k; for top-p they bound what a
   bin weighs.
4. `_gather`: the tokens down to there, in the order of their ids.
5. `_border`, a row to a program: the border among those gathered, and the token, for all that is kept is there.
6. `_keep`: what each tile's kept tokens weigh, for the few rows that keep too many for that.
7. `_choose`, a row to a program: the tile that holds the token, and the token in it.

Without top-k and top-p only the first two and the last run. Counts and weights are whole numbers, so no order of
additions can change a result, and nothing depends on the batch.

Imported only where it runs; Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sampler

if TYPE_CHECKING:
    from .sampler import SamplingColumns

_TILE: int = 4096
"""Tokens of a tile."""
_HELD: int = 8192
"""Tokens that are gathered at most."""
_FEW: int = 1024
"""Up to so many of them are looked at by shorter code."""
_BINS: int = 128
_CHUNK: int = 32
"""Tiles whose books a program looks at at a time."""

_LOWEST = tl.constexpr(-(2**31))
_NOTHING = tl.constexpr(-(2**23))
"""The bits of -inf."""
_DEPTH = tl.constexpr(float(sampler.WEIGHT_BITS))
"""Tokens whose share is below 2 ** -_DEPTH weigh nothing."""
_WHOLE = tl.constexpr(2.0**sampler.WEIGHT_BITS)
_GREEDY_BELOW = tl.constexpr(sampler.GREEDY_BELOW)
_LOG2_E = tl.constexpr(sampler.LOG2_E)
_LEAST_POWER = tl.constexpr(sampler.LEAST_POWER)
_EXPONENT = tl.constexpr(127 + sampler.WEIGHT_BITS)
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (tl.constexpr(coefficient) for coefficient in sampler.POWERS)
_SLACK = tl.constexpr(1e-5)
"""By how much, relatively, the share of a token may lie outside of what its bin's edges say: rounding."""

# What is known of a row, of which `plans` has _FIELDS.
_FIELDS = tl.constexpr(8)
_MODE = tl.constexpr(0)
_START = tl.constexpr(1)
"""The first bin that is gathered …"""
_LAST = tl.constexpr(2)
"""… and the last, which may hold the border."""
_FOUND = tl.constexpr(3)
"""How many tokens these bins hold."""
_OVER = tl.constexpr(4)
"""How many tokens lie in the bins before."""
_BY_COUNT = tl.constexpr(5)
"""top-k leaves something out."""

_UNFILTERED = tl.constexpr(0)
_HELD_ALL = tl.constexpr(1)
"""All that may be kept is gathered."""
_HELD_PART = tl.constexpr(2)
"""All that may be the border is gathered."""
_NOT_HELD = tl.constexpr(3)
"""Too much for that."""


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
    plans, equals = empty(rows, _FIELDS.value), empty(rows, tiles)
    filters = columns.any_top_k or columns.any_top_p
    counts = empty(rows, tiles, _BINS) if filters else equals
    min_p = columns.top_p if columns.min_p is None else columns.min_p
    given = tuple(one.contiguous() for one in (columns.temperature, columns.top_k, columns.top_p, min_p))
    flags = int(columns.min_p is not None) | int(columns.any_top_k) << 1 | int(columns.any_top_p) << 2
    counters = tuple(one.contiguous() for one in (columns.seed, columns.sample_index, columns.position))
    of_tiles, of_rows = (rows, tiles), (rows,)
    _peaks[of_tiles](logits, peaks, vocab, tiles, TILE=_TILE, num_warps=8)
    _weigh[of_tiles](
        logits, peaks, *given, sums, counts, vocab, tiles, flags,
        TILE=_TILE, BINS=_BINS, CHUNK=_CHUNK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    if filters:
        offsets, totals, held = empty(rows, tiles), empty(rows, dtype=torch.int64), empty(rows, 2, _HELD)
        _decide[of_rows](
            *given, sums, counts, plans, offsets, totals, vocab, tiles, flags,
            HELD=_HELD, BINS=_BINS, CHUNK=_CHUNK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _gather[of_tiles](
            logits, peaks, *given, plans, offsets, sums, held, vocab, tiles, flags,
            HELD=_HELD, TILE=_TILE, BINS=_BINS, CHUNK=_CHUNK, num_warps=16, maxnreg=64, enable_fp_fusion=False,
        )  # fmt: skip
        _border[of_rows](
            logits, peaks, *given, *counters, plans, sums, totals, held, *out, vocab, tiles, flags,
            HELD=_HELD, FEW=_FEW, TILE=_TILE, BINS=_BINS, CHUNK=_CHUNK, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
        _keep[of_tiles](
            logits, peaks, *given, plans, out.border, sums, equals, vocab, tiles, flags,
            TILE=_TILE, CHUNK=_CHUNK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    _choose[of_rows](
        logits, peaks, *given, *counters, plans, sums, equals, *out, vocab, tiles, flags,
        TILE=_TILE, CHUNK=_CHUNK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out


_UNALIGNED: list[str] = ["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "sample_indices", "positions"]
"""Columns, which lie anywhere: or some step would wait for a compiler."""


@triton.jit(do_not_specialize=["tiles"])
def _peaks(logits, peaks, vocab, tiles, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row * vocab + at, at < vocab, float("-inf"))
    tl.store(peaks + row * tiles + tile, tl.max(value))


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=_UNALIGNED)
def _weigh(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, sums, counts, vocab, tiles, flags,
    TILE: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature >= _GREEDY_BELOW:
        at = tile * TILE + tl.arange(0, TILE)
        value = tl.load(logits + row * vocab + at, at < vocab, float("-inf"))
        peak = _peak(peaks + row * tiles, tiles, CHUNK)
        power = _power(value, peak, _rate(temperature))
        weight = _weight(_share(power), _least(min_ps, row, flags))
        tl.store(sums + row * tiles + tile, tl.sum(weight))
        if (_top_k(top_ks, row, vocab, flags) > 0) | (_top_p(top_ps, row, flags) < 1.0):
            found = tl.histogram(_bin(power, BINS), BINS, power >= -_DEPTH)
            tl.store(counts + (row * tiles + tile) * BINS + tl.arange(0, BINS), found)


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=_UNALIGNED)
def _decide(
    temperatures, top_ks, top_ps, min_ps, sums, counts, plans, offsets, totals, vocab, tiles, flags,
    HELD: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    plans += row * _FIELDS
    counts += row * tiles * BINS
    top_k = _top_k(top_ks, row, vocab, flags)
    top_p = _top_p(top_ps, row, flags)
    mode = tl.full((), _UNFILTERED, tl.int32)
    if (tl.load(temperatures + row) >= _GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0)):
        total = _total(sums + row * tiles, tiles, CHUNK)
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
            first, last = _bins_of_top_p(count, bins, total, top_p, _least(min_ps, row, flags), BINS)
        if by_count | (top_p < 1.0):
            everything = tl.sum(tl.where(bins == last, upto, 0))
            over = tl.sum(tl.where(bins < first, count, 0))
            whole = everything <= HELD
            first = tl.where(whole, 0, first)
            over = tl.where(whole, 0, over)
            found = everything - over
            mode = tl.where(whole, _HELD_ALL, tl.where(found <= HELD, _HELD_PART, _NOT_HELD))
            tl.store(plans + _START, first)
            tl.store(plans + _LAST, last)
            tl.store(plans + _FOUND, found)
            tl.store(plans + _OVER, over)
            tl.store(plans + _BY_COUNT, by_count.to(tl.int32))
            before = tl.full((), 0, tl.int32)
            for start in range(0, tiles, CHUNK):
                here = _counts(counts, start, tiles, BINS, CHUNK)
                here = tl.sum(tl.where(((bins >= first) & (bins <= last))[None, :], here, 0), axis=1)
                tile = start + tl.arange(0, CHUNK)
                tl.store(offsets + row * tiles + tile, before + tl.cumsum(here) - here, tile < tiles)
                before += tl.sum(here)
    tl.store(plans + _MODE, mode)


@triton.jit
def _counts(counts, start, tiles, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """[CHUNK, BINS]: of the tiles from `start` on."""
    tile = start + tl.arange(0, CHUNK)
    return tl.load(counts + tile[:, None] * BINS + tl.arange(0, BINS)[None, :], (tile < tiles)[:, None], 0)


@triton.jit
def _bins_of_top_p(count, bins, total, top_p, least, BINS: tl.constexpr):
    """Between which bins the border lies. A token weighs something between what tokens at its bin's edges would, or
    nothing where min-p may leave it out; rounding down takes up to 1 away."""
    edge = bins.to(tl.float32) * (_DEPTH / BINS)
    upper = tl.exp2(-edge + _DEPTH) * (1.0 + _SLACK)
    lower = tl.exp2(-edge + (_DEPTH - _DEPTH / BINS)) * (1.0 - _SLACK)
    many = count.to(tl.float64)
    most = many * tl.where(upper >= least, upper, 0.0).to(tl.float64)
    fewest = many * tl.where(lower >= least, tl.maximum(lower - 1.0, 0.0), 0.0).to(tl.float64)
    needed = _needed(total, top_p)
    spare = (total - needed).to(tl.float64)
    # With a bin and those before it there is enough, or with what lies after it there would be too much …
    enough = (tl.cumsum(fewest) >= needed.to(tl.float64)) | (tl.sum(most) - tl.cumsum(most) <= spare)
    last = tl.min(tl.where(enough, bins, BINS - 1))
    # … and there cannot be enough yet.
    short = (tl.cumsum(most) < needed.to(tl.float64)) | (tl.sum(fewest) - tl.cumsum(fewest) > spare)
    return tl.minimum(tl.sum(short.to(tl.int32)), last), last


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=_UNALIGNED)
def _gather(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, plans, offsets, sums, held, vocab, tiles, flags,
    HELD: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Puts ids and logits (their bits) into `held`; and into `sums`, what the bins before weigh."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    mode = tl.load(plans + row * _FIELDS + _MODE)
    if (mode == _HELD_ALL) | (mode == _HELD_PART):
        at = tile * TILE + tl.arange(0, TILE)
        value = tl.load(logits + row * vocab + at, at < vocab, float("-inf"))
        first = tl.load(plans + row * _FIELDS + _START)
        last = tl.load(plans + row * _FIELDS + _LAST)
        place = tl.load(offsets + row * tiles + tile) - 1
        peak = _peak(peaks + row * tiles, tiles, CHUNK)
        power = _power(value, peak, _rate(tl.load(temperatures + row)))
        bin = tl.where(power >= -_DEPTH, _bin(power, BINS), BINS)
        inside = (bin >= first) & (bin <= last)
        if tl.sum(inside.to(tl.int32)) > 0:
            put = place + tl.cumsum(inside.to(tl.int32))
            held += row * (2 * HELD)
            tl.store(held + put, at, inside)
            tl.store(held + HELD + put, value.to(tl.int32, bitcast=True), inside)
        if mode == _HELD_PART:
            weight = _weight(_share(power), _least(min_ps, row, flags))
            tl.store(sums + row * tiles + tile, tl.sum(tl.where(bin < first, weight, 0)))


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=_UNALIGNED)
def _border(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, seeds, sample_indices, positions, plans, sums, totals, held,
    tokens, borders, at_borders, vocab, tiles, flags,
    HELD: tl.constexpr, FEW: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    plans += row * _FIELDS
    mode = tl.load(plans + _MODE)
    border = tl.full((), _LOWEST, tl.int32)
    left = row * 0
    if mode != _UNFILTERED:
        logits += row * vocab
        held += row * (2 * HELD)
        found = tl.load(plans + _FOUND)
        top_k = tl.load(plans + _BY_COUNT) * _top_k(top_ks, row, vocab, flags).to(tl.int64)
        top_p = _top_p(top_ps, row, flags)
        peak = _peak(peaks + row * tiles, tiles, CHUNK)
        rate = _rate(tl.load(temperatures + row))
        least = _least(min_ps, row, flags)
        total = tl.load(totals + row)
        random = _random(seeds, sample_indices, positions, row)
        over_count = tl.load(plans + _OVER).to(tl.int64)
        over_weight = row * 0
        if mode == _HELD_PART:
            over_weight = _total(sums + row * tiles, tiles, CHUNK)
        whole = mode == _HELD_ALL
        wanted = row * 0
        if mode == _NOT_HELD:
            border, left, wanted = _settle_row(
                logits, vocab, held, peak, rate, least, tl.load(plans + _LAST), total, top_k, top_p, HELD, TILE, BINS
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
                logits, vocab, held, peak, rate, least, border, _key(peak) + 1, wanted, False, HELD, TILE
            )
            left = tl.cdiv(wanted - above, tl.maximum(_weight_of(border, peak, rate, least), 1))
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
    value = tl.load(held + HELD + place, inside, _NOTHING).to(tl.float32, bitcast=True)
    key = _key(value)
    weight = tl.where(inside, _weight(_share(_power(value, peak, rate)), least), 0)
    border = tl.full((), _LOWEST, tl.int32)
    left = total * 0
    each = left
    above = left
    wanted = left
    if top_k > 0:
        border, over = _halve(key, inside, inside.to(tl.int64), top_k - over_count)
        left = top_k - over_count - over
        above = over_weight + tl.sum(tl.where(key > border, weight, 0))
        each = _weight_of(border, peak, rate, least)
        total = above + left * each
    if top_p < 1.0:
        needed = _needed(total, top_p)
        if (top_k > 0) & (needed > above):
            left = tl.minimum(left, tl.cdiv(needed - above, tl.maximum(each, 1)))
        elif whole | (top_k == 0):
            border, over = _halve(key, inside, weight, needed - over_weight)
            above = over_weight + over
            each = _weight_of(border, peak, rate, least)
            left = tl.cdiv(needed - above, tl.maximum(each, 1))
        else:
            wanted = needed
        total = above + left * each
    token = total * 0
    if whole:
        drawn = _portion(total, random)
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
    border = _key(peak - (last + 2).to(tl.float32) * (_DEPTH / BINS) / rate) - 1
    left = total * 0
    wanted = left
    above = left
    if top_k > 0:
        border, over = _search(logits, vocab, held, peak, rate, least, border, _key(peak) + 1, top_k, True, HELD, TILE)
        left = top_k - over
    if top_p < 1.0:
        if top_k > 0:
            above = _over(logits, vocab, peak, rate, least, border, TILE)
            each = _weight_of(border, peak, rate, least)
            wanted = _needed(above + left * each, top_p)
            if wanted > above:
                left = tl.minimum(left, tl.cdiv(wanted - above, tl.maximum(each, 1)))
                wanted = wanted * 0
        else:
            wanted = _needed(total, top_p)
    return border, left, wanted


@triton.jit
def _halve(key, inside, amount, needed):
    """The largest key at and over which there is what is needed of `amount`, and how much is over it."""
    lo = tl.min(tl.where(inside, key, 2147483647))
    hi = tl.maximum(tl.max(tl.where(inside, key, _LOWEST)), lo) + 1
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
        below = tl.full((TILE,), _LOWEST, tl.int32)
        above = tl.full((TILE,), 2147483647, tl.int32)
        for start in range(0, vocab, TILE):
            at = start + tl.arange(0, TILE)
            value = tl.load(logits + at, at < vocab, float("-inf"))
            key = _key(value)
            upper = (key >= middle) & (at < vocab)
            many += upper.to(tl.int32)
            if not COUNTING:
                there += tl.where(upper, _weight(_share(_power(value, peak, rate)), least), 0)
            above = tl.minimum(above, tl.where(upper, key, 2147483647))
            below = tl.maximum(below, tl.where(upper, _LOWEST, key))
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
        value = tl.load(held + HELD + place, inside, _NOTHING).to(tl.float32, bitcast=True)
        if COUNTING:
            amounts = inside.to(tl.int64)
        else:
            amounts = tl.where(inside, _weight(_share(_power(value, peak, rate)), least), 0)
        lo, more = _halve(_key(value), inside, amounts, needed - over)
        over += more
    return lo, over


@triton.jit
def _hold(logits, vocab, held, lo, hi, HELD: tl.constexpr, TILE: tl.constexpr):
    """Puts the logits (their bits) of a row's tokens whose keys lie in [lo, hi) into `held`, as `_gather` does but for
    the ids. Returns how many there are."""
    count = tl.full((), 0, tl.int32)
    tl.debug_barrier()  # what was there has been read
    for start in range(0, vocab, TILE):
        at = start + tl.arange(0, TILE)
        value = tl.load(logits + at, at < vocab, float("-inf"))
        key = _key(value)
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
        there += tl.where(_key(value) > border, _weight(_share(_power(value, peak, rate)), least), 0)
    return tl.sum(there)


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=_UNALIGNED)
def _keep(
    logits, peaks, temperatures, top_ks, top_ps, min_ps, plans, borders, sums, equals, vocab, tiles, flags,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tl.load(plans + row * _FIELDS + _MODE) >= _HELD_PART:
        at = tile * TILE + tl.arange(0, TILE)
        value = tl.load(logits + row * vocab + at, at < vocab, float("-inf"))
        border = tl.load(borders + row)
        peak = _peak(peaks + row * tiles, tiles, CHUNK)
        power = _power(value, peak, _rate(tl.load(temperatures + row)))
        weight = _weight(_share(power), _least(min_ps, row, flags))
        key = _key(value)
        tl.store(sums + row * tiles + tile, tl.sum(tl.where(key > border, weight, 0)))
        tl.store(equals + row * tiles + tile, tl.sum(((key == border) & (at < vocab)).to(tl.int32)))


@triton.jit(do_not_specialize=["tiles", "flags"], do_not_specialize_on_alignment=_UNALIGNED)
def _choose(
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
    mode = tl.load(plans + row * _FIELDS + _MODE, filters, _UNFILTERED)
    peak = _peak(peaks, tiles, CHUNK)
    temperature = tl.load(temperatures + row)
    lanes = tl.arange(0, TILE)
    if filters == 0:
        tl.store(borders + row, _LOWEST)
        tl.store(at_borders + row, 0)
    if temperature < _GREEDY_BELOW:
        tile = tiles
        for start in range(0, tiles, CHUNK):
            at = start + tl.arange(0, CHUNK)
            value = tl.load(peaks + at, at < tiles, float("-inf"))
            tile = tl.minimum(tile, tl.min(tl.where((value == peak) & (at < tiles), at, tiles)))
        at = tile * TILE + lanes
        value = tl.load(logits + at, at < vocab, float("-inf"))
        token = tl.min(tl.where((value == peak) & (at < vocab), at, vocab - 1))
        tl.store(tokens + row, token.to(tl.int64))
    elif mode != _HELD_ALL:
        rate = _rate(temperature)
        least = _least(min_ps, row, flags)
        border = tl.full((), _LOWEST, tl.int32)
        left = row * 0
        each = left
        if mode != _UNFILTERED:
            border = tl.load(borders + row)
            left = tl.load(at_borders + row).to(tl.int64)
            each = _weight_of(border, peak, rate, least)
            total = _total(sums, tiles, CHUNK) + left * each
        else:
            total = _total(sums, tiles, CHUNK)
        drawn = _portion(total, _random(seeds, sample_indices, positions, row))
        tile, reached, equals_before = _tile_of(sums, equals, tiles, mode != _UNFILTERED, left, each, drawn, CHUNK)
        at = tile * TILE + lanes
        value = tl.load(logits + at, at < vocab, float("-inf"))
        weight = _weight(_share(_power(value, peak, rate)), least)
        key = _key(value)
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


@triton.jit
def _peak(peaks, tiles, CHUNK: tl.constexpr):
    """A row's largest logit."""
    most = tl.full((CHUNK,), float("-inf"), tl.float32)
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        most = tl.maximum(most, tl.load(peaks + tile, tile < tiles, float("-inf")))
    return tl.max(most)


@triton.jit
def _total(sums, tiles, CHUNK: tl.constexpr):
    total = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        total += tl.load(sums + tile, tile < tiles, 0)
    return tl.sum(total)


@triton.jit
def _top_k(top_ks, row, vocab, flags):
    """0 if it is off."""
    top_k = tl.load(top_ks + row, (flags & 2) != 0, 0)
    return tl.where(top_k < vocab, top_k, 0)


@triton.jit
def _top_p(top_ps, row, flags):
    return tl.load(top_ps + row, (flags & 4) != 0, 1.0)


@triton.jit
def _least(min_ps, row, flags):
    """The share below which min-p leaves a token out."""
    return tl.load(min_ps + row, (flags & 1) != 0, 0.0) * _WHOLE


@triton.jit
def _rate(temperature):
    return tl.div_rn(tl.full((), _LOG2_E, tl.float32), temperature)


@triton.jit
def _power(value, peak, rate):
    """The power of two that a token's share is."""
    power = (value - peak) * rate
    return tl.where(power >= _LEAST_POWER, power, _LEAST_POWER)


@triton.jit
def _share(power):
    """`sampler.shares`."""
    whole = tl.floor(power + 0.5)
    rest = power - whole
    value = rest * _P0 + _P1
    value = value * rest + _P2
    value = value * rest + _P3
    value = value * rest + _P4
    value = value * rest + _P5
    value = value * rest + _P6
    return value * ((whole.to(tl.int32) + _EXPONENT) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weight(share, least):
    return tl.where(share >= least, share, 0.0).to(tl.int64)


@triton.jit
def _weight_of(key, peak, rate, least):
    """What a token with this key weighs."""
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return _weight(_share(_power(value, peak, rate)), least)


@triton.jit
def _bin(power, BINS: tl.constexpr):
    return tl.minimum((power * (-BINS / _DEPTH)).to(tl.int32), BINS - 1)


@triton.jit
def _needed(total, top_p):
    """`sampler._needed`, for top_p below 1."""
    share = top_p.to(tl.float64) * (1.0 - 2.0**-20)
    return tl.maximum(tl.ceil(total.to(tl.float64) * share).to(tl.int64), 1)


@triton.jit
def _portion(total, random):
    """total * random / 2 ** 24, rounded down."""
    return (total >> 24) * random + ((total & 0xFFFFFF) * random >> 24)


@triton.jit
def _key(value):
    """`sampler.ordered_bits`."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _random(seeds, sample_indices, positions, row):
    """`sampler._random_bits`."""
    gamma = tl.full((), 0x9E3779B97F4A7C15 - (1 << 64), tl.int64)
    state = _mix(tl.load(seeds + row) + gamma)
    state = _mix(state + (tl.load(sample_indices + row).to(tl.int64) + 1) * gamma)
    state = _mix(state + (tl.load(positions + row).to(tl.int64) + 1) * gamma)
    return (state >> 40) & 0xFFFFFF


@triton.jit
def _mix(x):
    """`sampler._mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * tl.full((), 0xBF58476D1CE4E5B9 - (1 << 64), tl.int64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * tl.full((), 0x94D049BB133111EB - (1 << 64), tl.int64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
