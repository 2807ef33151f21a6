"""What a start and its processes say on stderr."""

from __future__ import annotations

import json

import pytest

from tandem.launch.progress import StartDisplay
from tandem.launch.relay import LAUNCHER
from tandem.launch.status import Progress, Ready


def say_everything(display: StartDisplay) -> None:
    with display:
        display.status("worker", Progress("loading weights", 0.25))
        display.status("worker", Progress("loading weights", 0.5))
        display.status("worker", Ready({}))
    display.output("worker", '{"level": "info", "message": "a step [bold]failed[/]"}')
    display.output("worker", '{"level": "info", "message": "a step')  # it died over it
    display.output("worker", "Segmentation fault")
    display.output(LAUNCHER, "worker was killed by SIGSEGV; starting it again in 0.1 s")


def test_each_line_is_an_object_where_processes_log_so(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(StartDisplay(as_json=True))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = [(line.get("process"), line.get("logger"), line["level"], line["message"]) for line in lines]
    assert told == [
        ("worker", "start", "info", "loading weights"),
        ("worker", "start", "info", "ready"),
        (None, None, "info", "a step [bold]failed[/]"),
        ("worker", "output", "info", '{"level": "info", "message": "a step'),
        ("worker", "output", "info", "Segmentation fault"),
        ("launcher", "output", "info", "worker was killed by SIGSEGV; starting it again in 0.1 s"),
    ]


def test_else_lines_begin_with_who_wrote_them(capsys: pytest.CaptureFixture[str]) -> None:
    say_everything(StartDisplay())
    assert capsys.readouterr().err.splitlines() == [
        "worker: loading weights",
        "worker: ready",
        '[worker] {"level": "info", "message": "a step [bold]failed[/]"}',
        '[worker] {"level": "info", "message": "a step',
        "[worker] Segmentation fault",
        "[launcher] worker was killed by SIGSEGV; starting it again in 0.1 s",
    ]
