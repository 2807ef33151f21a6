"""Says of grammars whether they can be followed, before a request with one is admitted.

A grammar is tried in a sandbox first (see sandbox.py), since not everything that can happen to the library that
compiles it is bounded by its own limits. Only one that passes is compiled here, on a thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from ...protocol.codec import encode
from ...protocol.structured import StructuredOutputsParams
from .book import GrammarBook
from .compiler import GrammarError
from .sandbox import frame

log = logging.getLogger(__name__)

SILENCE_S: Final = 60.0
"""A sandbox that has said nothing for so long hangs. It bounds processor time itself; this is for a busy machine."""
CLOSE_S: Final = 2.0


class GrammarChecker:
    """Checks grammars one after another on its own thread; `check` may be called from any."""

    def __init__(self, book: GrammarBook) -> None:
        self._book = book
        self._sandbox = Sandbox(book)
        if not book.problem:
            self._sandbox.start()
        self._waiting: queue.SimpleQueue[tuple[StructuredOutputsParams, Callable[[str], None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="grammar-checks", daemon=True)
        self._thread.start()

    def check(self, wanted: StructuredOutputsParams, answer: Callable[[str], None]) -> None:
        """`answer` is called on the checker's thread, with what is wrong or "". Waits for nothing."""
        self._waiting.put((wanted, answer))

    def close(self) -> None:
        """Ends the sandbox and the thread; what waits is not answered. Takes CLOSE_S at most."""
        self._waiting.put(None)
        self._sandbox.kill()
        self._thread.join(CLOSE_S)
        self._sandbox.close()

    def _run(self) -> None:
        while (entry := self._waiting.get()) is not None:
            wanted, answer = entry
            try:
                error = self._judge(wanted)
            except Exception as problem:
                log.exception("a grammar could not be checked")
                error = f"the grammar could not be checked: {problem}"
            answer(error)

    def _judge(self, wanted: StructuredOutputsParams) -> str:
        if self._book.problem or self._book.holds(wanted):
            return self._book.problem
        error = self._sandbox.check(wanted)
        if not error:
            try:
                self._book.prepare(wanted)
            except GrammarError as problem:
                return str(problem)
        return error


class Sandbox:
    """The process that tries grammars. For one thread, but for `kill`."""

    def __init__(self, book: GrammarBook) -> None:
        self._book = book
        self._process: subprocess.Popen[bytes] | None = None
        self._knows_tokens = False
        self._killed = False
        self._lock = threading.Lock()

    def check(self, wanted: StructuredOutputsParams) -> str:
        """What is wrong with a grammar, or "". A sandbox that dies or hangs is replaced, once."""
        for _ in range(2):
            try:
                return self._ask(wanted)
            except (OSError, EOFError) as error:
                log.warning("the grammar sandbox is gone: %s", error)
                self.close()
        return "the grammar could not be checked: its sandbox ended twice"

    def kill(self) -> None:
        """From any thread: wakes `check`, which then fails. For good."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._end(self._process)

    def close(self) -> None:
        """Ends the process, if there is one."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        self._end(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        """It and what it has forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the process, if there is none; does not wait until it is ready. Raises EOFError after `kill`."""
        with self._lock:
            if self._killed:
                raise EOFError("it was killed")
            if self._process is None:
                self._knows_tokens = False
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", f"{__package__}.sandbox"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    process_group=0,
                )
            return self._process

    def _ask(self, wanted: StructuredOutputsParams) -> str:
        process, book = self.start(), self._book
        assert process.stdin is not None
        if not self._knows_tokens:
            about = json.dumps({"vocab_size": book.vocab_size, "eos_token_ids": book.eos_token_ids})
            process.stdin.write(frame(about.encode()) + frame(book.vocabulary))
            self._knows_tokens = True
        process.stdin.write(frame(encode(wanted)))
        process.stdin.flush()
        length = int.from_bytes(self._read(process, 4), "little")
        return self._read(process, length).decode()

    @staticmethod
    def _read(process: subprocess.Popen[bytes], count: int) -> bytes:
        """Exactly `count` bytes. Raises EOFError if the process ends, or says nothing for SILENCE_S."""
        assert process.stdout is not None
        data = b""
        end = time.monotonic() + SILENCE_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while len(data) < count:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise EOFError(f"it said nothing for {SILENCE_S:g} s")
                more = os.read(process.stdout.fileno(), count - len(data))
                if not more:
                    raise EOFError("it ended")
                data += more
        return data
