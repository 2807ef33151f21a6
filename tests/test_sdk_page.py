"""docs/sdk.md is what the docstrings say today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tandem

from support.deadlines import DEADLINE_S

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_current_and_says_something_of_every_name() -> None:
    command = [sys.executable, "-P", str(ROOT / "scripts/make_sdk_docs.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stderr
    text = (ROOT / "docs/sdk.md").read_text()
    for name in tandem.__all__:
        _, _, after = text.partition(f"\n### `{name}")
        assert after.split("\n\n")[1][:1].isalpha(), name
    assert "None\n\n###" not in text
    assert "Field(" not in text
