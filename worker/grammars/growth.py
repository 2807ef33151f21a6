"""A thread on which grammars that are crowded are compiled again (see book.py), while their rows go on."""

from __future__ import annotations

import queue
import threading

from ...protocol.structured import StructuredOutputsParams
from .book import GrammarBook


class Growth:
    """`want` may be called from any thread."""

    def __init__(self, book: GrammarBook) -> None:
        self._book = book
        self._closing = threading.Event()
        self._wanted: queue.SimpleQueue[StructuredOutputsParams | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="grammar-growth", daemon=True)
        self._thread.start()

    def want(self, wanted: StructuredOutputsParams) -> None:
        """Lets a grammar of which the book says that it is crowded grow; waits for nothing."""
        self._wanted.put(wanted)

    def close(self, timeout_s: float) -> None:
        """Ends the thread once the lexer that it is at is compiled, or does not wait for it any longer."""
        self._closing.set()
        self._wanted.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            self._book.grow(wanted, self._closing.is_set)
