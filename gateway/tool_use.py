"""What a request's tools mean for it, and its answer read for text and calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..client.tokenizer import Tokenizer
from ..protocol.structured import MAX_GRAMMAR_BYTES
from .config import GatewayConfig
from .errors import refused
from .strict_tools import strict_grammar
from .tools import (
    OPEN,
    PARSERS,
    ForcedCallParser,
    Found,
    HermesParser,
    Parser,
    PlainText,
    forced_schema,
    format_of,
    longer_than,
)
from .wire import new_id

Tools = list[dict[str, Any]]
"""As chats write them: {"type": "function", "function": {"name", "description", "parameters", "strict"}}."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request says of tools, and of its answer's form."""

    tools: Tools
    choice: str | None
    """auto, none, required, or nothing; with `function` it is required."""
    function: str | None
    """The name of the one that must be called."""
    several: bool
    """More than one call in an answer."""
    structure: dict[str, Any]
    """The SDK's `structured_outputs` as a keyword argument, or nothing."""
    structure_field: str
    """What the request calls that."""
    function_field: str
    """What the request calls `function`."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What that comes to."""

    tools: Tools | None
    """Shown to the model."""
    parser: type[Parser]
    structure: dict[str, Any]
    """What form the answer has: the SDK's `structured_outputs` as a keyword argument, or nothing."""
    several: bool

    def sees_special(self, tokenizer: Tokenizer) -> bool:
        """Whether a call can only be told by tokens that a text usually does not show."""
        return self.parser is HermesParser and tokenizer.token_id(OPEN) in tokenizer.special_ids


def tool_use(wanted: Wanted, template: str, tokenizer: Tokenizer, config: GatewayConfig) -> ToolUse:
    """Raises ApiError if the model has no format of calls that is known here, or a choice makes no sense."""
    choice = "required" if wanted.function is not None else wanted.choice or "auto"
    if not wanted.tools and choice == "required":
        raise refused("tool_choice", "needs tools to choose from")
    if not wanted.tools or choice == "none":
        return ToolUse(None, PlainText, wanted.structure, wanted.several)
    name = format_of(template, config.tool_call_parser)
    if name is None:
        raise refused(
            "tools",
            "how this model writes tool calls is not known here (known are the Hermes and Llama JSON formats); "
            "--tool-call-parser names one if it is",
        )
    if choice == "auto":
        strict = any(tool["function"].get("strict") for tool in wanted.tools)
        structure = _strict_structure(wanted, name, tokenizer) if strict else wanted.structure
        return ToolUse(wanted.tools, PARSERS[name], structure, wanted.several)
    chosen = wanted.tools
    if wanted.function is not None:
        chosen = [tool for tool in wanted.tools if tool["function"]["name"] == wanted.function]
        if not chosen:
            raise refused(wanted.function_field, f"{wanted.function!r} is none of the tools")
    # OpenAI's own form is of an answer's text, and a call has none; vLLM's forms are of all that the model writes.
    if wanted.structure and wanted.structure_field not in ("response_format", "text.format"):
        raise refused(wanted.structure_field, "not with a tool_choice that makes the answer a call")
    _bound(chosen)
    structure = {"structured_outputs": {"json": forced_schema(chosen)}}
    return ToolUse(wanted.tools, ForcedCallParser, structure, wanted.several)


def _strict_structure(wanted: Wanted, format_: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Calls that follow their schemas, and beside them what form the request asks for. Raises ApiError for a form
    that is no JSON."""
    form: Mapping[str, Any] | None = wanted.structure.get("structured_outputs")
    answer = None
    if form is not None:
        answer = {"type": "object"} if form.get("json_object") else form.get("json")
        if isinstance(answer, str):
            answer = _parsed(answer)
        if not isinstance(answer, dict):
            raise refused(wanted.structure_field, "beside strict tools an answer can only be JSON of a schema")
    _bound([tool for tool in wanted.tools if tool["function"].get("strict")])
    grammar = strict_grammar(wanted.tools, format_, tokenizer, several=wanted.several, answer=answer)
    return {"structured_outputs": {"grammar": grammar}}


def _bound(enforced: Tools) -> None:
    """Of what is refused in the end no grammar is built before, which could take a second."""
    schemas = [tool["function"].get("parameters") for tool in enforced]
    if longer_than(schemas, MAX_GRAMMAR_BYTES):
        raise refused("tools", f"the schemas that a call has to follow are over the limit of {MAX_GRAMMAR_BYTES} bytes")


def _parsed(schema: str) -> Any:
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class NamedCall:
    """A call, with the id by which its result will be known."""

    id: str
    name: str
    arguments: str
    """JSON text of an object."""


News = str | NamedCall


class AnswerReader:
    """Reads one answer for text and calls."""

    def __init__(self, use: ToolUse) -> None:
        self._parser = use.parser()
        self._several = use.several
        self._pieces: list[str] = []
        self.calls: list[NamedCall] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, text: str) -> Sequence[News]:
        """What a message gains."""
        return self._taken(self._parser.push(text))

    def finish(self) -> Sequence[News]:
        """What it gains because nothing follows."""
        return self._taken(self._parser.finish())

    def reason(self, reason: str) -> Literal["stop", "length", "tool_calls"]:
        """Why the answer ended, as chats say it."""
        if reason == "stop" and self.calls:
            return "tool_calls"
        return cast(Literal["stop", "length"], reason)

    def _taken(self, found: Iterable[Found]) -> list[News]:
        news: list[News] = []
        for one in found:
            if isinstance(one, str):
                self._pieces.append(one)
                news.append(one)
            elif self._several or not self.calls:
                self.calls.append(NamedCall(new_id("call_"), one.name, one.arguments))
                news.append(self.calls[-1])
        return news
