"""The soak's own judgement, and one short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.bench.soak import growing

from support.deadlines import DEADLINE_S
from support.tiny_models import save_tiny


def test_growth_is_told_beyond_what_any_process_has() -> None:
    def memory(half: float, last: float) -> dict[str, dict[str, float]]:
        return {"worker (7)": {"first_mib": 1.0, "half_mib": half, "last_mib": last}}

    assert not growing(memory(100.0, 116.0))
    assert not growing(memory(2_000.0, 2_040.0))
    assert growing(memory(100.0, 117.0)) == ["worker (7) grew from 100.0 MiB halfway to 117.0 MiB"]
    assert growing(memory(2_000.0, 2_041.0))


@pytest.mark.slow
def test_a_short_soak_checks_every_token_and_tells_of_every_process(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    out = tmp_path / "soak.json"
    command = [sys.executable, "-P", "-m", "tandem.bench.soak", "--model", str(tmp_path / "model"), "--device", "cpu"]
    command += ["--seconds", "2", "--prompts", "3", "--longest-prompt", "40", "--most-tokens", "24", "--at-once", "8"]
    command += ["--max-num-seqs", "4", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    found = json.loads(out.read_text())
    # Two seconds say nothing about memory: what grows is what is used for the first time.
    assert found["wrong"] == [], done.stderr
    assert found["finished"] > 0
    assert {name.partition(" ")[0] for name in found["memory"]} >= {"client", "scheduler", "worker"}
