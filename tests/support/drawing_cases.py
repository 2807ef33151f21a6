"""Rows to draw tokens for, and whether kernels keep and draw what plain torch does.

Run as a program under TRITON_INTERPRET=1, it tries small vocabularies on the CPU.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Final

import torch
from torch import Tensor

from tandem.worker import sampler
from tandem.worker.sampler import SamplingColumns, likeliest_by_search, ordered_bits, sample, shares

from support.plain_sampling import plain_torch

TOP_P: Final = (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)
MIN_P: Final = (0.0, 1e-6, 0.05, 1.0)
KINDS: Final = (
    "normal", "flat", "peaked", "rounded", "equal", "masked", "bfloat16", "large", "tiny", "zeros", "steep", "plateau",
)  # fmt: skip


def logits_of(kind: str, rows: int, vocab: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(5)
    normal = torch.randn(rows, vocab, generator=generator, device=device)
    match kind:
        case "flat":
            return normal * 0.01 + 7
        case "peaked":
            return normal * 5 - 20
        case "rounded":
            return (normal * 3).round(decimals=1)
        case "equal":
            return torch.zeros_like(normal)
        case "masked":
            return normal.masked_fill(torch.arange(vocab, device=device) % 3 > 0, float("-inf"))
        case "bfloat16":
            return (normal * 4).bfloat16().float()
        case "large":
            return normal * 1e8
        case "tiny":
            return normal * 1e-38
        case "zeros":
            return torch.where(normal > 0, 0.0, -0.0)
        case "steep":  # most tokens weigh nothing
            return normal.sign() * 15 + normal
        case "plateau":  # one likely token, and thousands of equals below it
            return torch.where(torch.arange(vocab, device=device) == vocab // 2, 8.0, (normal * 0.3).round())
        case _:
            return normal * 2


def columns_of(top_k: tuple[int, ...], device: torch.device) -> SamplingColumns:
    """Every combination of filters, every eleventh row greedy, temperatures on both sides of 1."""
    each_k, each_p, each_min = zip(*itertools.product(top_k, TOP_P, MIN_P), strict=True)
    numbers = torch.arange(len(each_k), device=device)
    temperature = torch.tensor([1.0, 0.8, 1.7], device=device)[numbers % 3]
    return SamplingColumns(
        temperature=torch.where(numbers % 11 == 10, 0.0, temperature),
        top_k=torch.tensor(each_k, dtype=torch.int32, device=device),
        top_p=torch.tensor(each_p, device=device),
        seed=numbers * 7919 - 3,
        sample_index=(numbers % 4).to(torch.int32),
        position=numbers.to(torch.int32),
        min_p=torch.tensor(each_min, device=device),
    )


def expected_weights(logits: Tensor, columns: SamplingColumns) -> tuple[Tensor, Tensor]:
    """Weights before and after top-k and top-p, by plain torch's search."""
    share = shares(logits, columns.temperature)
    weights = share.to(torch.int64)
    if columns.min_p is not None:
        weights = weights.masked_fill(share < (columns.min_p * 2.0**sampler.WEIGHT_BITS)[:, None], 0)
    return weights, likeliest_by_search(logits, weights, columns.top_k, columns.top_p)


def differences(logits: Tensor, columns: SamplingColumns) -> Iterator[str]:
    """Where the kernels, called as they are, and plain torch part."""
    from tandem.worker.drawing.draw import draw

    drawn = draw(logits, columns)
    before, expected = expected_weights(logits, columns)
    keys, border = ordered_bits(logits), drawn.border[:, None]
    equal = keys == border
    kept = (keys > border) | (equal & (equal.cumsum(-1) <= drawn.at_border[:, None]))
    greedy = columns.temperature < sampler.GREEDY_BELOW
    differ = (before.masked_fill(~kept, 0) != expected).any(-1) & ~greedy
    if differ.any():
        yield f"what rows {differ.nonzero().flatten().tolist()[:9]} keep"
    with plain_torch():
        others = (drawn.tokens != sample(logits, columns)).nonzero().flatten().tolist()
    if others:
        yield f"the tokens of rows {others[:9]}"


def rows_of(columns: SamplingColumns, rows: slice) -> SamplingColumns:
    values: dict[str, Any] = {field.name: getattr(columns, field.name) for field in fields(columns)}
    values = {name: one[rows] if isinstance(one, Tensor) else one for name, one in values.items()}
    return SamplingColumns(**values)


def main() -> None:
    from tandem.worker.drawing import draw

    from support import triton_interpreter

    small: Any = draw
    small._TILE, small._HELD, small._FEW, small._CHUNK = 128, 64, 16, 2  # several of each in small rows
    device, tried = torch.device("cpu"), 0
    thorough = "all" in sys.argv
    vocabularies, kinds, step = ((1, 65, 700), KINDS, 4) if thorough else ((300,), ("normal", "plateau"), 5)
    for vocab, (number, kind) in itertools.product(vocabularies, enumerate(kinds)):
        columns = rows_of(columns_of((0, 20, 65, 200), device), slice(number, None, step))
        logits = logits_of(kind, len(columns.top_k), vocab, device)
        without = replace(columns, min_p=None, any_top_k=False, any_top_p=False)
        without.top_k, without.top_p = torch.zeros_like(columns.top_k), torch.ones_like(columns.top_p)
        for given in (columns, without):
            for difference in differences(logits, given):
                raise SystemExit(f"{kind}, {vocab} tokens: {difference}")
            tried += len(logits)
    print(f"{tried} rows equal, interpreted: {triton_interpreter.ON}")


if __name__ == "__main__":
    main()
