"""Chat messages to prompt text, through the model's own chat template, with the conventions of transformers'
`apply_chat_template`: the same template gives the same text.

Templates come from model repositories and are not trusted: see sandbox.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeAlias

import jinja2

from ..protocol.errors import ConfigurationError, InvalidRequest
from .metering import Budget, TemplateLimitError
from .sandbox import BoundedEnvironment, render_bounded

Message: TypeAlias = Mapping[str, Any]
"""A chat message: at least "role", and "content" or what else the template knows (tool_calls, reasoning_content …)."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_MARK = "<<the-final-message-goes-on-here>> "


class ChatTemplate:
    """A compiled chat template. Rendering is safe from several threads.

    Raises ConfigurationError if `source` is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = BoundedEnvironment(
            filters={"tojson": _to_json},
            functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        )
        try:
            self._template = environment.compile_bounded(source)
        except jinja2.TemplateError as error:
            raise ConfigurationError(f"the model's chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
    ) -> str:
        """The prompt's text, special tokens included (encode it with `add_special_tokens=False`).

        `continue_final_message` leaves the last message open, for the model to go on with it; it excludes
        `add_generation_prompt`. `variables` are further names that the template may read. Raises InvalidRequest if
        the template refuses the messages, or would take more than `budget`.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other: the first goes on with the last "
                "message, the second begins a new one",
                field="continue_final_message",
                value=True,
            )
        chat = _checked_messages(messages)
        final_text = _mark_final_message(chat) if continue_final_message else None
        data = {
            **self._special_tokens,
            **_plain(variables or {}),
            "messages": chat,
            "tools": _checked_dicts("tools", tools),
            "documents": _checked_dicts("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = render_bounded(self._template, data, budget or Budget())
        except (TemplateLimitError, MemoryError) as error:
            raise InvalidRequest(
                f"rendering the chat template was stopped: {error or 'out of memory'}", field="messages"
            ) from error
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}", field="messages") from error
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise InvalidRequest(
                f"the chat template failed on the messages: {type(error).__name__}: {error}", field="messages"
            ) from error
        return text if final_text is None else _cut_after_final_message(text, final_text)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces jinja2's own filter, which escapes HTML."""
    if indent is not None and not (isinstance(indent, int) and indent <= 16):
        raise TemplateLimitError(f"tojson: indent {indent!r:.40} is over the limit of 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 1_000 or any(character.isdigit() for character in form):
        raise TemplateLimitError("strftime_now takes a format of at most 1000 characters, without widths")
    return datetime.now().strftime(form)


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Plain copies, without the keys that are None (templates would print them)."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise InvalidRequest(f"messages: expected a list of messages, got {type(messages).__name__}", field="messages")
    if not messages:
        raise InvalidRequest("messages: a chat needs at least one message", field="messages", value=[])
    chat = []
    for i, message in enumerate(messages):
        plain = _plain(message)
        if not isinstance(plain, dict):
            raise InvalidRequest(
                f"messages[{i}]: expected a message with role and content, got {type(message).__name__}",
                field=f"messages[{i}]",
            )
        plain = {key: value for key, value in plain.items() if value is not None}
        if not isinstance(plain.get("role"), str):
            raise InvalidRequest(f"messages[{i}].role: missing, or no string", field=f"messages[{i}].role")
        chat.append(_with_reasoning(plain))
    return chat


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning has been passed under several names; templates read `reasoning_content` or `thinking`."""
    for name in _REASONING_FIELDS:
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _checked_dicts(name: str, values: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if values is None:
        return None
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            hint = "; pass its JSON schema" if callable(value) else ""
            raise InvalidRequest(
                f"{name}[{i}]: expected a dict, got {type(value).__name__}{hint}", field=f"{name}[{i}]"
            )
    return [_plain(value) for value in values]


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` out of plain JSON types alone: templates must not meet objects whose methods the sandbox cannot judge."""
    if depth > 100:
        raise InvalidRequest("messages: nested over 100 levels deep", field="messages", limit=100)
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item, depth + 1) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic models, as the OpenAI SDK returns them
        return _plain(dump(), depth + 1)
    return f"<{type(value).__name__}>"


def _mark_final_message(chat: list[dict[str, Any]]) -> str:
    """Marks where the last message's text ends; returns that text."""
    last = chat[-1]
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _CONTINUE_MARK
        return content
    if isinstance(content, list | tuple):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text: str = part["text"]
                part["text"] = text + _CONTINUE_MARK
                return text
    raise InvalidRequest(
        "continue_final_message: the last message has no text content to go on with", field="continue_final_message"
    )


def _cut_after_final_message(rendered: str, final_text: str) -> str:
    end = rendered.rfind(_CONTINUE_MARK.strip())
    if end < 0 or final_text.strip() not in rendered:
        raise InvalidRequest(
            "continue_final_message: the chat template does not render the last message's text as it is",
            field="continue_final_message",
        )
    if rendered.startswith(_CONTINUE_MARK, end):
        return rendered[:end]
    return rendered[:end].rstrip()  # the template strips its messages
