"""What a token weighs and where it stands among the others: the arithmetic of `sampler`, operation by operation.

Each operation rounds as it does there, so the weights are the same whole numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import sampler

LOWEST = tl.constexpr(-(2**31))
NOTHING = tl.constexpr(-(2**23))
"""The bits of -inf."""
DEPTH = tl.constexpr(float(sampler.WEIGHT_BITS))
"""Tokens whose share is below 2 ** -DEPTH weigh nothing."""
_LOG2_E = tl.constexpr(sampler.LOG2_E)
_LEAST_POWER = tl.constexpr(sampler.LEAST_POWER)
_EXPONENT = tl.constexpr(127 + sampler.WEIGHT_BITS)
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (tl.constexpr(coefficient) for coefficient in sampler.POWERS)


@triton.jit
def rate_of(temperature):
    return tl.div_rn(tl.full((), _LOG2_E, tl.float32), temperature)


@triton.jit
def power_of(value, peak, rate):
    """The power of two that a token's share is."""
    power = (value - peak) * rate
    return tl.where(power >= _LEAST_POWER, power, _LEAST_POWER)


@triton.jit
def share_of(power):
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
def weight_of(share, least):
    return tl.where(share >= least, share, 0.0).to(tl.int64)


@triton.jit
def weight_at(key, peak, rate, least):
    """What a token with this key weighs."""
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return weight_of(share_of(power_of(value, peak, rate)), least)


@triton.jit
def bin_of(power, BINS: tl.constexpr):
    return tl.minimum((power * (-BINS / DEPTH)).to(tl.int32), BINS - 1)


@triton.jit
def key_of(value):
    """`sampler.ordered_bits`."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def needed_of(total, top_p):
    """`sampler._needed`, for top_p below 1."""
    share = top_p.to(tl.float64) * (1.0 - 2.0**-20)
    return tl.maximum(tl.ceil(total.to(tl.float64) * share).to(tl.int64), 1)


@triton.jit
def portion_of(total, random):
    """total * random / 2 ** 24, rounded down."""
    return (total >> 24) * random + ((total & 0xFFFFFF) * random >> 24)


@triton.jit
def random_of(seeds, sample_indices, positions, row):
    """`sampler.random_bits`."""
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
