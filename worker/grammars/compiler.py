"""From a StructuredOutputsParams to an llguidance matcher, within limits."""

from __future__ import annotations

import json
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from ...protocol.structured import StructuredOutputsParams

LONGEST_ERROR: Final = 1_000
_META: Final = frozenset(r"\.+*?()|[]{}^$#&-~/")
"""Characters that mean something in a regular expression, or end it where Lark writes one."""


class GrammarError(Exception):
    """A grammar cannot be used, or cannot be followed any further; the message says why."""


def limits() -> LLParserLimits:
    """What a grammar may take: some ten milliseconds for a token, and 50 MB for what its lexer learns on the way. They
    are kept at compiling and at every token."""
    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=25_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


def open_tokenizer(tokenizer: bytes, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """The vocabulary of tokenizer.json, widened or cut to the model's logits. Raises GrammarError if it cannot be
    used."""
    try:
        text = _adapted(tokenizer.decode(), vocab_size)
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:  # of a file of any form
        raise GrammarError(f"the model's tokenizer cannot be used: {_first(str(error))}") from error


def _adapted(tokenizer: str, vocab_size: int) -> str:
    """tokenizer.json as llguidance takes it: a Metaspace decoder, which it does not know, as the steps that it consists
    of, and without added tokens for which the model has no logits (fine-tunes are often given more than they use)."""
    content = json.loads(tokenizer)
    added, decoder = content.get("added_tokens") or [], content.get("decoder") or {}
    changes: dict[str, Any] = {}
    if any(token["id"] >= vocab_size for token in added):
        changes["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    if decoder.get("type") == "Metaspace":
        space = {"type": "Replace", "pattern": {"String": decoder.get("replacement", "▁")}, "content": " "}
        changes["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps({**content, **changes}) if changes else tokenizer


def compile_grammar(wanted: StructuredOutputsParams, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the grammar's beginning. Raises GrammarError. It is bounded by `limits` in most cases but not in
    all: see sandbox.py."""
    return compile_source(source_of(wanted), tokenizer)


def source_of(wanted: StructuredOutputsParams) -> str:
    """The grammar as `compile_source` takes it. Runs in Python in part. Raises GrammarError."""
    try:
        return _source(wanted)
    except (ValueError, RecursionError) as error:
        raise GrammarError(_first(str(error))) from error


def compile_source(source: str, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the grammar's beginning. Runs without the interpreter's lock. Raises GrammarError."""
    try:
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits())
    except (ValueError, RecursionError) as error:
        raise GrammarError(_first(str(error))) from error
    raise_error(matcher)
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """Why the matcher is of no use any more, or ""."""
    return _first(matcher.get_error()) if matcher.is_error() else ""


def raise_error(matcher: LLMatcher) -> None:
    """Raises GrammarError if the matcher is of no use any more."""
    error = error_of(matcher)
    if error:
        raise GrammarError(error)


def _source(wanted: StructuredOutputsParams) -> str:
    if wanted.json is not None or wanted.json_object:
        schema = json.dumps({"type": "object"}) if wanted.json is None else wanted.json
        if wanted.disable_any_whitespace:
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        if wanted.whitespace_pattern is not None:
            return LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": wanted.whitespace_pattern}
            )
        return LLMatcher.grammar_from_json_schema(schema)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice:
        return LLMatcher.grammar_from_regex("|".join(map(_escape, wanted.choice)))
    if wanted.grammar is not None:
        return grammar_from("grammar", wanted.grammar)
    raise GrammarError("no grammar is given")


def _escape(text: str) -> str:
    """A regular expression that matches exactly this text."""
    return "".join(
        f"\\{char}" if char in _META else char if char.isprintable() else f"\\x{{{ord(char):x}}}" for char in text
    )


def _first(error: str) -> str:
    """What of an error is worth telling: nothing of the parser's insides."""
    if error.startswith("NoExtensionBias"):
        return "nothing that the model can write satisfies it"
    return error.removesuffix("<non-verbose/>").strip()[:LONGEST_ERROR] or "unknown error"
