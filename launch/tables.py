"""What tables and lines for people share."""

from __future__ import annotations

from rich.console import Console


def wide_console(plain_width: int) -> Console:
    """For stdout; of so many columns, enough for every one of a table, where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=plain_width)


def some(count: int, what: str) -> str:
    """1 core, 2 cores."""
    return f"{count} {what}{'' if count == 1 else 's'}"
