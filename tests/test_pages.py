"""What the pages name is there: tests, files, other pages and their headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PATH = re.compile(r"`(tests(?:/[\w.]+)+)(?:::\w+)?`")
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
TABLES = {"traps.md": 16, "security.md": 12, "reliability.md": 14}
"""Pages with a table whose every row names a test that holds it to its word, and how many rows there are at least."""


def has_test(file: str, name: str) -> bool:
    text = (ROOT / file).read_text()
    return re.search(rf"^(async def|def|class) {name}\b|^{name} = ", text, re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path
    for file, name in TEST.findall(text):
        assert has_test(file, name), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue  # elsewhere
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in [_anchor(heading) for heading in headings], f"{target}#{anchor}"


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", TABLES)
def test_every_promise_of_a_table_names_its_test(name: str) -> None:
    tables = re.findall(
        r"^\| [^\n]+ \| test \|\n\|[ -|]+\|\n((?:\|.+\n)+)", (ROOT / "docs" / name).read_text(), re.MULTILINE
    )
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) >= TABLES[name]
    for row in rows:
        assert TEST.search(row), f"no test is named: {row}"
