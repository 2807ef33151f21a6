"""A thread on which grammars that are crowded are compiled again (see book.py), while their rows go on."""

from __future__ import annotations

import queue
import threading
from typing import Final

from ...protocol.structured import StructuredOutputsParams
from .book import GrammarBook

CLOSE_S: Final = 2.0
"""A lexer takes little processor time (`book.CHEAP_S`); this is for a busy machine."""


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

    def close(self) -> None:
        """Ends the thread once the lexer that it is at is compiled, which takes CLOSE_S at most: an interpreter that
        ends beneath the library crashes."""
        self._closing.set()
        self._wanted.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            self._book.grow(wanted, self._closing.is_set)
