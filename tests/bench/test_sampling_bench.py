"""The sampling benchmark runs each of its cases. Nothing here asserts a time that was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tandem.bench.sampling import cases_of, make_load, measure
from tandem.worker import sampler

from support.deadlines import DEADLINE_S

CASES = ["temperature", "top-p 0.9", "top-k 50, top-p 0.9", "everything"]


def test_every_case_chooses_tokens_that_exist_and_the_switch_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = make_load(3, 200, 16, torch.device("cpu"))
    for case in (load.greedy, *cases_of(load).values()):
        tokens = case()
        assert tokens.shape == (3,)
        assert ((tokens >= 0) & (tokens < 200)).all()
    monkeypatch.setattr(sampler, "BY_KERNELS", True)
    found = measure(load, 1)
    assert sampler.BY_KERNELS
    assert list(found) == ["product", "greedy", *CASES]


def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "sampling.json"
    arguments = [
        "--rows",
        "2",
        "--vocab",
        "64",
        "--hidden",
        "8",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tandem.bench.sampling", *arguments, "--step-ms", "5"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert (results["rows"], results["vocab"], results["device"]) == (2, 64, "cpu")
    assert set(results["ms"]) == {"product", "greedy", *CASES}
    assert all(ms > 0 for by_way in results["ms"].values() for ms in by_way.values())
    assert "of a step" in done.stdout
    assert "everything" in done.stdout
