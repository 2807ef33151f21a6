"""Sampling: distributions, filters, and what a token may depend on."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.protocol.sampling import SamplingParams
from tandem.worker import sampler
from tandem.worker.sampler import SamplingColumns, greedy, random_bits, sample

from support.reference_sampling import distribution

VOCAB = 12


def columns(rows: int, **given: Any) -> SamplingColumns:
    values: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "sample_index": 0,
        "position": 0,
        **given,
    }
    dtypes = {"temperature": torch.float32, "top_p": torch.float32, "min_p": torch.float32, "seed": torch.int64}
    if "min_p" in given:
        values["min_p"] = given["min_p"]
    made = {
        name: torch.as_tensor(value, dtype=dtypes.get(name, torch.int32)).expand(rows).clone()
        for name, value in values.items()
    }
    return SamplingColumns(
        temperature=made["temperature"],
        top_k=made["top_k"],
        top_p=made["top_p"],
        seed=made["seed"],
        sample_index=made["sample_index"],
        position=made["position"],
        min_p=made.get("min_p"),
    )


def frequencies(logits: Tensor, draws: int, **given: Any) -> Tensor:
    found = sample(logits.expand(draws, -1), columns(draws, seed=torch.arange(draws) * 7 + 3, **given))
    return torch.bincount(found, minlength=logits.shape[-1]).float()


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    expected = probabilities[kept] * counts.sum()
    return float(((counts[kept] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("varied", ["seed", "sample_index", "position"])
def test_frequencies_follow_the_distribution(temperature: float, varied: str) -> None:
    torch.manual_seed(3)
    logits = torch.randn(VOCAB)
    draws = 20_000
    given: dict[str, Any] = {"seed": 5, "temperature": temperature, varied: torch.arange(draws)}
    found = sample(logits.expand(draws, -1), columns(draws, **given))
    counts = torch.bincount(found, minlength=VOCAB).float()
    # 11 degrees of freedom: 31.3 is exceeded once in a thousand times
    assert chi_square(counts, torch.softmax(logits / temperature, -1)) < 31.3


def test_top_k_keeps_the_k_likeliest() -> None:
    logits = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).float() / 3
    kept = torch.zeros(VOCAB).scatter_(0, logits.topk(4).indices, 1.0)
    probabilities = torch.softmax(logits, -1) * kept
    counts = frequencies(logits, 8000, top_k=4)
    assert chi_square(counts, probabilities / probabilities.sum()) < 16.3  # 3 degrees of freedom


def test_top_k_keeps_exactly_k_of_equals() -> None:
    assert (frequencies(torch.zeros(VOCAB), 4000, top_k=5) > 0).tolist() == [True] * 5 + [False] * (VOCAB - 5)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [0]), (0.4, [0]), (0.41, [0, 1]), (0.7, [0, 1]), (0.75, [0, 1, 2]), (0.99, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (frequencies(logits, 4000, top_p=top_p) > 0).nonzero().flatten().tolist() == kept


def test_top_p_applies_to_what_top_k_left() -> None:
    """vLLM's order: of [.4 .3 .2 .1], top_k 2 leaves [.57 .43], and top_p 0.5 of that is the first alone."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert (frequencies(logits, 2000, top_k=2, top_p=0.5) > 0).tolist() == [True, False, False, False]
    assert (frequencies(logits, 2000, top_p=0.5) > 0).tolist() == [True, True, False, False]


def test_a_token_depends_on_its_own_row_alone() -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    n = 64
    logits = torch.randn(n, 300)
    given = {
        "temperature": torch.tensor([rng.choice([0.0, 0.3, 1.0, 2.0]) for _ in range(n)]),
        "top_k": torch.tensor([rng.choice([0, 1, 5, 299, 300, 1000]) for _ in range(n)]),
        "top_p": torch.tensor([rng.choice([0.1, 0.9, 1.0]) for _ in range(n)]),
        "seed": torch.tensor([rng.randrange(-(2**63), 2**63) for _ in range(n)]),
        "sample_index": torch.arange(n) % 3,
        "position": torch.arange(n),
    }
    together = sample(logits, columns(n, **given))
    for row in range(n):
        own = slice(row, row + 1)
        alone = columns(1, **{name: value[own] for name, value in given.items()})
        alone.any_top_k = bool(given["top_k"][row] > 0)
        alone.any_top_p = bool(given["top_p"][row] < 1)
        assert sample(logits[own], alone).item() == together[row].item()
    order = torch.randperm(n)
    shuffled = columns(n, **{name: value[order] for name, value in given.items()})
    assert torch.equal(sample(logits[order], shuffled), together[order])


