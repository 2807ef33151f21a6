"""Which algorithm computes a product: chosen by trying, kept on disk, and left to torch wherever it does not fit.

The library's functions compute on the host (support/host_cublaslt.py), and times are what the tests say.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.worker import operators, product_trials, products
from tandem.worker.cublaslt import TILES, Algorithm, CublasLt, Product
from tandem.worker.product_store import Store
from tandem.worker.product_trials import CLUSTERS_TRIED, Case, Wanted, variants, wanted
from tandem.worker.products import LEAST_SHARE, TunedProducts

from support.host_cublaslt import HostAlgorithm, HostCublasLt

WIDTH, DEPTH = 24, 16
MADE_ON = {"device": "H", "cublaslt": 1}
CPU = torch.device("cpu")
TORCH_US = 100.0


def aligned(values: Tensor) -> Tensor:
    """The same values where an algorithm may find them."""
    room = torch.empty(values.numel() + 128, dtype=values.dtype)
    start = -room.data_ptr() % 256 // values.element_size()
    return room[start : start + values.numel()].view_as(values).copy_(values)


def weight(seed: int = 0) -> Tensor:
    return aligned(torch.randn(WIDTH, DEPTH, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16))


def rows(count: int) -> Tensor:
    return aligned(torch.randn(count, DEPTH, generator=torch.Generator().manual_seed(count)).to(torch.bfloat16))


class Bench:
    """A library on the host, and a clock on which each algorithm takes what `us` says; what it does not name, and
    torch, take TORCH_US."""

    def __init__(self, algorithms: list[HostAlgorithm], us: dict[int, float], folder: Path) -> None:
        self.host, self.us, self.folder = HostCublasLt(algorithms), us, folder
        self.tried: list[int] = []
        """Numbers of rows, in order, of what was launched while trying."""
        self.tuned = TunedProducts(CublasLt(self.host), CPU, stream=lambda: 7, multiprocessors=132)

    def measure(self, launch: Callable[[], None], _times: int) -> float:
        before = len(self.host.launches)
        launch()
        if len(self.host.launches) == before:
            return TORCH_US
        last = self.host.launches[-1]
        self.tried.append(last.count)
        return self.us.get(last.number, TORCH_US)

    def tune(self, *counts: int, made_on: dict[str, Any] = MADE_ON, **options: Any) -> None:
        store = Store(self.folder, made_on)
        self.tuned.tune([Wanted([weight()], set(counts))], store, self.measure, **options)
        self.host.launches.clear()

    def by(self, count: int) -> int | None:
        """The algorithm that computes a product of so many rows, if one does; it must compute that."""
        given, by = rows(count), weight(1)
        out = self.tuned.product(given, by)
        if out is None:
            return None
        torch.testing.assert_close(out, given @ by.t())
        return self.host.launches[-1].number


def test_the_fastest_computes_the_product(tmp_path: Path) -> None:
    bench = Bench([HostAlgorithm(number) for number in (1, 2, 3)], {1: 95.0, 2: 80.0, 3: 81.0}, tmp_path)
    bench.tune(16)
    assert bench.by(16) == 2
    assert bench.host.launches[-1].stream == 7


@pytest.mark.parametrize(("us", "number"), [(97.9, 1), (98.1, None), (120.0, None)])
def test_torch_stays_unless_another_gains(us: float, number: int | None, tmp_path: Path) -> None:
    bench = Bench([HostAlgorithm(1)], {1: us}, tmp_path)
    bench.tune(16)
    assert bench.by(16) == number


@pytest.mark.parametrize(
    "broken",
    [
        HostAlgorithm(1, factor=1.1),  # computes something else
        HostAlgorithm(1, status=13),  # fails
        HostAlgorithm(1, sums=4),  # rounds parts of sums
        HostAlgorithm(1, workspace=1 << 40),
    ],
)
def test_the_fastest_is_not_taken_if_it_is_not_right(broken: HostAlgorithm, tmp_path: Path) -> None:
    bench = Bench([broken, HostAlgorithm(2)], {1: 10.0, 2: 80.0}, tmp_path)
    bench.tune(16)
    assert bench.by(16) == 2


def test_other_numbers_of_rows_take_the_next_larger_if_it_is_near_and_suits(tmp_path: Path) -> None:
    bench = Bench([HostAlgorithm(1, suits=lambda count: count % 2 == 0)], {1: 50.0}, tmp_path)
    bench.tune(16, 40)
    least = int(LEAST_SHARE * 40)
    assert {count: bench.by(count) for count in (14, 16, 18, least - 2, least, 38, 40)} == {
        14: 1, 16: 1, 18: None, least - 2: None, least: 1, 38: 1, 40: 1,
    }  # fmt: skip
    assert bench.by(39) is None  # which it cannot compute
    assert bench.by(42) is None  # none larger was tried
    assert bench.tuned.product(rows(0), weight()) is None


def test_what_the_next_larger_leaves_to_torch_is_torchs(tmp_path: Path) -> None:
    bench = Bench([HostAlgorithm(1, suits=lambda count: count != 16)], {1: 50.0}, tmp_path)
    bench.tune(16, 20)
    assert bench.by(16) is None
    assert bench.by(15) is None
    assert bench.by(20) == 1


def test_other_shapes_and_dtypes_and_layouts_are_torchs(tmp_path: Path) -> None:
    bench = Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path)
    bench.tune(16)
    given, by = rows(16), weight()
    assert bench.tuned.product(given, by) is not None
    assert bench.tuned.product(given, by[:8]) is None
    assert bench.tuned.product(given.float(), by.float()) is None
    assert bench.tuned.product(given.half(), by.half()) is None
    assert bench.tuned.product(aligned(torch.randn(DEPTH, 16)).to(torch.bfloat16).t(), by) is None
    turned = aligned(torch.randn(DEPTH, WIDTH).to(torch.bfloat16)).t()
    assert turned.shape == by.shape
    assert bench.tuned.product(given, turned) is None
    beside = aligned(torch.randn(17, DEPTH).to(torch.bfloat16))[1:]  # 32 bytes behind
    assert beside.is_contiguous()
    assert bench.tuned.product(beside, by) is None


def test_one_that_fails_in_use_is_told_and_torch_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path)
    bench.tune(16)
    bench.host.algorithms[0].status = 14
    assert bench.by(16) is None
    assert "16 rows by a weight of 24 x 16 are torch's again: cublasLtMatmul: STATUS_14" in caplog.text
    bench.host.algorithms[0].status = 0
    assert bench.by(16) is None
    assert len(caplog.records) == 1


def test_a_second_start_tries_nothing_that_is_known(tmp_path: Path) -> None:
    algorithms = [HostAlgorithm(1, suits=lambda count: count < 30), HostAlgorithm(2)]
    Bench(algorithms, {1: 50.0, 2: 60.0}, tmp_path).tune(16, 32)
    again = Bench(algorithms, {1: 1.0, 2: 200.0}, tmp_path)
    again.tune(16, 32, 64)
    assert set(again.tried) == {64}
    assert [again.by(count) for count in (16, 32, 64)] == [1, 2, None]
    third = Bench(algorithms, {}, tmp_path)
    third.tune(64, 32)
    assert not third.tried
    assert [third.by(count) for count in (16, 32, 64)] == [None, 2, None]


def test_what_the_library_no_longer_takes_is_tried_anew(tmp_path: Path) -> None:
    Bench([HostAlgorithm(1), HostAlgorithm(2)], {1: 50.0}, tmp_path).tune(16, 32)
    later = Bench([HostAlgorithm(1, suits=lambda count: count > 16), HostAlgorithm(2)], {2: 70.0}, tmp_path)
    later.tune(16, 32)
    assert set(later.tried) == {16}
    assert [later.by(count) for count in (16, 32)] == [2, 1]


def test_choices_hold_for_one_device_and_version(tmp_path: Path) -> None:
    Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path).tune(16)
    other = Bench([HostAlgorithm(1)], {1: 200.0}, tmp_path)
    other.tune(16, made_on=MADE_ON | {"cublaslt": 2})
    assert other.tried
    assert other.by(16) is None
    assert len(list(tmp_path.iterdir())) == 2
    # Names of files are made of what they hold for, but do not tell all of it.
    store = Store(tmp_path, {"device": "H?", "cublaslt": 1})
    store.path.write_text(json.dumps({"made_on": {"device": "H!", "cublaslt": 1}, "choices": []}))
    assert store.path == Store(tmp_path, {"device": "H!", "cublaslt": 1}).path
    assert store.read() == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        json.dumps({"made_on": MADE_ON, "choices": [1]}),
        json.dumps({"made_on": MADE_ON, "choices": [{"rows": 16}]}),
        json.dumps({"made_on": MADE_ON, "choices": [
            {"rows": 16, "width": WIDTH, "depth": DEPTH, "dtype": "bfloat16", "algorithm": "00ff", "workspace": 0}
        ]}),
        json.dumps({"made_on": MADE_ON, "choices": [
            {"rows": 16, "width": WIDTH, "depth": DEPTH, "dtype": "float32", "algorithm": None, "workspace": 0}
        ]}),
    ],
)  # fmt: skip
def test_a_file_that_is_broken_is_told_and_replaced(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, MADE_ON)
    store.path.write_text(text)
    bench = Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path)
    bench.tune(16)
    assert bench.by(16) == 1
    assert "cannot be used, and products are tried anew" in caplog.text
    assert list(store.read()) == [Case(16, WIDTH, DEPTH, torch.bfloat16)]


def test_choices_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path / "not" / "there", MADE_ON)
    assert store.read() == {}
    choices = {
        Case(16, 8, 24, torch.bfloat16): Algorithm(bytes(range(64)), 1 << 20),
        Case(32, 8, 24, torch.float16): None,
    }
    store.write(choices)
    assert store.read() == choices
    assert [path.name for path in store.path.parent.iterdir()] == [store.path.name]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    bench = Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path / "file")
    bench.tune(16)
    assert bench.by(16) == 1
    assert "cannot be kept" in caplog.text


def test_time_that_runs_out_leaves_the_rest_for_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path)
    first.tune(16, 64, 32, budget_s=1.5, clock=iter([0.0, 1.0, 1.4, 1.6]).__next__)
    assert [first.by(count) for count in (64, 32, 16)] == [1, 1, None]
    assert "2 of 3 products are faster than torch's; 2 were tried now, and 1 are left" in caplog.text
    second = Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path)
    second.tune(16, 64, 32)
    assert set(second.tried) == {16}
    assert second.by(16) == 1


def test_weights_take_turns(tmp_path: Path) -> None:
    bench = Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path)
    weights = [weight(seed) for seed in range(3)]
    bench.tuned.tune([Wanted(weights, {16})], Store(tmp_path, MADE_ON), bench.measure)
    seen = [launch.weight for launch in bench.host.launches]
    assert set(seen) == {one.data_ptr() for one in weights}


def test_variants_fill_the_device_as_the_library_allows() -> None:
    number_of = {size: number for number, size in enumerate(TILES)}
    wide, narrow, small = number_of[128, 256], number_of[112, 256], number_of[64, 64]
    host = HostCublasLt([HostAlgorithm(1, tiles=(small, wide, narrow, 10_000, wide)), HostAlgorithm(2)])
    library = CublasLt(host)
    product = Product(library, 28672, 8, torch.bfloat16)
    bases = product.offers(256, most=9)

    def found(tiles: int) -> list[tuple[int, ...]]:
        made = variants(library, product, bases, 256, 132, tiles=tiles)
        return [tuple(int.from_bytes(one.data[at : at + 8], "little") for at in (0, 8, 16)) for one in made]

    # 256 tiles of 112 x 256 nearly fill 2 x 132 places; of 128 x 256 there are only 224.
    assert found(1) == [(1, narrow, cluster) for cluster in CLUSTERS_TRIED]
    assert {tile for _, tile, _ in found(9)} == {narrow, wide, small}
    assert [cluster for _, tile, cluster in found(9) if tile == wide] == [2]  # in no other, says the library
    assert not variants(library, product, bases[1:], 256, 132, tiles=9)


def test_variants_are_tried_if_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([HostAlgorithm(1, tiles=(20, 24))], {1: 90.0}, tmp_path)
    monkeypatch.setattr(product_trials, "VARIED", 1)
    varied: set[bytes] = set()

    def measure(launch: Callable[[], None], times: int) -> float:
        us = bench.measure(launch, times)
        data = bench.host.launches[-1].data if bench.host.launches and us != TORCH_US else b""
        varied.add(data[8:16])
        return us - (data[8:9] == bytes([20])) * 10

    bench.tuned.tune([Wanted([weight()], {16})], Store(tmp_path, MADE_ON), measure)
    assert varied >= {number.to_bytes(8, "little") for number in (20, 24)}
    (chosen,) = Store(tmp_path, MADE_ON).read().values()
    assert chosen is not None
    assert chosen.data[8] == 20
    assert bench.by(16) == 1


def test_what_is_wanted_goes_by_shape_and_leaves_out_what_has_kernels() -> None:
    first, second, other = weight(), weight(1), torch.empty(8, DEPTH, dtype=torch.bfloat16)

    def takes(operator: str, count: int, _weight: Tensor) -> bool:
        return count <= {"product": 16, "gated_product": 32, "likeliest": 8}[operator]

    found = wanted(
        [
            ("gated_product", first, [16, 32, 64]),
            ("product", second, [16, 32]),
            ("product", first, [128]),
            ("likeliest", other, [8, 16]),
        ],
        takes,
    )
    assert [one.rows for one in found] == [{64, 32, 128}, {16}]
    assert [[by.data_ptr() for by in one.weights] for one in found] == [
        [first.data_ptr(), second.data_ptr()],
        [other.data_ptr()],
    ]
    assert sorted(found[1].cases()) == [Case(16, 8, DEPTH, torch.bfloat16)]


@pytest.fixture
def in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One that the operators of ours find."""
    bench = Bench([HostAlgorithm(1)], {1: 50.0}, tmp_path)
    bench.tune(16)
    monkeypatch.setitem(products._in_use, CPU, bench.tuned)
    return bench


def test_operators_compute_by_what_was_chosen(in_use: Bench) -> None:
    given, by = rows(16), weight(3)
    torch.testing.assert_close(torch.ops.tandem.product(given, by), given @ by.t())
    assert torch.equal(operators.likeliest(given, by), (given @ by.t()).argmax(-1))
    assert [launch.number for launch in in_use.host.launches] == [1, 1]
    torch.testing.assert_close(operators.product(rows(5), by), rows(5) @ by.t())
    assert len(in_use.host.launches) == 2


def test_without_a_library_torch_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    products.prepare([], CPU, tmp_path, lambda _phrase, _share: None)
    assert CPU not in products._in_use
    assert "products are computed as torch chooses: this build of torch has no CUDA" in caplog.text
    given, by = rows(3), weight()
    assert torch.equal(products.product(given, by), given @ by.t())
