"""A chat as OpenAI's API writes it, made what chat templates read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .chat_schema import Message, TextPart
from .errors import refused


def to_template(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """Contents become text, arguments of calls become objects, as templates expect them. Raises ApiError naming the
    message that makes no sense."""
    knows_developer = "developer" in template
    return [_one(i, message, knows_developer) for i, message in enumerate(messages)]


def _one(i: int, message: Message, knows_developer: bool) -> dict[str, Any]:
    where = f"messages.{i}"
    role = "system" if message.role == "developer" and not knows_developer else message.role
    given: dict[str, Any] = {"role": role}
    content = _text(message.content)
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
        given["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
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


def _text(content: str | Sequence[TextPart] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.text or part.refusal or "" for part in content)


def _arguments(text: str) -> Any:
    """As an object; text that is none is left to the template."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text
