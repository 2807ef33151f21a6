"""Compiled grammars, kept while they are used: a row that joins copies one, which takes microseconds.

Copies share a lexer with what they were copied from, and only one of them can use it at a time. So that the rows of
one grammar need not wait for each other, it is compiled again for them in the background (`grow`), and rows move over.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llguidance import LLMatcher, LLTokenizer

from ...protocol.structured import StructuredOutputsParams
from .compiler import GrammarError, compile_source, open_tokenizer, source_of

MOST: Final = 32
"""Grammars that are kept compiled; one takes from some hundred kilobytes to the 50 MB of `compiler.limits`, for each of
its lexers."""
MOST_LEXERS: Final = 16
"""Of one grammar: more threads do not fill masks side by side."""
MOST_MORE: Final = 32
"""Lexers of all grammars besides the first of each."""
CHEAP_S: Final = 0.1
"""A grammar that takes more processor time to compile is compiled once."""


@dataclass(slots=True, eq=False)
class Lexer:
    """A grammar's, and how many rows use it."""

    origin: LLMatcher
    """At the grammar's beginning."""
    users: int = 0

    def copy(self) -> LLMatcher:
        """At the grammar's beginning, the caller's own but for the lexer."""
        return self.origin.deep_copy()


@dataclass(slots=True, eq=False)
class _Compiled:
    source: str
    """What it is compiled from: writing it can be a loop in Python, for which the threads of a step would wait."""
    lexers: list[Lexer]
    cheap: bool
    grows: bool = False
    """It is with `grow`, or on its way there."""

    def least_used(self) -> Lexer:
        return min(self.lexers, key=lambda lexer: lexer.users)

    def wants_more(self) -> bool:
        return len(self.lexers) < min(MOST_LEXERS, sum(lexer.users for lexer in self.lexers))


class GrammarBook:
    """For any thread."""

    def __init__(self, tokenizer: bytes | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`tokenizer`: tokenizer.json, if the model has one. A vocabulary of 150,000 tokens takes about a second."""
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.vocabulary = b"" if tokenizer is None else tokenizer
        self.problem = ""
        """Why no grammar can be followed here; empty if they can."""
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputsParams, _Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self.grown = 0
        """How many lexers `grow` has added so far."""
        if tokenizer is None:
            self.problem = "the model comes without a tokenizer, which structured outputs need"
        elif not eos_token_ids:
            self.problem = "the model has no end-of-sequence token, with which structured outputs end"
        else:
            try:
                self._tokenizer = open_tokenizer(tokenizer, vocab_size, eos_token_ids)
            except GrammarError as error:
                self.problem = str(error)

    @property
    def mask_words(self) -> int:
        """int32 values of a row's mask: one bit a token."""
        return -(-self.vocab_size // 32)

    def holds(self, wanted: StructuredOutputsParams) -> bool:
        """It is compiled already."""
        with self._lock:
            return wanted in self._compiled

    def prepare(self, wanted: StructuredOutputsParams) -> None:
        """Compiles the grammar unless the book `holds` it. Raises GrammarError."""
        if self.holds(wanted):
            return
        start = time.thread_time()
        source = source_of(wanted)
        lexer = Lexer(self._compile(source))
        made = _Compiled(source, [lexer], cheap=time.thread_time() - start <= CHEAP_S)
        with self._lock:
            self._compiled.setdefault(wanted, made)
            while len(self._compiled) > MOST:
                self._compiled.popitem(last=False)

    def lexer(self, wanted: StructuredOutputsParams) -> Lexer:
        """The grammar's least used, with the caller as one more user, until `release`. Raises GrammarError. A grammar
        that the book does not hold is compiled first, which takes up to the processor time of a check."""
        while True:
            with self._lock:
                found = self._compiled.get(wanted)
                if found is not None:
                    self._compiled.move_to_end(wanted)
                    lexer = found.least_used()
                    lexer.users += 1
                    return lexer
            self.prepare(wanted)

    def release(self, lexer: Lexer) -> None:
        """One user less."""
        with self._lock:
            lexer.users -= 1

    def better(self, wanted: StructuredOutputsParams, lexer: Lexer) -> Lexer | None:
        """One with at least two users less, with the caller as one more, until `release`; None if there is none."""
        with self._lock:
            found = self._compiled.get(wanted)
            if found is None:
                return None
            other = found.least_used()
            if other.users + 1 >= lexer.users:
                return None
            other.users += 1
            return other

    def crowded(self, wanted: StructuredOutputsParams) -> bool:
        """Whether rows share a lexer of the grammar and there may be more. Who is told so calls `grow`; nobody else is
        told so meanwhile."""
        with self._lock:
            found = self._compiled.get(wanted)
            if found is None or found.grows or not found.cheap or not found.wants_more() or not self._has_room():
                return False
            found.grows = True
            return True

    def grow(self, wanted: StructuredOutputsParams, stopped: Callable[[], bool] = lambda: False) -> None:
        """Compiles the grammar again until each of its rows has a lexer, there are too many, or `stopped`. Rows may
        have left since it was `crowded`, and the grammar may have been forgotten or compiled anew."""
        with self._lock:
            found = self._compiled.get(wanted)
            if found is None:
                return
            found.grows = True

        def wants_more() -> bool:
            return self._compiled.get(wanted) is found and found.wants_more() and self._has_room()

        try:
            while not stopped():
                with self._lock:
                    if not wants_more():
                        return
                lexer = Lexer(self._compile(found.source))
                with self._lock:
                    if not wants_more():
                        return
                    found.lexers.append(lexer)
                    self.grown += 1
        except GrammarError:  # it was compiled before, and does as it is
            return
        finally:
            with self._lock:
                found.grows = False

    def discard(self, wanted: StructuredOutputsParams) -> None:
        """Forgets a grammar: what its lexers have learned may be why a copy has met a limit."""
        with self._lock:
            self._compiled.pop(wanted, None)

    def _compile(self, source: str) -> LLMatcher:
        if self._tokenizer is None:
            raise GrammarError(self.problem)
        return compile_source(source, self._tokenizer)

    def _has_room(self) -> bool:
        """For one more lexer, when those that nobody uses are given up, but for new ones of a grammar that still grows.
        With the lock."""
        for give_up in (False, True):
            if give_up:
                for compiled in self._compiled.values():
                    if not compiled.grows:
                        compiled.lexers[1:] = [lexer for lexer in compiled.lexers[1:] if lexer.users]
            if sum(len(compiled.lexers) - 1 for compiled in self._compiled.values()) < MOST_MORE:
                return True
        return False
