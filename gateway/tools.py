"""Tool calls in what a model writes, found as it writes.

Two formats: Hermes (`<tool_call>{"name": …, "arguments": …}</tool_call>`, also Qwen's) and Llama's JSON (the whole
answer is `{"name": …, "parameters": …}`, several of them with `;` between). What looks like a call and is none stays
text. Which one a model uses shows in its chat template; models with other formats get no tools.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from .config import ToolCallParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Call:
    """A function to call; the arguments are JSON text of an object."""

    name: str
    arguments: str


Found = str | Call


class Parser(Protocol):
    """Of one answer."""

    def push(self, text: str) -> Iterator[Found]:
        """What became certain with this text."""

    def finish(self) -> Iterator[Found]:
        """What was held back, given that nothing follows."""


class PlainText:
    """No tools: text is text."""

    def push(self, text: str) -> Iterator[Found]:
        if text:
            yield text

    def finish(self) -> Iterator[Found]:
        return iter(())


class HermesParser:
    """Text and calls may alternate. White space around calls belongs to neither."""

    def __init__(self) -> None:
        self._held = ""
        """Text that may belong to a tag, the white space before it too; within a call, the call so far."""
        self._inside = False
        self._had_call = False

    def push(self, text: str) -> Iterator[Found]:
        self._held += text
        while True:
            tag = CLOSE if self._inside else OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                break
            self._held = after
            if self._inside:
                call = as_call(before, "arguments")
                self._had_call = self._had_call or call is not None
                yield OPEN + before + CLOSE if call is None else call
            else:
                yield from self._text(before.rstrip())
            self._inside = not self._inside
        if not self._inside:
            keep = _overlap(self._held, OPEN)
            text = self._held[: len(self._held) - keep].rstrip()
            if text:
                self._held = self._held[len(text) :]
                yield from self._text(text)

    def finish(self) -> Iterator[Found]:
        held = OPEN + self._held if self._inside else self._held
        self._held = ""
        if held.strip() or not self._had_call:
            yield from self._text(held)

    def _text(self, text: str) -> Iterator[Found]:
        if text:
            yield text


class LlamaJsonParser:
    """An answer that begins like a call is held back to its end; any other is text from the start."""

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> Iterator[Found]:
        if self._is_text:
            if text:
                yield text
            return
        self._held += text
        begin = self._held.lstrip()
        if begin and not begin.startswith("{") and not PYTHON_TAG.startswith(begin[: len(PYTHON_TAG)]):
            self._is_text = True
            held, self._held = self._held, ""
            yield held

    def finish(self) -> Iterator[Found]:
        held, self._held = self._held, ""
        calls = _calls_in(held.strip().removeprefix(PYTHON_TAG))
        if calls:
            yield from calls
        elif held:
            yield held


class ForcedCallParser:
    """An answer that structured output made one call: JSON of a name and arguments, and nothing else."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> Iterator[Found]:
        self._held += text
        return iter(())

    def finish(self) -> Iterator[Found]:
        if self._held:
            yield as_call(self._held, "arguments") or self._held


PARSERS: dict[str, type[HermesParser] | type[LlamaJsonParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaJsonParser,
}


def format_of(template: str, chosen: ToolCallParser) -> str | None:
    """The name in PARSERS of the format that a chat template asks for; None if it is none that is known here."""
    if chosen == "none":
        return None
    if chosen != "auto":
        return chosen
    if OPEN in template and "<function=" not in template and "<arg_key>" not in template:
        return "hermes"
    if '"parameters"' in template and ("python_tag" in template or "ipython" in template):
        return "llama3_json"
    return None


def forced_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """A JSON schema of a call of one of these functions."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for tool in tools:
        function = tool["function"]
        parameters = dict(function.get("parameters") or {"type": "object"})
        for key in ("$defs", "definitions"):  # references start at the document's root
            if isinstance(parameters.get(key), dict):
                definitions.setdefault(key, {}).update(parameters.pop(key))
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **definitions}


def as_call(text: str, key: str) -> Call | None:
    """The call that JSON text is; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _call_of(found, key)


def _call_of(found: object, *keys: str) -> Call | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        return None
    arguments: Any = next((found[key] for key in keys if key in found), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False))


def _calls_in(text: str) -> list[Call]:
    """All of the text as calls, or none."""
    decoder = json.JSONDecoder()
    calls: list[Call] = []
    place = 0
    while place < len(text):
        try:
            found, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        call = _call_of(found, "parameters", "arguments")
        if call is None:
            return []
        calls.append(call)
        while place < len(text) and text[place] in "; \t\r\n":
            place += 1
    return calls


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of the text may begin the tag."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
