"""What `Adjustments.apply` and `note` do, in three kernels instead of some fifty operations of torch, for CUDA.

`_adjust_tiles` takes tokens away by masks and applies the penalties, a tile of a row's vocabulary to a program, and
counts what is left. `_adjust_rows`, a row to a program, comes to the few tokens of biases and bad words; and it gives
the row all its tokens back if none is left. `_note` takes in what was chosen. Every value is computed by the same
operations, in the same order and rounded as often as in plain torch, so the logits are the same.

Imported only where it runs; Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE: int = 2048
_LANES: int = 128
"""Biases and bad words that a program looks at at a time."""


class Tables(NamedTuple):
    """Of an Adjustments, slot-indexed."""

    seen: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    min_tokens: Tensor
    allowed: Tensor
    late: Tensor
    bias_token: Tensor
    bias: Tensor
    sequences: Tensor
    recent: Tensor


def adjust(
    logits: Tensor,
    slots: Tensor,
    position: Tensor,
    tables: Tables,
    *,
    masks: bool,
    penalties: bool,
    biases: int,
    sequences: int,
) -> Tensor:
    """`Adjustments.apply` of float32 logits [N, vocab], contiguous; slots int64 [N], position int32 [N]. `biases` and
    `sequences`: the most of a row, of the passes that the step needs. Launches two kernels, whose compiled form depends
    on the vocabulary alone; does not wait."""
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, and have strides {logits.stride()}")
    rows, vocab = logits.shape
    out = torch.empty_like(logits)
    left = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    counts = masks or sequences > 0
    flags = int(masks) | int(penalties) << 1
    of_row = (
        tables.repetition, tables.presence, tables.frequency, tables.seen, tables.min_tokens, tables.allowed,
        tables.late,
    )  # fmt: skip
    _adjust_tiles[(rows, triton.cdiv(vocab, _TILE))](
        logits, out, left, slots, position, *of_row, vocab, flags, int(counts),
        TILE=_TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    if counts or biases:
        _adjust_rows[(rows,)](
            logits, out, left, slots, position, *of_row, tables.bias_token, tables.bias, tables.sequences,
            tables.recent, vocab, flags, int(counts), biases, sequences,
            BIASES=tables.bias.shape[1], SEQUENCES=tables.sequences.shape[1], LENGTH=tables.sequences.shape[2],
            LANES=_LANES, TILE=_TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def note(
    slots: Tensor, position: Tensor, tokens: Tensor, tables: Tables, *, penalties: bool, sequences: bool, most: int
) -> None:
    """`Adjustments.note` of tokens int64 [N]; `most`: a count that grows no more. Launches one kernel."""
    _note[(len(slots),)](
        slots, position, tokens, tables.seen, tables.recent, tables.seen.shape[1], int(penalties), int(sequences), most,
        LENGTH=tables.recent.shape[1], num_warps=1,
    )  # fmt: skip


_UNALIGNED: list[str] = ["left", "slots", "position"]


@triton.jit(  # or some step would wait for a compiler
    do_not_specialize=["flags", "counts"], do_not_specialize_on_alignment=_UNALIGNED
)
def _adjust_tiles(
    logits, out, left, slots, position, repetition, presence, frequency, seen, min_tokens, allowed, late, vocab, flags,
    counts,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < vocab
    value = tl.load(logits + row * vocab + at, inside, float("-inf"))
    if flags & 1:
        early = tl.load(position + row) < tl.load(min_tokens + slot)
        kept = _kept(allowed, late, slot, early, at, inside, vocab)
        value = tl.where(kept, value, float("-inf"))
    if counts:
        tl.atomic_add(left + row, tl.sum((value > float("-inf")).to(tl.int32)), sem="relaxed")
    if flags & 2:
        value = _penalised(value, repetition, presence, frequency, seen, slot, at, inside, vocab)
    tl.store(out + row * vocab + at, value, inside)


@triton.jit(
    do_not_specialize=["flags", "counts", "biases", "sequences_used"], do_not_specialize_on_alignment=_UNALIGNED
)
def _adjust_rows(
    logits, out, left, slots, position, repetition, presence, frequency, seen, min_tokens, allowed, late, bias_tokens,
    bias, sequences, recent, vocab, flags, counts, biases, sequences_used,
    BIASES: tl.constexpr, SEQUENCES: tl.constexpr, LENGTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    place = tl.load(position + row)
    early = place < tl.load(min_tokens + slot)
    logits += row * vocab
    out += row * vocab
    some = 1
    if counts:
        # Each token that a bad word takes away is counted once, however many of them do: the first to get there finds
        # no mark.
        rest = tl.load(left + row)
        marks = out.to(tl.pointer_type(tl.int32), bitcast=True)
        for first in range(0, sequences_used, LANES):
            token, complete = _completed(
                sequences, recent, slot, place, first, sequences_used, SEQUENCES, LENGTH, LANES
            )
            there = tl.load(logits + token, complete, float("-inf")) > float("-inf")
            if flags & 1:
                there = there & _kept(allowed, late, slot, early, token, complete, vocab)
            mark = tl.full((LANES,), 0x7FC0BAD1, tl.int32)  # not a number that a computation gives
            before = tl.atomic_xchg(marks + token, mark, complete)
            rest -= tl.sum((complete & there & (before != mark)).to(tl.int32))
        tl.debug_barrier()
        for first in range(0, sequences_used, LANES):
            token, complete = _completed(
                sequences, recent, slot, place, first, sequences_used, SEQUENCES, LENGTH, LANES
            )
            tl.store(out + token, float("-inf"), complete)
        some = (rest > 0).to(tl.int32)
        if some == 0:
            tl.debug_barrier()
            for start in range(0, vocab, TILE):
                at = start + tl.arange(0, TILE)
                inside = at < vocab
                value = tl.load(logits + at, inside, 0.0)
                if flags & 2:
                    value = _penalised(value, repetition, presence, frequency, seen, slot, at, inside, vocab)
                tl.store(out + at, value, inside)
        tl.debug_barrier()
    for first in range(0, biases, LANES):
        k = first + tl.arange(0, LANES)
        token = tl.load(bias_tokens + slot * BIASES + k, k < biases, 0)
        added = tl.load(bias + slot * BIASES + k, k < biases, 0.0)
        biased = added != 0.0  # others fill the row up
        # What is taken away is -inf in `out`; the rest begins anew, for the penalties come after the bias.
        gone = tl.load(out + token, biased, 0.0) == float("-inf")
        value = tl.load(logits + token, biased, 0.0)
        value = tl.where(gone & (some != 0) & (counts != 0), float("-inf"), value) + added
        if flags & 2:
            value = _penalised(value, repetition, presence, frequency, seen, slot, token, biased, vocab)
        tl.store(out + token, value, biased)


@triton.jit
def _kept(allowed, late, slot, early, token, inside, vocab):
    """Whether the masks of a slot let tokens through; `early`: before min_tokens."""
    word = slot * ((vocab + 31) // 32) + token // 32
    bits = tl.load(allowed + word, inside, 0)
    bits = tl.where(early, bits & tl.load(late + word, inside & early, 0), bits)
    return ((bits >> (token % 32)) & 1) != 0


@triton.jit
def _penalised(value, repetition, presence, frequency, seen, slot, token, inside, vocab):
    """`adjustments.penalise`."""
    times = tl.load(repetition + slot)
    known = tl.load(seen + slot * vocab + token, inside, 0)
    repeated = tl.where(value > 0.0, tl.div_rn(value, times + tl.zeros_like(value)), value * times)
    value = tl.where(known != 0, repeated, value)
    count = (known >> 1).to(tl.float32)
    value = value - tl.load(frequency + slot) * count
    return value - tl.load(presence + slot) * (count > 0.0).to(tl.float32)


@triton.jit
def _completed(
    sequences, recent, slot, place, first, used, SEQUENCES: tl.constexpr, LENGTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The last tokens of a slot's sequences from `first` on, and of which of them the others are its latest tokens."""
    s = first + tl.arange(0, LANES)
    base = sequences + (slot * SEQUENCES + s) * LENGTH
    token = tl.load(base + (LENGTH - 1), s < used, -1)
    complete = token != -1
    for back in range(1, LENGTH):
        wanted = tl.load(base + (LENGTH - 1 - back), complete, -1)
        had = tl.load(recent + slot * LENGTH + (place - back + LENGTH) % LENGTH)
        complete = complete & ((wanted == -1) | (wanted == had))
    return tl.where(complete, token, 0), complete


@triton.jit(
    do_not_specialize=["penalties", "sequences", "most"],
    do_not_specialize_on_alignment=["slots", "position", "tokens"],
)
def _note(slots, position, tokens, seen, recent, vocab, penalties, sequences, most, LENGTH: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    token = tl.load(tokens + row)
    if penalties:
        known = tl.load(seen + slot * vocab + token)
        tl.store(seen + slot * vocab + token, tl.where(known < most, known + 2, known).to(tl.int16))
    if sequences:
        tl.store(recent + slot * LENGTH + tl.load(position + row) % LENGTH, token.to(tl.int32))
