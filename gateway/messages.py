"""A chat as OpenAI's API writes it, made what chat templates read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, overload

from .chat_schema import Message, TextPart
from .errors import refused
from .turns import Turns

MAX_ARGUMENT_VALUES = 100_000
"""Of one call: its arguments are a text, of which a body's own count of values knows nothing."""


async def to_template(messages: Sequence[Message], template: str, turns: Turns) -> list[dict[str, Any]]:
    """Contents become text, arguments of calls become objects, as templates expect them. Raises ApiError naming the
    message that makes no sense."""
    made: list[dict[str, Any]] = []
    await turns.take(_make(made, messages, "developer" in template))
    return made


def _make(made: list[dict[str, Any]], messages: Sequence[Message], developer: bool) -> Iterator[None]:
    """Makes them in steps."""
    for i, message in enumerate(messages):
        calls = []
        for j, call in enumerate(message.tool_calls or ()):
            arguments = _arguments(call.function.arguments, f"messages.{i}.tool_calls.{j}.function.arguments")
            function = {"name": call.function.name, "arguments": arguments}
            calls.append({"id": call.id, "type": "function", "function": function})
            yield
        made.append(_one(i, message, developer, calls))
        yield


def _one(i: int, message: Message, developer: bool, calls: list[dict[str, Any]]) -> dict[str, Any]:
    where = f"messages.{i}"
    role = "system" if message.role == "developer" and not developer else message.role
    given: dict[str, Any] = {"role": role}
    content = text_of(message.content)
    if content is None and message.role == "assistant":
        content = message.refusal
    if content is not None:
        given["content"] = content
    elif not message.tool_calls:
        raise refused(f"{where}.content", f"a message of role {message.role} needs text")
    else:
        given["content"] = ""
    if message.tool_calls:
        if message.role != "assistant":
            raise refused(f"{where}.tool_calls", f"only in messages of role assistant, not {message.role}")
        given["tool_calls"] = calls
    if message.role == "tool":
        if message.tool_call_id is None:
            raise refused(f"{where}.tool_call_id", "a message of role tool needs the id of the call that it answers")
        given["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if message.name is not None:
        given["name"] = message.name
    if reasoning is not None:
        given["reasoning_content"] = reasoning
    return given


@overload
def text_of(content: str | Sequence[TextPart]) -> str: ...
@overload
def text_of(content: None) -> None: ...
def text_of(content: str | Sequence[TextPart] | None) -> str | None:
    """Parts are lines."""
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.text or part.refusal or "" for part in content)


def _arguments(text: str, where: str) -> Any:
    """As an object; text that is none is left to the template."""
    values = text.count(",") + text.count("[") + text.count("{")
    if values > MAX_ARGUMENT_VALUES:
        raise refused(where, f"has up to {values} values; the limit is {MAX_ARGUMENT_VALUES}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text
