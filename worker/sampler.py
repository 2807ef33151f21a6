"""Choosing tokens from logits: greedy, or sampled with a counter-based random number.

A token's random number depends on (seed, sample index, output position) alone, and every operation works row by row, so
a row's token does not depend on its batch. The order is vLLM's: temperature, min-p, top-k, top-p. How likely a token is
beside the row's likeliest becomes a whole number, its weight, before anything is added up: such sums are exact, so that
neither their order nor the device decides where a border falls. The token is found by inverting the cumulative
distribution over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BY_KERNELS = True
"""On CUDA kernels take the place of `sample` (drawing/) and of adjustments (adjusting.py): the same
tokens in a few passes over memory. Off, torch does it there as on a CPU; tests/gpu and bench.sampling compare them."""
LARGEST_DRAWN: Final = 1 << 20
"""Tokens of a vocabulary that the drawing kernels' sums have room for; torch draws from larger ones."""
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy (vLLM's limit): dividing by them would overflow."""
WEIGHT_BITS: Final = 40
"""The likeliest token of a row weighs 2 ** WEIGHT_BITS, another what it should beside it, rounded down. A row's sum
stays below 2 ** 63."""
TOP_P_SLACK: Final = 2.0**-20
"""A probability that is short of top_p by so little, relatively, has reached it: float32 is no more exact."""


@dataclass(slots=True)
class SamplingColumns:
    """Sampling parameters of N rows, device tensors. The flags are what the host knows of the columns; True is always
    right, False spares work."""

    temperature: Tensor
    """[N] float32; below `GREEDY_BELOW`: greedy."""
    top_k: Tensor
    """[N] int32; 0: off."""
    top_p: Tensor
    """[N] float32 in (0, 1]; 1: off."""
    seed: Tensor
    """[N] int64."""
    sample_index: Tensor
    """[N] int32: which of a request's `n` samples."""
    position: Tensor
    """[N] int32: how many tokens this sample has generated before."""
    min_p: Tensor | None = None
    """[N] float32 in [0, 1]; 0: off. None: no row uses it."""
    any_top_k: bool = True
    any_top_p: bool = True


@dataclass(slots=True)
class AllowedTokens:
    """What the grammars of G of the N rows allow, device tensors."""

    rows: Tensor
    """[G] int64: which rows they are."""
    bits: Tensor
    """[G, W] int32: bit t % 32 of word t // 32 allows token t; at least one in a row."""


def allow(logits: Tensor, allowed: AllowedTokens) -> Tensor:
    """[N, vocab] with -inf for every token that a row's grammar does not allow."""
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    octets = allowed.bits.view(torch.uint8)  # little-endian words: byte t // 8, bit t % 8
    kept = ((octets[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[-1]] > 0
    return logits.index_copy(0, allowed.rows, logits[allowed.rows].masked_fill(~kept, float("-inf")))


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row of [N, vocab] (the lowest id among equals): [N] int64."""
    return logits.argmax(dim=-1)


def sample(logits: Tensor, columns: SamplingColumns) -> Tensor:
    """One token per row of float32 logits [N, vocab]: [N] int64. Does not wait for the device."""
    if BY_KERNELS and logits.is_cuda and logits.shape[1] <= LARGEST_DRAWN:
        from .drawing.draw import draw

        return draw(logits, columns).tokens
    bits = random_bits(columns.seed, columns.sample_index, columns.position)
    tokens = _draw(_weights(logits, columns), bits)
    return torch.where(columns.temperature < GREEDY_BELOW, greedy(logits), tokens)


def _draw(weights: Tensor, bits: Tensor) -> Tensor:
    """[N] int64: the token of each row of weights [N, vocab] that random bits [N] lead to."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # total * bits >> 24 in two parts, since the product may have more than 63 bits; below the row's sum.
    low = total & ((1 << _RANDOM_BITS) - 1)
    drawn = (total >> _RANDOM_BITS) * bits + (low * bits >> _RANDOM_BITS)
    tokens = torch.searchsorted(cumulative, drawn[:, None], right=True).squeeze(1)
    return tokens.clamp_max(weights.shape[-1] - 1)  # only a row that weighs nothing gets there


_RANDOM_BITS = 24


def random_bits(seed: Tensor, sample_index: Tensor, position: Tensor) -> Tensor:
    """[N] int64 in [0, 2**24): a hash of the counters, the same on every device."""
    state = _mix(seed + _signed(_GAMMA))
    state = _mix(state + (sample_index.to(torch.int64) + 1) * _signed(_GAMMA))
    state = _mix(state + (position.to(torch.int64) + 1) * _signed(_GAMMA))
    return _shift_right(state, 64 - _RANDOM_BITS)


LOG2_E: Final = 1.4426950408889634
POWERS: Final = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
"""2 ** x for x in [-0.5, 0.5] is a polynomial with these coefficients, the highest power's first (Moshier, Cephes,
exp2f). A device's own exponential function would round as it likes."""
LEAST_POWER: Final = -64.0
"""Lower powers of two than this are taken for it: nothing with a share below 2 ** -WEIGHT_BITS weighs anything."""


def shares(logits: Tensor, temperature: Tensor) -> Tensor:
    """How likely each token is beside the row's likeliest, times 2 ** WEIGHT_BITS: float32 [N, vocab], of float32
    logits [N, vocab] and temperatures [N]. Each operation rounds once, so every device gives the same bits."""
    rate = torch.full_like(temperature, LOG2_E) / torch.where(temperature < GREEDY_BELOW, 1.0, temperature)
    power = (logits - logits.amax(dim=-1, keepdim=True)).mul_(rate[:, None])
    power = torch.where(power >= LEAST_POWER, power, LEAST_POWER)  # NaN as well
    whole = (power + 0.5).floor_()
    rest = power.sub_(whole)
    value = rest * POWERS[0]
    for coefficient in POWERS[1:-1]:
        value.add_(coefficient).mul_(rest)
    value.add_(POWERS[-1])
    scale = whole.to(torch.int32).add_(127 + WEIGHT_BITS).bitwise_left_shift_(23)
    return value.mul_(scale.view(torch.float32))  # 2 ** (whole + WEIGHT_BITS)


def _weights(logits: Tensor, columns: SamplingColumns) -> Tensor:
    """[N, vocab] int64: how likely each token is to be drawn, 0 for those that are filtered out. Never 0 for a whole
    row, unless its largest logit is no finite number."""
    share = shares(logits, columns.temperature)
    weights = share.to(torch.int64)
    if columns.min_p is not None:
        weights = weights.masked_fill(share < (columns.min_p * 2.0**WEIGHT_BITS)[:, None], 0)
    if not (columns.any_top_k or columns.any_top_p):
        return weights
    top_k = columns.top_k if columns.any_top_k else None
    top_p = columns.top_p if columns.any_top_p else None
    # A sort is one pass over memory after the other; a GPU finds a border faster by counting, a CPU by sorting.
    return (likeliest_by_search if logits.is_cuda else likeliest_by_sort)(logits, weights, top_k, top_p)


def likeliest_by_sort(logits: Tensor, weights: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Weights with 0 for what top-k, and then top-p of the rest, leave out; of equal logits the lowest ids stay.

    logits float32 [N, vocab], weights int64 [N, vocab], top_k int32 [N] (0: all), top_p float32 [N].
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(-1, order)
    if top_k is not None:
        vocab = logits.shape[-1]
        rank = torch.arange(vocab, device=logits.device)
        ordered = ordered.masked_fill(rank >= torch.where(top_k > 0, top_k, vocab)[:, None], 0)
    if top_p is not None:
        reached = ordered.cumsum(-1)
        ordered = ordered.masked_fill(reached - ordered >= _needed(reached[:, -1], top_p)[:, None], 0)
    return torch.zeros_like(weights).scatter_(-1, order, ordered)


def likeliest_by_search(logits: Tensor, weights: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """What `likeliest_by_sort` gives, found in a fixed number of passes that only compare and count."""
    keys = ordered_bits(logits)
    if top_k is not None:
        needed = torch.where(top_k > 0, top_k, logits.shape[-1]).to(torch.int64).clamp_max(logits.shape[-1])
        border = _border(keys, lambda at_least: at_least.sum(-1), needed)
        above, equal = keys > border[:, None], keys == border[:, None]
        left = needed - above.sum(-1)
        weights = weights.masked_fill(~(above | (equal & (equal.cumsum(-1) <= left[:, None]))), 0)
    if top_p is not None:
        needed = _needed(weights.sum(-1), top_p)
        kept = weights  # for the closure
        border = _border(keys, lambda at_least: torch.where(at_least, kept, 0).sum(-1), needed)
        above, equal = keys > border[:, None], (keys == border[:, None]) & (weights > 0)
        of_one = torch.where(equal, weights, 0).amax(-1).clamp_min(1)
        left = needed - torch.where(above, weights, 0).sum(-1)
        most = (left + of_one - 1) // of_one
        weights = weights.masked_fill(~(above | (equal & (equal.cumsum(-1) <= most[:, None]))), 0)
    return weights


def _needed(total: Tensor, top_p: Tensor) -> Tensor:
    """[N] int64: the weight at which top_p of the total is reached, at least 1."""
    share = top_p.to(torch.float64) * (1.0 - TOP_P_SLACK)
    needed = (total.to(torch.float64) * share).ceil().to(torch.int64).clamp_min(1)
    return torch.where(top_p >= 1.0, total.clamp_min(1), needed)


def _border(keys: Tensor, measure: Callable[[Tensor], Tensor], needed: Tensor) -> Tensor:
    """[N] int32: each row's largest key for which the `measure` of the tokens with at least that key is `needed`."""
    border = torch.full((keys.shape[0],), -(2**31), dtype=torch.int32, device=keys.device)
    for bit in range(31, -1, -1):
        higher = border + (1 << bit) if bit < 31 else torch.zeros_like(border)
        border = torch.where(measure(keys >= higher[:, None]) >= needed, higher, border)
    return border


def ordered_bits(values: Tensor) -> Tensor:
    """int32 with the order of the float32 values; 0.0 and -0.0 are equal."""
    bits = (values + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


_GAMMA = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that torch's int64 holds."""
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014; Stafford's variant 13) on int64, wrapping."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)
