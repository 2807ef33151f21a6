"""Log lines: as text and JSON, never waited for, never without end."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tandem.protocol import logs

log = logging.getLogger("some.logger")


@contextmanager
def writing(log_format: logs.LogFormat = "text", level: str = "info") -> Iterator[Callable[[], list[str]]]:
    """Logs to memory; the lines are those written when the block has ended."""
    stream = io.StringIO()
    writer = logs.configure("scheduler", level, log_format, stream)
    try:
        yield lambda: stream.getvalue().splitlines()
    finally:
        writer.close()


def test_a_json_line_holds_everything() -> None:
    with writing("json") as lines:
        log.info("request %d ended", 7, extra={"fields": {"reason": "length", "total_s": 0.25, "client": 'a "b"\n'}})
        try:
            raise ValueError("no\nway")
        except ValueError:
            log.exception("it failed")
        log.debug("not at this level")
    first, second = (json.loads(line) for line in lines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "process": "scheduler",
        "logger": "some.logger",
        "message": "request 7 ended",
        "reason": "length",
        "total_s": 0.25,
        "client": 'a "b"\n',
    }
    assert "ValueError: no\nway" in second["exception"]


def test_text_cannot_forge_a_line() -> None:
    with writing() as lines:
        log.info("client %s", "x\n2026-01-01 ERROR forged", extra={"fields": {"name": "a b", "n": 3, "none": ""}})
        log.info("\x1b[2J")
    (first, second) = lines()
    assert first.endswith('INFO some.logger: client x\\x0a2026-01-01 ERROR forged name="a b" n=3 none=""')
    assert second.endswith("\\x1b[2J")


def test_who_logs_does_not_wait_for_a_stderr_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING", 100)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, encoding="utf-8") as reader, os.fdopen(write_end, "w", encoding="utf-8") as stream:
        writer = logs.configure("worker", "info", "text", stream)
        try:
            lines = 5_000  # far more than the pipe and the queue hold; nobody reads before all are logged
            for number in range(lines):
                log.info("%s %d", "x" * 100, number)
            written = dropped = 0
            while written + dropped < lines:
                line = reader.readline()
                if found := re.search(r": (\d+) log lines were dropped", line):
                    dropped += int(found[1])
                else:
                    written += 1
        finally:
            writer.close()
    assert written + dropped == lines
    assert dropped > 0


def test_a_warning_that_repeats_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[float] = [1_000.0]
    made = logging.getLogRecordFactory()

    def at_now(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = made(*arguments, **more)
        record.created = now[0]
        return record

    logging.setLogRecordFactory(at_now)
    try:
        with writing() as lines:
            for number in range(25):
                log.warning("client %d is rude", number)
            log.warning("something else")
            for _ in range(30):
                log.info("not a warning")
            now[0] += logs.SPELL_S
            log.warning("client %d is rude", 99)
            for number in range(12):
                log.error("worker %d is rude", number)
    finally:
        logging.setLogRecordFactory(made)
    rude = [line for line in lines() if "client" in line]
    assert len(rude) == logs.BURST + 1
    assert rude[-1].endswith("client 99 is rude (and 15 more like it since)")
    assert sum("not a warning" in line for line in lines()) == 30
    assert sum("something else" in line for line in lines()) == 1
    assert sum("ERROR some.logger: worker" in line for line in lines()) == logs.BURST
    assert lines()[-1].endswith("2 more warnings like 'worker %d is rude' were not written")


def test_different_warnings_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_REMEMBERED", 3)
    with writing() as lines:
        for number in range(50):
            log.warning(f"warning {number}")
    assert len(lines()) == 50


def test_a_line_that_cannot_be_made_does_not_end_the_others() -> None:
    stream = io.StringIO()
    writer = logs.LogWriter(logs.TextLines(), stream)
    for text, arguments in (("%d apples", ("many",)), ("and pears", ())):
        writer.handle(logging.LogRecord("some.logger", logging.INFO, __file__, 1, text, arguments, None))
    writer.close()
    first, second = stream.getvalue().splitlines()
    assert "could not be written" in first
    assert second.endswith("and pears")
