"""How the benchmarks end that are programs of their own: what was found goes into a file, what was wrong to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .machine import describe_machine

_FILES: Final = ("out", "plot")
"""Options that only say where files go."""


def write_findings(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """The machine, the options and what was found, as JSON into the file that `options.out` names; None: nowhere."""
    if options.out is None:
        return
    given = {name: value for name, value in vars(options).items() if name not in _FILES}
    if given.get("model") is not None:
        given["model"] = shown_model(given["model"])
    report = {"machine": describe_machine(), "options": given, **found}
    Path(options.out).write_text(json.dumps(report, indent=2) + "\n")


def shown_model(model: str) -> str:
    """A hub id, or a folder as it was given; of an absolute one the name, as where it lies says nothing elsewhere."""
    return Path(model).name if Path(model).is_absolute() else model


def told(wrong: Sequence[str]) -> int:
    """Says what was wrong; returns the exit code."""
    for one in wrong:
        print(f"wrong: {one}", file=sys.stderr)
    return 1 if wrong else 0
