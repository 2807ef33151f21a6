"""The kernels of masks, bad words, biases and penalties without a GPU, where Triton is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.deadlines import DEADLINE_S
from support.triton_interpreter import AVAILABLE, VARIABLE

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton, which comes with torch for CUDA")
def test_logits_and_tables_are_those_of_plain_torch() -> None:
    """In a process of its own, since the interpreter is chosen when Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "support.adjusting_cases"],
        cwd=TESTS,
        env={**os.environ, VARIABLE: "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "cases equal, interpreted: True" in done.stdout
