"""`tandem complete`: texts that the model continues, in the terminal; no chat template, nothing is remembered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import Options
from .dialogue import Dialogue, hold


def complete(*, connect: str | None, worker_options: Options, sampling: Mapping[str, Any]) -> None:
    """Continues texts from stdin, one a line, until its end."""
    hold(
        lambda client, target, ending: _Completions(client, target, ending, sampling),
        name="tandem complete",
        connect=connect,
        worker_options=worker_options,
        sampling=sampling,
    )


class _Completions(Dialogue):
    """Each line is a prompt, spaces at its ends included."""

    HELP = "Enter continues the text, /exit or Ctrl-D ends, Ctrl-C stops an answer."

    def answer(self, line: str) -> None:
        self.stream(line)
