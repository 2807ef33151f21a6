"""The decode kernel in every way without a GPU, in Triton's interpreter, where Triton is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.deadlines import DEADLINE_S

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with torch for CUDA")
def test_spans_are_exact_and_nothing_is_read_before_it_is_written() -> None:
    """In a process of its own, since the interpreter is chosen when Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "support.interpreted_attention"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("exact") == 4
