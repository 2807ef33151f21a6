"""Tool calls in what a model writes, found as it writes.

Two formats: Hermes (`<tool_call>{"name": …, "arguments": …}</tool_call>`, also Qwen's) and Llama's JSON (the whole
answer is `{"name": …, "parameters": …}`, several of them with `;` between). What looks like a call and is none stays
text. Which one a model uses shows in its chat template; models with other formats get no tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
    """Text and calls may alternate. White space around calls belongs to neither; all other text stays as it is.

    A closing tag within a string of the call's JSON closes nothing, unless no call comes of that. The work is linear in
    the length of the answer.
    """

    def __init__(self, *, minds_strings: bool = True) -> None:
        self._minds_strings = minds_strings
        self._held = ""
        """What may begin the tag that is looked for."""
        self._space: list[str] = []
        """White space at the end of the text so far, which is text if more of it follows."""
        self._call: list[str] | None = None
        """Within a call, its pieces so far."""
        self._strings = _JsonStrings()
        self._passed_a_tag = False
        """A closing tag is among those pieces."""
        self._after_call = False
        """The last that was found is a call."""

    def push(self, text: str) -> Iterator[Found]:
        text = self._held + text
        place = 0
        while True:
            tag = OPEN if self._call is None else CLOSE
            end = text.find(tag, place)
            if end < 0:
                break
            yield from self._take(text[place:end])
            place = end + len(tag)
            if self._call is None:
                self._call, self._strings, self._passed_a_tag = [], _JsonStrings(), False
            elif self._minds_strings and self._strings.is_open:
                self._passed_a_tag = True
                yield from self._take(CLOSE)
            else:
                yield from self._end_call(CLOSE)
        cut = len(text) - _overlap(text[max(place, len(text) - len(tag)) :], tag)
        yield from self._take(text[place:cut])
        self._held = text[cut:]

    def finish(self) -> Iterator[Found]:
        held, self._held = self._held, ""
        if self._call is not None:  # its JSON may be whole all the same
            yield from self._end_call(held)
        else:
            yield from self._text(held)
        if self._space and not self._after_call:
            yield "".join(self._space)
        self._space = []

    def _take(self, piece: str) -> Iterator[Found]:
        """A piece of text or of a call, with no tag in it that counts."""
        if self._call is not None:
            self._call.append(piece)
            self._strings.push(piece)
            return
        visible = piece.rstrip()
        if visible:
            yield from self._text(visible)
        if len(visible) < len(piece):
            self._space.append(piece[len(visible) :])

    def _end_call(self, ending: str) -> Iterator[Found]:
        """The call is over: with the closing tag, or with what came of it before the answer ended."""
        assert self._call is not None
        body = "".join(self._call)
        self._call = None
        call = as_call(body, "arguments")
        if call is not None:
            yield from self._found(call)
        elif self._passed_a_tag:
            again = HermesParser(minds_strings=False)
            for found in (*again.push(OPEN + body + ending), *again.finish()):
                yield from self._take(found) if isinstance(found, str) else self._found(found)
        else:
            yield from self._text(OPEN + body + ending)

    def _text(self, text: str) -> Iterator[Found]:
        """Text that ends visibly, after the white space before it."""
        if text:
            text = "".join([*self._space, text])
            self._space = []
            yield text.lstrip() if self._after_call else text
            self._after_call = False

    def _found(self, call: Call) -> Iterator[Found]:
        self._space, self._after_call = [], True
        yield call


class _JsonStrings:
    """Whether JSON that comes in pieces is within a string."""

    _MARKS = re.compile(r'\\.?|"', re.DOTALL)

    def __init__(self) -> None:
        self.is_open = False
        self._escape = ""
        """A backslash whose character has not come."""

    def push(self, piece: str) -> None:
        piece, self._escape = self._escape + piece, ""
        for mark in self._MARKS.findall(piece):
            if mark == '"':
                self.is_open = not self.is_open
            elif len(mark) == 1:
                self._escape = mark


class LlamaJsonParser:
    """An answer that begins like a call is held back to its end; any other is text from the start."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._begin = ""
        """Of the answer, from its first visible character, until it is known what it is."""
        self._is_text: bool | None = None

    def push(self, text: str) -> Iterator[Found]:
        if self._is_text:
            if text:
                yield text
            return
        self._held.append(text)
        if self._is_text is None:
            self._begin += text if self._begin else text.lstrip()
            if self._begin.startswith(("{", PYTHON_TAG)):
                self._is_text = False
            elif not PYTHON_TAG.startswith(self._begin):
                self._is_text = True
                held, self._held = self._held, []
                yield "".join(held)

    def finish(self) -> Iterator[Found]:
        held, self._held = "".join(self._held), []
        calls = _calls_in(held.strip().removeprefix(PYTHON_TAG).lstrip())
        if calls:
            yield from calls
        elif held:
            yield held


