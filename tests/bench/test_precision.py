"""What 8 bits cost is told of the same weights and tokens. Nothing here asserts how much it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tandem.bench.precision import CASES, compare, main

from support.tiny_models import save_flashinfer_sized


def test_errors_are_relative_and_the_worst_position_is_told() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = compare(exact, torch.tensor([[3.0, 4.0], [2.5, 2.0]]))
    assert found["relative_error"] == pytest.approx(2.5 / 29**0.5)
    assert found["worst_position"] == pytest.approx(1.25)
    assert found["same_likeliest"] == 0.5


def test_both_cases_are_measured_on_one_model(tmp_path: Path) -> None:
    save_flashinfer_sized(tmp_path / "model")
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--sequences", "1", "--tokens", "24", "--chunk", "10", "--out", str(out)]
    assert main(["--model", str(tmp_path / "model"), *options]) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["cores"] > 0
    assert report["options"]["tokens"] == 24
    assert str(tmp_path) not in json.dumps(report)
    found = report["8 bits against 16"]
    assert list(found) == list(CASES)
    assert all(0 < case["relative_error"] < 1 for case in found.values())
    assert 0 < report["16 bits against 32"]["relative_error"] < min(case["relative_error"] for case in found.values())
