"""What a process logs: lines on stderr, as text or as JSON, written by a thread of their own.

Whoever logs never waits for stderr, which a terminal or a full pipe may hold up for as long as it likes: lines wait in
a queue, and those for which it has no room are counted and dropped. A warning or error that comes again and again is
counted rather than repeated, so that no stranger can fill a disk.

A record's `fields` (`log.info("request ended", extra={"fields": {…}})`) become `name=value` behind the text, or members
of the JSON object.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from collections import OrderedDict
from typing import Any, Literal, TextIO, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]

MAX_WAITING = 10_000
"""Lines that wait to be written."""
BURST = 10
"""The same warning is written so often in …"""
SPELL_S = 10.0
"""… so many seconds."""
MAX_REMEMBERED = 256
"""Different warnings that are counted."""
CLOSE_S = 1.0
"""How long the end of a process waits for its last lines."""
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0))}


class TextLines(logging.Formatter):
    """`time LEVEL logger: message name=value`; control characters in messages are escaped."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        parts = [record.message, *(f"{name}={_as_word(value)}" for name, value in _fields(record).items())]
        record.message = " ".join(parts).translate(_CONTROLS)
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """An object a line: time (ISO 8601, UTC), level, process, logger, message, the record's fields, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def json_line(process: str, message: str, logger: str) -> str:
    """What somebody else than a logger says, as a line of JsonLines at level info."""
    return JsonLines(process).format(logging.LogRecord(logger, logging.INFO, __file__, 0, message, (), None))


class LogWriter(logging.Handler):
    """Writes records to a stream in a thread of its own. `close` ends it; until then it may be left at any time."""

    def __init__(self, formatter: logging.Formatter, stream: TextIO) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_WAITING)
        self._dropped = 0
        self._repeats = _Repeats()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held."""
        if record.levelno >= logging.WARNING and not self._repeats.admits(record):
            return
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Waits CLOSE_S at most for what is still to be written. Idempotent."""
        if not self._closing:
            self._closing = True
            for told in self._repeats.rest():
                self.emit(told)
            try:
                self._waiting.put(None, timeout=CLOSE_S)
            except queue.Full:
                pass  # nobody reads; the thread is left to the end of the process
            self._thread.join(CLOSE_S)
        super().close()

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._write(record)
            if self._dropped and self._waiting.empty():
                with self.lock or contextlib.nullcontext():
                    dropped, self._dropped = self._dropped, 0
                self._write(_told(f"{dropped} log lines were dropped: stderr took no more of them"))

    def _write(self, record: logging.LogRecord) -> None:
        try:
            self._stream.write(self.format(record) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            return  # stderr is gone: nobody is left to read
        except Exception as error:  # noqa: BLE001 - arguments that do not fit a message must not end the thread
            self._stream.write(f"a log line could not be written: {error!r}\n")


class _Repeats:
    """Which warnings are written, and how many like them were not."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str], list[float]] = OrderedDict()
        """By logger and message before its arguments: when a spell began, how many it had."""

    def admits(self, record: logging.LogRecord) -> bool:
        key = (record.name, str(record.msg)[:200])
        began, count = self._seen.pop(key, [record.created, 0])
        kept = self._seen[key] = [began, count + 1]
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)
        if record.created - began >= SPELL_S:
            more = int(count) - BURST
            kept[:] = [record.created, 1]
            if more > 0:
                record.msg = f"{record.msg} (and {more} more like it since)"
            return True
        return kept[1] <= BURST

    def rest(self) -> list[logging.LogRecord]:
        """What would have been told with the next of their kind."""
        return [
            _told(f"{int(count) - BURST} more warnings like {text!r} were not written", name)
            for (name, text), (_, count) in self._seen.items()
            if count > BURST
        ]


def configure(process: str, level: str, log_format: LogFormat, stream: TextIO | None = None) -> LogWriter:
    """Makes everything that this process logs, from `level` on, go to `stream` (stderr). The writer is to be closed at
    the process's end; that takes it off again."""
    formatter = JsonLines(process) if log_format == "json" else TextLines()
    return _RootWriter(formatter, stream or sys.stderr, level.upper())


class _RootWriter(LogWriter):
    def __init__(self, formatter: logging.Formatter, stream: TextIO, level: str) -> None:
        super().__init__(formatter, stream)
        self._former_level = logging.root.level
        logging.root.addHandler(self)
        logging.root.setLevel(level)

    def close(self) -> None:
        if self in logging.root.handlers:
            logging.root.removeHandler(self)
            logging.root.setLevel(self._former_level)
        super().close()


def _told(text: str, name: str = __name__) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, __file__, 0, text, (), None)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, "fields", {})
    return found


def _as_word(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(one in text for one in ' "=') else text
