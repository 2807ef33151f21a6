"""The kernels that draw tokens against plain torch: the same tokens kept, the same drawn, whatever the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tandem.worker import sampler
from tandem.worker.sampler import sample, shares

from support.cuda import no_waiting
from support.drawing_cases import KINDS, columns_of, differences, logits_of, rows_of

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
TOP_K = (0, 1, 2, 50, 1000, 8192, 8193, 100_000, 1_000_000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 4095, 4097, 50_257, 128_256])
def test_the_kernels_keep_and_draw_what_plain_torch_does(kind: str, vocab: int) -> None:
    columns = columns_of(TOP_K, CUDA)
    logits = logits_of(kind, len(columns.top_k), vocab, CUDA)
    assert not list(differences(logits, columns))
    for unused in (
        {"min_p": None, "any_top_k": False},
        {"any_top_p": False},
        {"min_p": None, "any_top_k": False, "any_top_p": False},
    ):
        fewer = replace(columns, **unused)
        if not fewer.any_top_k:
            fewer.top_k = torch.zeros_like(fewer.top_k)
        if not fewer.any_top_p:
            fewer.top_p = torch.ones_like(fewer.top_p)
        assert not list(differences(logits, fewer)), unused


def test_shares_are_the_same_bits_as_on_a_cpu() -> None:
    columns = columns_of((0,), CUDA)
    for kind in KINDS:
        logits = logits_of(kind, len(columns.top_k), 50_257, CUDA)
        on_cpu = shares(logits.cpu(), columns.temperature.cpu())
        assert torch.equal(shares(logits, columns.temperature).cpu(), on_cpu), kind


@pytest.mark.parametrize("kind", ["normal", "plateau"])
def test_the_kernels_draw_the_same_in_any_company_without_waiting(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "BY_KERNELS", True)
    columns = columns_of(TOP_K, CUDA)
    logits = logits_of(kind, len(columns.top_k), 128_256, CUDA)
    together = sample(logits, columns)
    with no_waiting():
        again = [sample(logits, columns) for _ in range(5)]
    assert all(torch.equal(one, together) for one in again)
    for row in range(0, len(logits), 13):
        own = slice(row, row + 1)
        assert sample(logits[own], rows_of(columns, own)).item() == together[row].item()


def test_rows_that_hold_no_numbers_end_and_disturb_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "BY_KERNELS", True)
    columns = columns_of((50,), CUDA)
    logits = logits_of("normal", len(columns.top_k), 9000, CUDA)
    expected = sample(logits, columns)
    for row in range(0, 16, 4):
        logits[row], logits[row + 1, 7] = float("nan"), float("nan")
        logits[row + 2, 7], logits[row + 3] = float("inf"), float("-inf")
    got = sample(logits, columns)
    assert torch.equal(got[16:], expected[16:])
    assert ((got >= 0) & (got < 9000)).all()


def test_a_step_of_another_number_of_rows_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a request would wait for a compiler."""
    from tandem.worker.drawing import borders, choosing, gathering, weighing

    monkeypatch.setattr(sampler, "BY_KERNELS", True)
    columns = columns_of(TOP_K, CUDA)
    logits = logits_of("normal", len(columns.top_k), 128_256, CUDA)
    sample(logits[:8], rows_of(columns, slice(0, 8)))
    kernels: list[Any] = [
        weighing.find_peaks, weighing.weigh, gathering.decide, gathering.gather, borders.find_border, weighing.keep,
        choosing.choose,
    ]  # fmt: skip

    def compiled() -> list[int]:
        return [sum(len(entry[0]) for entry in kernel.device_caches.values()) for kernel in kernels]

    before = compiled()
    assert all(before)
    for start, rows in ((0, 1), (3, 2), (5, 16), (0, 33), (1, 100)):
        part = slice(start, start + rows)
        given = rows_of(columns, part)
        sample(logits[part], given)
        sample(logits[part], replace(given, min_p=None, any_top_k=False, any_top_p=False))
    assert compiled() == before
