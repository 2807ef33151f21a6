"""The products benchmark's arguments, names and report. What it measures needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tandem.bench.products import (
    CLUSTERS,
    HEAD,
    MOST_HEAD_ROWS,
    OFFERS,
    ROTATED,
    SHAPES,
    STAGES,
    Candidate,
    Figures,
    app,
    described,
    line_of,
    offered,
    problems_of,
    read_shapes,
    sized,
    sums_of,
)
from tandem.worker.cublaslt import CublasLt, Product

from support.host_cublaslt import HostAlgorithm, HostCublasLt


def test_shapes_are_names_or_sizes() -> None:
    assert read_shapes("down, output,64x128") == {"down": (4096, 14336), "output": (4096, 4096), "64x128": (64, 128)}
    for text in ("up", "64", "64x", "0x64", "64x100", "64x64x64", ""):
        with pytest.raises(ValueError, match=r"there is no shape .*query-key-value, output"):
            read_shapes(text)


def test_the_head_is_for_rows_that_choose_a_token() -> None:
    todo = problems_of(SHAPES, [256, MOST_HEAD_ROWS + 1])
    assert [(figures.rows, figures.shape) for figures in todo] == [
        *((256, name) for name in SHAPES),
        *((MOST_HEAD_ROWS + 1, name) for name in SHAPES if name != HEAD),
    ]


@pytest.mark.parametrize("rows", [1, 256, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_exceed_the_cache_and_take_equal_turns(shape: str, rows: int) -> None:
    width, depth = SHAPES[shape]
    figures = sized(rows, shape, width, depth)
    assert figures.weights * width * depth * 2 >= ROTATED
    assert figures.products % figures.weights == 0
    assert figures.products >= figures.weights


def test_a_small_product_has_a_graph_that_ends() -> None:
    assert sized(1, "8x8", 8, 8).products < 1000


def test_names_have_the_numbers_of_the_library() -> None:
    """Numbers of cublasLt.h 13.1."""
    assert (STAGES[1], STAGES[18], STAGES[25], STAGES[31], STAGES[35], len(STAGES)) == (
        "16x1", "64x6", "32x10", "8x3", "64xAUTO", 39,
    )  # fmt: skip
    assert (CLUSTERS[0], CLUSTERS[2], CLUSTERS[3], CLUSTERS[27], CLUSTERS[51], len(CLUSTERS)) == (
        "auto", "1x1", "2x1", "15x1", "1x15", 52,
    )  # fmt: skip


def test_algorithms_in_words() -> None:
    attributes = {
        "id": 66,
        "tile": 167,
        "split_k": 2,
        "reduction": 2,
        "swizzle": 1,
        "option": 3,
        "stages": 35,
        "cluster": 3,
    }
    assert described(attributes, 3 << 20) == (
        "tile 112x256, stages 64xAUTO, cluster 2x1, split 2 in 32 bits, swizzle 1, option 3, id 66, workspace 3.0 MiB"
    )
    assert described({"tile": 497, "stages": 38}, 0).startswith("tile 256x112, stages 768xAUTO")
    assert described({"tile": 9999}, 0).startswith("tile #9999, stages -, cluster auto, split 1, swizzle 0")


def test_each_algorithm_is_tried_once() -> None:
    algorithms = [HostAlgorithm(1, workspace=16 << 20), HostAlgorithm(2, workspace=1 << 19), HostAlgorithm(3, sums=2)]
    host = HostCublasLt([*algorithms, *(HostAlgorithm(number) for number in range(10, 7 + OFFERS))])
    found = offered(Product(CublasLt(host), 8, 8, torch.bfloat16), 5)
    numbers = [int.from_bytes(algorithm.data[:8], "little") for algorithm in found]
    assert sorted(numbers) == [1, 2, 3, *range(10, 7 + OFFERS)]
    assert numbers[0] == 3  # needs no workspace


def test_the_report_tells_the_fastest_and_what_a_layer_gains() -> None:
    measured = []
    for shape in ("query-key-value", "output", "gate-up", "down"):
        figures = sized(256, shape, *SHAPES[shape])
        figures.torch_us, figures.torch_error = 100.0, 0.0017
        figures.candidates = [
            Candidate("", {}, "slower", 0, 1.0, error=0.002, screened_us=99.0, us=97.0, ratio=0.97),
            Candidate("", {}, "faster", 0, 1.0, error=0.002, screened_us=99.0, us=90.0, ratio=0.9),
            Candidate("", {}, "screened", 0, 1.0, error=0.002, screened_us=120.0),
            Candidate("", {}, "broken", 0, 1.0, failure="its result is wrong"),
        ]
        measured.append(figures)
    measured[1].candidates[1].ratio = measured[1].candidates[0].ratio = 1.1  # torch's stays
    line = line_of(measured[0]).split()
    assert line[:9] == ["256", "query-key-value", "100.0", "129", "90.0", "143", "0.900", "4", "1"]
    assert "faster; error 2.0e-03, torch's 1.7e-03" in line_of(measured[0])
    assert list(sums_of(measured)) == ["256 rows, a layer's four products: torch 400.0 us, best 370.0 us (0.925)"]
    assert not list(sums_of(measured[:3]))


def test_a_product_without_any_algorithm_is_told() -> None:
    figures = Figures(1, "output", 4096, 4096, 1, 1, torch_us=10.0)
    assert "none could be measured" in line_of(figures)
    assert figures.least_us == 10.0


def test_wrong_arguments_are_told_before_anything_runs() -> None:
    done = CliRunner().invoke(app, ["--shapes", "sideways"])
    assert done.exit_code == 2
    assert "sideways" in done.output


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "out.json")])
    assert done.exit_code == 2
    assert "needs a CUDA device" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_it_measures_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--rows", "64", "--rows", "100", "--shapes", "1024x512,output", "--rounds", "2", "--out", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert not report["failures"]
    assert [(product["rows"], product["shape"]) for product in report["products"]] == [
        (64, "1024x512"), (64, "output"), (100, "1024x512"), (100, "output"),
    ]  # fmt: skip
    for product in report["products"]:
        assert [candidate["ratio"] for candidate in product["candidates"] if candidate["ratio"] is not None]
        assert not any(candidate["failure"] for candidate in product["candidates"])
    assert [(product["rows"], product["shape"]) for product in report["variants"]] == [
        (product["rows"], product["shape"]) for product in report["products"]
    ]
