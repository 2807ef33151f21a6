"""Compiled grammars, kept while they are used: a row that joins copies one, which takes microseconds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from llguidance import LLMatcher, LLTokenizer

from ...protocol.structured import StructuredOutputsParams
from .compiler import GrammarError, compile_grammar, open_tokenizer

MOST: Final = 32
"""Grammars that are kept compiled; one takes from some hundred kilobytes to the 50 MB of `compiler.limits`."""


class GrammarBook:
    """For any thread. All copies of a grammar share what its lexer has learned."""

    def __init__(self, tokenizer: bytes | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`tokenizer`: tokenizer.json, if the model has one. A vocabulary of 150,000 tokens takes about a second."""
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.vocabulary = b"" if tokenizer is None else tokenizer
        self.problem = ""
        """Why no grammar can be followed here; empty if they can."""
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
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

    def matcher(self, wanted: StructuredOutputsParams) -> LLMatcher:
        """A matcher of the caller's own at the grammar's beginning. Raises GrammarError. One that `holds` is copied,
        another one is compiled first, which takes up to the processor time of a check."""
        with self._lock:
            found = self._compiled.get(wanted)
            if found is not None:
                self._compiled.move_to_end(wanted)
                return found.deep_copy()
        if self._tokenizer is None:
            raise GrammarError(self.problem)
        made = compile_grammar(wanted, self._tokenizer)
        with self._lock:
            self._compiled[wanted] = made
            while len(self._compiled) > MOST:
                self._compiled.popitem(last=False)
        return made.deep_copy()

    def discard(self, wanted: StructuredOutputsParams) -> None:
        """Forgets a grammar: what its lexer has learned may be why a copy has met a limit."""
        with self._lock:
            self._compiled.pop(wanted, None)
