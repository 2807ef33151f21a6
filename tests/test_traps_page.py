"""Each test that docs/traps.md names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_named_test_exists() -> None:
    rows = [line for line in (ROOT / "docs/traps.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 16
    for row in rows:
        found = NAMED.findall(row)
        assert found, f"no test is named: {row}"
        for file, name in found:
            text = (ROOT / file).read_text()
            assert re.search(rf"^(async def|def|class) {name}\b|^{name} = ", text, re.MULTILINE), f"{file}::{name}"
