"""The kernel that draws tokens against plain torch: the same tokens kept, the same drawn, whatever the batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tandem.worker import sampler
from tandem.worker.sampler import SamplingColumns, likeliest_by_search, ordered_bits, sample

from support.cuda import no_waiting

pytestmark = pytest.mark.gpu

TOP_K = (0, 1, 2, 50, 1000, 2048, 2049, 100_000, 1_000_000)
TOP_P = (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)
MIN_P = (0.0, 1e-6, 0.05, 1.0)
KINDS = ("normal", "flat", "peaked", "rounded", "equal", "masked", "bfloat16", "large", "tiny", "zeros")


def logits_of(kind: str, rows: int, vocab: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(5)
    normal = torch.randn(rows, vocab, generator=generator, device="cuda")
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
            return normal.masked_fill(torch.arange(vocab, device="cuda") % 3 > 0, float("-inf"))
        case "bfloat16":
            return (normal * 4).bfloat16().float()
        case "large":
            return normal * 1e8
        case "tiny":
            return normal * 1e-38
        case "zeros":
            return torch.where(normal > 0, 0.0, -0.0)
        case _:
            return normal * 2


def columns_of(rows: int, top_k: Tensor, top_p: Tensor, min_p: Tensor | None) -> SamplingColumns:
    numbers = torch.arange(rows, device="cuda")
    return SamplingColumns(
        temperature=torch.where(numbers % 11 == 10, 0.0, 1.0),
        top_k=top_k,
        top_p=top_p,
        seed=numbers * 7919,
        sample_index=torch.zeros_like(numbers, dtype=torch.int32),
        position=numbers.to(torch.int32),
        min_p=min_p,
    )


def every_combination() -> tuple[Tensor, Tensor, Tensor]:
    top_k, top_p, min_p = zip(*product(TOP_K, TOP_P, MIN_P), strict=True)
    return (
        torch.tensor(top_k, dtype=torch.int32, device="cuda"),
        torch.tensor(top_p, device="cuda"),
        torch.tensor(min_p, device="cuda"),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2047, 2049, 50_257, 128_256])
def test_the_kernel_keeps_and_draws_what_plain_torch_does(
    kind: str, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandem.worker import drawing

    top_k, top_p, min_p = every_combination()
    columns = columns_of(len(top_k), top_k, top_p, min_p)
    logits = logits_of(kind, len(top_k), vocab)
    probabilities = torch.softmax(logits, dim=-1)
    weights = (probabilities * 2.0**sampler.WEIGHT_BITS).to(torch.int64)
    least = probabilities.amax(dim=-1) * min_p
    weights = weights.masked_fill(probabilities < least[:, None], 0)
    expected = likeliest_by_search(logits, weights, top_k, top_p)
    greedy = columns.temperature < sampler.GREEDY_BELOW
    bits = sampler._random_bits(columns.seed, columns.sample_index, columns.position)
    drawn = drawing.draw(logits, probabilities, greedy, top_k, top_p, min_p, bits)
    keys, border = ordered_bits(logits), drawn.border[:, None]
    equal = keys == border
    kept = (keys > border) | (equal & (equal.cumsum(-1) <= drawn.at_border[:, None]))
    differ = (weights.masked_fill(~kept, 0) != expected).any(-1) & ~greedy
    assert not differ.nonzero().flatten().tolist()

    plain = sample(logits, columns)
    monkeypatch.setattr(sampler, "BY_KERNELS", True)
    assert torch.equal(sample(logits, columns), plain)


def test_the_kernel_draws_the_same_in_any_company_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "BY_KERNELS", True)
    top_k, top_p, min_p = every_combination()
    logits = logits_of("normal", len(top_k), 128_256)
    columns = columns_of(len(top_k), top_k, top_p, min_p)
    together = sample(logits, columns)
    with no_waiting():
        again = [sample(logits, columns) for _ in range(5)]
    assert all(torch.equal(one, together) for one in again)
    for row in range(0, len(top_k), 13):
        own = slice(row, row + 1)
        alone = SamplingColumns(
            columns.temperature[own],
            top_k[own],
            top_p[own],
            columns.seed[own],
            columns.sample_index[own],
            columns.position[own],
            min_p=min_p[own],
        )
        assert sample(logits[own], alone).item() == together[row].item()
    unused = replace(columns, top_k=torch.zeros_like(top_k), top_p=torch.ones_like(top_p), min_p=None)
    unfiltered = sample(logits, unused)
    monkeypatch.setattr(sampler, "BY_KERNELS", False)
    assert torch.equal(unfiltered, sample(logits, unused))


def test_rows_that_hold_no_numbers_end_and_disturb_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "BY_KERNELS", True)
    logits = logits_of("normal", 6, 3000)
    columns = columns_of(
        6,
        torch.full((6,), 50, dtype=torch.int32, device="cuda"),
        torch.full((6,), 0.9, device="cuda"),
        None,
    )
    expected = sample(logits, columns)
    logits[0], logits[1, 7], logits[2, 7], logits[3] = float("nan"), float("nan"), float("inf"), float("-inf")
    got = sample(logits, columns)
    assert torch.equal(got[4:], expected[4:])
    assert ((got >= 0) & (got < 3000)).all()
