"""What a request's output must look like: the grammar that it follows, as it travels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Final, TypeAlias

from pydantic import ConfigDict, Field

MAX_GRAMMAR_BYTES: Final = 65_536
"""A schema, a regular expression, a grammar, or all choices together: UTF-8 bytes."""
MAX_CHOICES: Final = 4_096
MAX_WHITESPACE_CHARS: Final = 256

KINDS: Final = ("json", "json_object", "regex", "choice", "grammar")
"""The fields of which exactly one is given."""

_Text: TypeAlias = Annotated[str, Field(strict=True, max_length=MAX_GRAMMAR_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`, named and meant as vLLM's.

    As a message holds it, a schema is JSON text. The SDK also takes a dict or a pydantic model there, and makes the
    text of it. Constructing one checks nothing; `problem` does.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    json: _Text | None = None
    """A JSON schema: the output is a JSON value that it accepts."""
    json_object: Annotated[bool, Field(strict=True)] = False
    """The output is any JSON object."""
    regex: _Text | None = None
    """The whole output matches this regular expression (the syntax of Rust's regex crate, without look-around)."""
    choice: Annotated[tuple[_Text, ...], Field(max_length=MAX_CHOICES)] = ()
    """The output is one of these texts."""
    grammar: _Text | None = None
    """The output is a sentence of this grammar (Lark's syntax, or GBNF)."""
    disable_any_whitespace: Annotated[bool, Field(strict=True)] = False
    """JSON without any whitespace between its tokens."""
    whitespace_pattern: Annotated[str, Field(strict=True, max_length=MAX_WHITESPACE_CHARS)] | None = None
    """A regular expression of what may stand between the tokens of JSON."""

    @property
    def kind(self) -> str:
        """The field that is given; one must be."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False, ()))

    @property
    def size(self) -> int:
        """UTF-8 bytes of all texts together."""
        texts = [getattr(self, f.name) for f in fields(self)]
        return sum(len(text.encode()) for text in (*texts, *self.choice) if isinstance(text, str))


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a StructuredOutputsParams: the field below it, what it may be, what it was."""

    message: str
    field: str
    limit: str
    value: str


def problem(wanted: StructuredOutputsParams) -> Problem | None:
    """The first thing wrong that shows without a tokenizer, or None. Types and lengths of the fields were checked when
    it was decoded."""
    given = [name for name in KINDS if getattr(wanted, name) not in (None, False, ())]
    if len(given) != 1:
        return Problem(
            f"exactly one of {', '.join(KINDS)} says what the output looks like; "
            + (f"given are {' and '.join(given)}" if given else "none is given"),
            given[1] if given else "json",
            "exactly one",
            str(len(given)),
        )
    if wanted.size > MAX_GRAMMAR_BYTES:
        return Problem(
            f"{given[0]} has {wanted.size} bytes, over the limit of {MAX_GRAMMAR_BYTES}",
            given[0],
            f"{MAX_GRAMMAR_BYTES} bytes",
            f"{wanted.size} bytes",
        )
    if given[0] not in ("json", "json_object"):
        for name in ("disable_any_whitespace", "whitespace_pattern"):
            if getattr(wanted, name):
                return Problem(f"{name} is about JSON, and {given[0]} is none", name, "with json only", given[0])
    if wanted.disable_any_whitespace and wanted.whitespace_pattern is not None:
        return Problem(
            "whitespace_pattern says what whitespace there may be, and disable_any_whitespace forbids it",
            "whitespace_pattern",
            "one of the two",
            "both",
        )
    return None
