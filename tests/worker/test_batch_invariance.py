"""Batch-invariant mode: the same bits however a token came to be computed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tandem.worker.invariance import MAX_THREADS, ROW_TILE, RowTiles, check_tiles, configure_threads, tiled_product
from tandem.worker.sources import LoadError

from support.paged import Sequences, check_any_batch, load_tiny, random_tokens
from support.tiny_models import ARCHITECTURES, VOCAB


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chunks_company_preemption_and_block_size_leave_the_bits(arch: str, tmp_path: Path) -> None:
    model, own = load_tiny(arch, tmp_path, batch_invariant=True)
    check_any_batch(model, own, tolerance=1e-4)


def test_without_the_mode_bits_do_differ(tmp_path: Path) -> None:
    """Or the test above would prove nothing."""
    model, _ = load_tiny("llama", tmp_path)
    sequences = Sequences(model)
    sequences.add(random_tokens(41, VOCAB, 0))
    whole = sequences.step([(0, 41)])[0]
    sequences.forget(0)
    tokens = torch.cat([sequences.step([(0, 1)])[0] for _ in range(41)])
    assert not torch.equal(whole, tokens)
    torch.testing.assert_close(whole, tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5, 24), (16, 24), (1, 24), (33, 24)])
def test_tiled_products_are_products(shape: tuple[int, ...]) -> None:
    rows, weight, bias = torch.randn(shape), torch.randn(40, 24), torch.randn(40)
    torch.testing.assert_close(tiled_product(rows, weight.t(), bias), nn.functional.linear(rows, weight, bias))
    torch.testing.assert_close(tiled_product(rows, weight.t(), None), nn.functional.linear(rows, weight))


def test_every_product_in_the_mode_is_tiled() -> None:
    weight, bias = torch.randn(24, 40), torch.randn(40)
    rows = torch.randn(50, 24)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: x @ weight,
        lambda x: torch.matmul(x, weight),
        lambda x: x.mm(weight),
        lambda x: torch.addmm(bias, x, weight) - bias,
        lambda x: nn.functional.linear(x, weight.t()),
    ]
    for way in ways:
        with RowTiles():
            whole = way(rows)
            for count in (1, 2, 3, 17):
                assert torch.equal(way(rows[:count]), whole[:count])


def test_products_that_the_mode_does_not_know_are_refused() -> None:
    with RowTiles():
        torch.randn(3, 1, 4) * torch.randn(3, 5, 1)
        torch.matmul(torch.randn(3, 5, 1), torch.randn(3, 1, 4))
        with pytest.raises(LoadError, match=r"\[3, 5, 6\] and \[3, 6, 4\]"):
            torch.matmul(torch.randn(3, 5, 6), torch.randn(3, 6, 4))
        with pytest.raises(LoadError, match="einsum"):
            torch.einsum("ij,jk->ik", torch.randn(3, 4), torch.randn(4, 5))


def test_a_product_that_depends_on_the_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Skewed(nn.Linear):
        pass

    layer = Skewed(32, 32)
    check_tiles(layer)
    exact = torch.mm

    def skewed(rows: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        exact(rows, weight, out=out)
        out[ROW_TILE - 1] += 1e-6
        return out

    monkeypatch.setattr(torch, "mm", skewed)
    with pytest.raises(LoadError, match=r"16 x 32 with 32 x 32 .* place in the tile"):
        check_tiles(layer)


def test_more_threads_are_refused() -> None:
    before = torch.get_num_threads()
    try:
        assert configure_threads(1) == torch.get_num_threads() == 1
        assert 1 <= configure_threads(0) <= MAX_THREADS
        with pytest.raises(LoadError, match="at most 2 threads, 3 were asked for"):
            configure_threads(3)
    finally:
        torch.set_num_threads(before)
