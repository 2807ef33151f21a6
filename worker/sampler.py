"""Choosing tokens from logits: greedy, or sampled with a counter-based random number.

A token's random number depends on (seed, sample index, output position) alone, and every operation works row by row, so
a row's token does not depend on its batch. Temperature comes first, then top-k, then top-p (vLLM's order); the token is
found by inverting the cumulative distribution over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy (vLLM's limit): dividing by them would overflow."""


@dataclass(slots=True)
class SamplingColumns:
    """Sampling parameters of N rows, device tensors. The two flags are what the host knows of the columns; True is
    always right, False spares the sort."""

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
    is_greedy = columns.temperature < GREEDY_BELOW
    scaled = logits / torch.where(is_greedy, 1.0, columns.temperature)[:, None]
    if columns.any_top_k or columns.any_top_p:
        scaled = scaled.masked_fill(~_kept(scaled, columns.top_k, columns.top_p), float("-inf"))
    cumulative = _row_cumsum(torch.softmax(scaled, dim=-1))
    total = cumulative[:, -1]
    drawn = uniform(columns.seed, columns.sample_index, columns.position) * total
    # Rounding may lift drawn to total, beyond the last token.
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, drawn[:, None], right=True).squeeze(1)
    tokens = tokens.clamp_max(logits.shape[-1] - 1)  # only NaN logits get there
    return torch.where(is_greedy, greedy(logits), tokens)


def uniform(seed: Tensor, sample_index: Tensor, position: Tensor) -> Tensor:
    """[N] float32 in [0, 1), multiples of 2**-24: a hash of the counters, the same bits on every device."""
    state = _mix(seed + _signed(_GAMMA))
    state = _mix(state + (sample_index.to(torch.int64) + 1) * _signed(_GAMMA))
    state = _mix(state + (position.to(torch.int64) + 1) * _signed(_GAMMA))
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def _kept(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """[N, vocab] bool: the tokens that top-k, then top-p over what top-k left, keep. Never empty in a row."""
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    rank = torch.arange(vocab, device=logits.device)
    kept = rank < torch.where(top_k > 0, top_k, vocab)[:, None]
    probabilities = torch.softmax(ordered.masked_fill(~kept, float("-inf")), dim=-1)
    before = _row_cumsum(probabilities) - probabilities
    kept &= (before < top_p[:, None]) | (top_p >= 1.0)[:, None] | (rank == 0)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _row_cumsum(values: Tensor) -> Tensor:
    """Cumulative sums of each row of [N, V]. A single CUDA row would take another algorithm than a row among many,
    one whose rounding varies from run to run, so it is given company."""
    if values.is_cuda and values.shape[0] == 1:
        return values.expand(2, -1).contiguous().cumsum(-1)[:1]
    return values.cumsum(-1)


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
