"""The processes that this one has started, directly or not, as Linux's /proc tells of them."""

from __future__ import annotations

import os
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> list[int]:
    """All that `pid` has started, and what these have started; what has ended meanwhile is left out."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return found
    for thread in threads:
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children.split():
            found += [int(child), *descendants(int(child))]
    return found


def command_line(pid: int) -> list[str]:
    """Its arguments; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def resident_bytes(pid: int) -> int:
    """The process's resident memory. Raises FileNotFoundError or ProcessLookupError if it has ended."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
