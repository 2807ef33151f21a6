"""The attention benchmark's arguments and report. What it measures needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tandem.bench.attention import (
    LOADS,
    RAGGED,
    TODAY,
    WAYS,
    Figures,
    LoadFigures,
    app,
    lines_of,
    read_load,
    read_ways,
)


def test_loads_are_rows_of_one_length_or_ragged() -> None:
    assert read_load("3 x 700") == read_load("3x700") == [700] * 3
    ragged = read_load("256 ragged")
    assert ragged == read_load("256 ragged")
    assert len(ragged) == 256
    assert RAGGED[0] <= min(ragged) < max(ragged) <= RAGGED[1]


@pytest.mark.parametrize("text", ["", "3", "x 3", "0 x 5", "5 x 0", "0 ragged", "3 x ragged", "-1 x 5", "3 x 5 x 7"])
def test_another_load_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"is neither 'ROWS x TOKENS' nor 'ROWS ragged'"):
        read_load(text)


def test_todays_way_is_measured_whatever_else_is() -> None:
    assert list(read_ways("even-3,equal-2,even-3")) == [TODAY, "even-3", "equal-2"]
    assert read_ways("all") == WAYS[2]
    assert read_ways("even", 1) == {TODAY: WAYS[1][TODAY], "even": WAYS[1]["even"]}
    with pytest.raises(ValueError, match=r"no variant 'evener'; there are today, even-3"):
        read_ways("even-3,evener")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--load", "many"], "many"), (["--variants", "evener"], "evener"), (["--kv-cache-dtype", "int8"], "int8")],
)
def test_wrong_arguments_are_told_before_anything_runs(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "out.json")])
    assert done.exit_code == 2
    assert "needs a CUDA device" in done.output
    assert not list(tmp_path.iterdir())


def test_the_report_tells_shares_and_ratios() -> None:
    found = LoadFigures(rows=32, tokens=100, rest_us=50.0)
    found.ways[TODAY] = Figures(WAYS[2][TODAY], 125.0, 200.0, 100.0, 1.0, 0.0)
    found.ways["equal-2"] = Figures(WAYS[2]["equal-2"], 100.0, 160.0, 100.0, 0.84, 1e-3)
    lines = lines_of("32 x 3", found)
    assert "floor 100.0 us a layer, the rest of a layer 50.0 us" in lines[0]
    assert lines[2].split() == ["today", "125.0", "80.0%", "200.0", "50.0%", "1.000", "1.000", "0.0e+00"]
    assert lines[3].split() == ["equal-2", "100.0", "100.0%", "160.0", "62.5%", "0.800", "0.840", "1.0e-03"]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("fp8", 1)])
def test_it_measures_and_writes(dtype: str, size: int, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--load", "4 x 300", "--kv-cache-dtype", dtype, "--rounds", "2", "--out", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (load,) = json.loads(out.read_text())["loads"].values()
    assert list(load["ways"]) == list(WAYS[size])
    assert (load["rows"], load["tokens"]) == (4, 1200)


def test_usual_loads_can_be_read() -> None:
    assert [len(read_load(load)) for load in LOADS] == [32, 256, 32]