def test_the_kernel_is_only_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    logits, given = torch.randn(9, 100), columns(9, top_k=20, top_p=0.8, min_p=0.01, seed=torch.arange(9))
    plain = sample(logits, given)
    monkeypatch.setattr(sampler, "BY_KERNELS", True)
    assert torch.equal(sample(logits, given), plain)


def test_temperature_zero_is_greedy_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 7] = logits[1, 4] = 1.0
    logits[2, VOCAB - 1] = 1e30
    assert greedy(logits).tolist() == [0, 4, VOCAB - 1]
    assert sample(logits, columns(3, temperature=0.0, top_k=3, top_p=0.2)).tolist() == [0, 4, VOCAB - 1]
    assert sample(logits, columns(3, temperature=1e-9)).tolist() == [0, 4, VOCAB - 1]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((VOCAB,), float("-inf"))
    logits[[3, 8]] = torch.tensor([0.0, 5.0])
    found = frequencies(logits, 5000)
    assert set(found.nonzero().flatten().tolist()) == {3, 8}


def test_uniform_is_the_written_down_hash() -> None:
    """Plain Python integers: what every device must reproduce, in every version, or resumed requests would change."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    rng = random.Random(4)
    rows = [(rng.randrange(-(2**63), 2**63), rng.randrange(9), rng.randrange(2**20)) for _ in range(50)]
    rows += [(0, 0, 0), (2**63 - 1, 0, 0), (-(2**63), 2**31 - 1, 2**31 - 1)]
    expected = []
    for seed, index, position in rows:
        state = mix((seed + gamma) % 2**64)
        state = mix((state + (index + 1) * gamma) % 2**64)
        state = mix((state + (position + 1) * gamma) % 2**64)
        expected.append((state >> 40) * 2.0**-24)
    seeds, indices, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = random_bits(seeds, indices.to(torch.int32), positions.to(torch.int32)).double() * 2.0**-24
    assert found.tolist() == expected
    assert all(0.0 <= u < 1.0 for u in expected)


def test_neighbouring_counters_are_independent() -> None:
    """Pairs (u of position p, u of p + 1) fill the square evenly."""
    n = 40_000
    position = torch.arange(n, dtype=torch.int32)
    zeros = torch.zeros(n, dtype=torch.int32)
    for seeds, indices, positions in (
        (torch.zeros(n, dtype=torch.int64), zeros, position),
        (torch.arange(n), zeros, zeros),
        (torch.zeros(n, dtype=torch.int64), position, zeros),
    ):
        u = random_bits(seeds, indices, positions).double() * 2.0**-24
        cells = (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()
        counts = torch.bincount(cells, minlength=64).float()
        assert chi_square(counts, torch.full((64,), 1 / 64)) < 103.4  # 63 degrees of freedom, one in a thousand


@pytest.mark.parametrize(
    "given",
    [
        {"top_p": 0.6, "temperature": 1.4},
        {"min_p": 0.2},
        {"min_p": 0.05, "temperature": 2.0},
        {"top_k": 9, "top_p": 0.8, "temperature": 1.5},
        {"min_p": 0.02, "top_k": 20, "top_p": 0.95, "temperature": 2.5},
    ],
    ids=str,
)
def test_filtered_frequencies_follow_the_reference(given: dict[str, Any]) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(8)) * 2
    probabilities = torch.from_numpy(distribution(logits.double().numpy(), SamplingParams(**given))).float()
    kept = int((probabilities > 0).sum())
    assert 3 <= kept < 24
    counts = frequencies(logits, 20_000, **given)
    # The Wilson-Hilferty approximation of what is exceeded once in a thousand times.
    freedom = kept - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square(counts, probabilities) < limit