class ForcedCallParser:
    """An answer that structured output made one call: JSON of a name and arguments, and nothing else."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def push(self, text: str) -> Iterator[Found]:
        self._held.append(text)
        return iter(())

    def finish(self) -> Iterator[Found]:
        held, self._held = "".join(self._held), []
        if held:
            yield as_call(held, "arguments") or held


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


def forced_schema(tools: Sequence[Mapping[str, Any]], arguments: str = "arguments") -> dict[str, Any]:
    """A JSON schema of a call of one of these functions; `arguments` is what the format calls those."""
    calls: list[dict[str, Any]] = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        place = f"#/anyOf/{i}/properties/{arguments}" if len(tools) > 1 else f"#/properties/{arguments}"
        parameters = _moved(function.get("parameters") or {"type": "object"}, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, arguments: parameters},
                "required": ["name", arguments],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def longer_than(value: object, most: int) -> bool:
    """Whether JSON text of what was read from JSON certainly has over `most` characters; looks at about so many."""
    left, open_ = most, [value]
    while open_ and left >= 0:
        match open_.pop():
            case str() as text:
                left -= len(text) + 2
            case dict() as one:
                left -= 1 + 4 * len(one)
                if left >= 0:
                    left -= sum(map(len, one))
                    open_ += one.values()
            case list() as many:
                left -= 1 + len(many)
                if left >= 0:
                    open_ += many
            case _:
                left -= 1
    return left < 0


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references start at the document's root, as part of a document in which it stands at `place`."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else value
            if key in _VALUES
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(one, place) for one in schema] if isinstance(schema, list) else schema


def as_call(text: str, key: str) -> Call | None:
    """The call that JSON text is; None if it is none."""
    try:
        return _call_of(_JSON.decode(text), key)
    except (ValueError, RecursionError):
        return None


def _call_of(found: object, *keys: str) -> Call | None:
    """Raises ValueError or RecursionError for arguments that cannot be JSON text."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        return None
    arguments: Any = next((found[key] for key in keys if key in found), {})
    if isinstance(arguments, str):
        arguments = _JSON.decode(arguments)
    if not isinstance(arguments, dict):
        return None
    return Call(_text_of(found["name"]), _json_text(arguments))


def _json_text(arguments: dict[str, Any]) -> str:
    """JSON that UTF-8 can carry: a lone surrogate stays the escape that the model wrote."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 was read as an infinity
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(arguments, allow_nan=False)


def _text_of(name: str) -> str:
    if _SURROGATE.search(name):
        raise ValueError("no text")
    return name


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_VALUES = frozenset({"const", "enum", "default", "examples"})
"""Keywords of JSON Schema that hold no schemas."""
_JSON = json.JSONDecoder(parse_constant=_no_constant)
"""Python's own would read NaN and Infinity, and write them."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def _calls_in(text: str) -> list[Call]:
    """All of the text as calls, or none. An object without arguments is a call only where tags say so: not here."""
    calls: list[Call] = []
    place = 0
    try:
        while place < len(text):
            found, place = _JSON.raw_decode(text, place)
            if not isinstance(found, dict) or not found.keys() & {"parameters", "arguments"}:
                return []
            call = _call_of(found, "parameters", "arguments")
            if call is None:
                return []
            calls.append(call)
            while place < len(text) and text[place] in "; \t\r\n":
                place += 1
    except (ValueError, RecursionError):
        return []
    return calls


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of the text may begin the tag."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
