"""A grammar for answers that are free to be text, and not free in calls of tools.

With `tool_choice: "auto"` the model decides whether it calls. As soon as what it writes is a call, in the format that
`tools` reads, the grammar leaves it no way but a call of one of the functions, with arguments that follow the
function's schema if it is strict (`strict: true`), and with any object if it is not.

Tags may be tokens of their own or spelled out, so both are minded. Added tokens, such as those around thoughts, are no
text to llguidance; they are named by their ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..client.tokenizer import Tokenizer
from .tools import CLOSE, OPEN, PYTHON_TAG, forced_schema

_ANY = "(?s:.*)"


def strict_grammar(
    tools: Sequence[Mapping[str, Any]],
    format_: str,
    tokenizer: Tokenizer,
    *,
    several: bool = True,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """For `structured_outputs`. `format_` is a name in tools.PARSERS; `several` calls in one answer, or at most one;
    with `answer`, what is no call is JSON of that schema."""
    schema = forced_schema([_as_enforced(tool) for tool in tools], _ARGUMENTS[format_])
    rules = _RULES[format_](_Tokens(tokenizer), several, answer is not None)
    rules += ["SPACE: /\\s+/", f"call: %json {json.dumps(schema)}"]
    if answer is not None:
        rules.append(f"answer: %json {json.dumps(answer)}")
    return "\n".join(["%llguidance {}", *rules])


def _as_enforced(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    return {"function": function if function.get("strict") else {"name": function["name"]}}


class _Tokens:
    """A tokenizer's added tokens, as rules of a grammar."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ids = tokenizer.added_ids - set(tokenizer.eos_token_ids)
        self._unseen = tokenizer.special_ids
        self._tokenizer = tokenizer

    def one(self, text: str) -> list[str]:
        """The token of this text; nothing if there is none."""
        id_ = self._tokenizer.token_id(text)
        return [f"<[{id_}]>"] if id_ in self._ids else []

    def others(self, text: str, *, seen: bool = False) -> list[str]:
        """All others but the end of sequence; only those that are text to a reader, if `seen`."""
        ids = self._ids - {self._tokenizer.token_id(text)} - (self._unseen if seen else frozenset())
        return [f"<[{_ranges(ids)}]>"] if ids else []


def _ranges(ids: Collection[int]) -> str:
    """Such as 3-5,9-9."""
    found: list[list[int]] = []
    for id_ in sorted(ids):
        if found and found[-1][1] == id_ - 1:
            found[-1][1] = id_
        else:
            found.append([id_, id_])
    return ",".join(f"{first}-{last}" for first, last in found)


def _any_of(choices: Iterable[str]) -> str:
    return " | ".join(choices)


def _hermes(tokens: _Tokens, several: bool, only_json: bool) -> list[str]:
    opening, other = tokens.one(OPEN), tokens.others(OPEN)
    ending = f"({_any_of([*tokens.one(CLOSE), json.dumps(CLOSE)])})"
    tagged = f"SPACE? call SPACE? {ending}"
    if only_json:
        start = [f"start: SPACE? answer SPACE? | SPACE? tagged {'(SPACE? tagged)* ' if several else ''}SPACE?"]
        return [*start, f"tagged: ({_any_of([*opening, json.dumps(OPEN)])}) {tagged}"]
    tagged = f"({_any_of([*(f'TEXT? {tag}' for tag in opening), 'spelled'])}) {tagged}"
    plain = [f"TEXT? {tag}" for tag in other]
    if several:
        start = ["start: piece* TEXT?", f"piece: {_any_of([*plain, tagged])}"]
    else:
        start = [f"start: text TEXT? | text {tagged} SPACE?", f"text: ({_any_of(plain)})*" if plain else 'text: ""']
    return [
        *start,
        f"spelled[lazy]: /{_ANY}{OPEN}/",
        # Of two texts side by side each could hold a part of the tag: something always stands between them.
        f"TEXT: /(?s:.+)/ & ~/{_ANY}{OPEN}{_ANY}/",
    ]


def _llama(tokens: _Tokens, several: bool, only_json: bool) -> list[str]:
    calls = "call (SEPARATOR call)*" if several else "call"
    tag = f"({_any_of([*tokens.one(PYTHON_TAG), json.dumps(PYTHON_TAG)])})? "
    if only_json:
        return [f"start: SPACE? ({tag}{calls} | answer) SPACE?", "SEPARATOR: /\\s*;\\s*/"]
    begin = ["BEGIN", *(f"SPACE? {token} TEXT?" for token in tokens.others(PYTHON_TAG, seen=True))]
    more = f"({tokens.others(PYTHON_TAG)[0]} TEXT?)*" if tokens.others(PYTHON_TAG) else ""
    return [
        f"start: SPACE? {tag}SPACE? {calls} SPACE? | SPACE? | text",
        f"text: ({_any_of(begin)}) {more}",
        # Visible, and not as calls begin.
        f"BEGIN: /(?s:.+)/ & ~/\\s*(\\{{|{PYTHON_TAG.replace('|', '[|]')}){_ANY}/ & ~/\\s+/",
        "TEXT: /(?s:.+)/",
        "SEPARATOR: /\\s*;\\s*/",
    ]


_RULES = {"hermes": _hermes, "llama3_json": _llama}
_ARGUMENTS = {"hermes": "arguments", "llama3_json": "parameters"}
"""What the formats call them."""
