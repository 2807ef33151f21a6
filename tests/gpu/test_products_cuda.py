"""Products by algorithms of cublasLt's: what torch computes, in launches and in graphs, and in a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.worker import product_trials, products
from tandem.worker.cublaslt import ALIGNMENT, MOST_WORKSPACE, WIDE_SUMS, CublasLt, Product
from tandem.worker.product_trials import Case

from support.cuda import random
from support.paged import Sequences, load, quiet, random_tokens
from support.tiny_models import VOCAB, save_flashinfer_sized

pytestmark = pytest.mark.gpu

WIDTH, DEPTH = 6144, 4096


def close(got: Tensor, rows: Tensor, weight: Tensor) -> bool:
    """As near as two ways to round in 16 bits come."""
    exact = rows.double() @ weight.double().t()
    return bool((got.double() - exact).norm() <= 4e-3 * exact.norm())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, products.TunedProducts]:
    """An algorithm is chosen however slow it is; what is in use, which is nothing yet."""
    monkeypatch.setattr(product_trials, "LEAST_GAIN", -100.0)
    monkeypatch.setattr(products, "_in_use", {})
    return products._in_use


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("width", "depth"), [(WIDTH, DEPTH), (4096, 14336), (512, 256), (384, 1000)])
def test_every_algorithm_that_is_offered_computes_the_product(width: int, depth: int, dtype: torch.dtype) -> None:
    weight = random(width, depth, scale=0.02, dtype=dtype)
    workspace = torch.empty(MOST_WORKSPACE, dtype=torch.uint8, device="cuda")
    product, stream = Product(CublasLt(), width, depth, dtype), torch.cuda.current_stream().cuda_stream
    for count in (1, 40, 100, 256, 300):
        rows = random(count, depth, dtype=dtype, seed=count)
        offers = product.offers(count, most=32, sums=WIDE_SUMS)
        assert offers
        for algorithm in offers:
            assert product.workspace_of(algorithm, count) in range(MOST_WORKSPACE + 1)
            out = torch.full((count, width), float("nan"), dtype=dtype, device="cuda")
            product.launch(algorithm, rows, weight, out, workspace, stream)
            assert close(out, rows, weight)


def test_what_was_chosen_computes_in_launches_and_in_graphs(
    always: dict[torch.device, products.TunedProducts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [random(WIDTH, DEPTH, scale=0.02, seed=seed) for seed in range(3)]
    device = weights[0].device
    uses = [("product", weight, [16, 300]) for weight in weights] + [("likeliest", weights[0], [64])]
    products.prepare(uses, torch.device("cuda"), tmp_path, quiet)
    first = always[device]
    given, by = random(300, DEPTH), weights[1]
    for count in (300, 290, 64, 200, 1):
        assert close(products.product(given[:count], by), given[:count], by)
    chosen = {case.rows for case, found in first._found.items() if found is not None}
    assert chosen == {300, 290, 64}
    products.product(given, by)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products.product(given, by)
    for seed in (1, 2):
        given.copy_(random(300, DEPTH, seed=seed))
        captured.fill_(float("nan"))
        graph.replay()
        assert close(captured, given, by)

    def tried(*_: Any) -> float:
        raise AssertionError("tried again, although it is known")

    always.clear()
    monkeypatch.setattr(products, "_device_us", tried)
    products.prepare(uses, device, tmp_path, quiet)
    assert always[device]._chosen == first._chosen
    assert close(products.product(given, by), given, by)


def test_rows_that_lie_elsewhere_are_torchs(always: dict[torch.device, products.TunedProducts], tmp_path: Path) -> None:
    weight, room = random(512, 200, scale=0.02), random(41, 200)
    products.prepare([("product", weight, [40])], weight.device, tmp_path, quiet)
    rows = room[1:]
    assert rows.data_ptr() % ALIGNMENT
    assert always[weight.device].product(rows, weight) is None
    assert close(products.product(rows, weight), rows, weight)
    assert close(products.product(room[:40], weight), room[:40], weight)


def test_a_model_computes_what_it_computed(always: dict[torch.device, products.TunedProducts], tmp_path: Path) -> None:
    """In launches and in captured pieces, beside the model uncompiled and in float32."""
    save_flashinfer_sized(tmp_path)
    lengths = (40, 96, 64)
    results = {}
    for name, dtype in {"exact": "float32", "plain": "bfloat16", "tuned": "bfloat16", "captured": "bfloat16"}.items():
        model = load(tmp_path, device="cuda", dtype=dtype)
        if name in ("tuned", "captured"):
            model.compile()
            model.tune_products([40], [40, 64, 96], tmp_path / "cache", quiet)
        sequences = Sequences(model, block_size=16, in_pieces=name == "captured")
        if name == "captured":
            model.capture_pieces([64, 96], torch.cuda.graph_pool_handle(), quiet)
        for number, length in enumerate(lengths):
            sequences.add(random_tokens(length, VOCAB, number))
        steps = [sequences.step([(number, length)]) for number, length in enumerate(lengths)]
        results[name] = torch.cat([logits.float() for step in steps for logits in step.values()])
    (tuned,) = always.values()
    used = {case for case, found in tuned._found.items() if found is not None}
    assert {case.rows for case in used} >= {64, 96}  # the largest first, as far as its seconds go
    assert Case(96, 512, 256, torch.bfloat16) in used

    def relative(name: str) -> float:
        return float((results[name] - results["exact"]).norm() / results["exact"].norm())

    for name in ("tuned", "captured"):
        assert relative(name) < 3e-2
        assert relative(name) < 1.5 * relative("plain") + 1e-3
