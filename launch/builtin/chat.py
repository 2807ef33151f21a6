"""The chat format: one Jinja template for everyone, and the same rendering in plain Python for the data generator.

The plain-Python twin exists because training renders thousands of chats per second; a test keeps the two identical.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

START = "<|im_start|>"
END = "<|im_end|>"
PAD = "<|pad|>"
ANSWER_HEADER = f"{START}assistant\n"

JsonObject = dict[str, Any]

TOOLS_INTRO = "You can call these functions:\n<tools>\n"
TOOLS_OUTRO = (
    "</tools>\nTo call one, answer with its name and arguments as JSON:\n"
    '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
)

CHAT_TEMPLATE = """\
{%- if not messages %}
    {{- raise_exception("a chat needs at least one message") }}
{%- endif %}
{%- set system = messages[0].content if messages[0].role in ["system", "developer"] else none %}
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is not none and content is defined %}
        {%- for part in content %}
            {%- if part is string %}
                {{- part }}
            {%- elif part.type == "text" %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception("this model reads text only, not content of type " ~ part.type) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if system is not none or tools %}
    {{- "<|im_start|>system\\n" }}
    {%- if system is not none %}
        {{- text(system) }}
        {%- if tools %}
            {{- "\\n\\n" }}
        {%- endif %}
    {%- endif %}
    {%- if tools %}
        {{- "INTRO" }}
        {%- for tool in tools %}
            {{- tool | tojson }}
            {{- "\\n" }}
        {%- endfor %}
        {{- 'OUTRO' }}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ["system", "developer"] %}
        {%- if not loop.first %}
            {{- raise_exception("a system message can only be the first message") }}
        {%- endif %}
    {%- elif message.role == "user" %}
        {{- "<|im_start|>user\\n" ~ text(message.content) ~ "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" ~ text(message.content) }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {%- if not loop.first or message.content %}
                {{- "\\n" }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": ' ~ (call.name | tojson) ~ ', "arguments": ' }}
            {%- if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson }}
            {%- endif %}
            {{- "}\\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- elif message.role == "tool" %}
        {{- "<|im_start|>tool\\n<tool_response>\\n" ~ text(message.content) ~ "\\n</tool_response><|im_end|>\\n" }}
    {%- else %}
        {{- raise_exception("unknown role " ~ message.role ~ ": use system, user, assistant or tool") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
""".replace("INTRO", TOOLS_INTRO.replace("\n", "\\n")).replace("OUTRO", TOOLS_OUTRO.replace("\n", "\\n"))
"""Jinja source for transformers' sandboxed environment (trim_blocks, lstrip_blocks, `tojson`, `raise_exception`)."""


@dataclass(slots=True)
class ToolCall:
    """One function call of the assistant."""

    name: str
    arguments: JsonObject

    def text(self) -> str:
        """The call as the model writes it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return f'<tool_call>\n{{"name": {json.dumps(self.name)}, "arguments": {arguments}}}\n</tool_call>'


@dataclass(slots=True)
class Message:
    """One message of a chat; `role` is system, user, assistant or tool."""

    role: str
    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)

    def as_json(self) -> JsonObject:
        """The message in the OpenAI shape that chat templates take."""
        message: JsonObject = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(slots=True)
class Chat:
    """A whole chat, ending in the assistant's answer, with the tools that it may call."""

    messages: list[Message]
    tools: list[JsonObject] = field(default_factory=list)

    def answer(self) -> str:
        """What the model should write last."""
        last = self.messages[-1]
        return "\n".join(filter(None, [last.content, *(call.text() for call in last.tool_calls)]))


def render(
    messages: Sequence[Message], tools: Sequence[JsonObject] = (), *, add_generation_prompt: bool = False
) -> str:
    """The text that CHAT_TEMPLATE gives for the same chat."""
    parts: list[str] = []
    has_system = bool(messages) and messages[0].role == "system"
    if has_system or tools:
        parts.append(f"{START}system\n")
        if has_system:
            parts.append(messages[0].content + ("\n\n" if tools else ""))
        if tools:
            parts.append(TOOLS_INTRO)
            parts.extend(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
            parts.append(TOOLS_OUTRO)
        parts.append(f"{END}\n")
    for message in messages[1:] if has_system else messages:
        if message.role == "assistant":
            calls = [call.text() for call in message.tool_calls]
            parts.append(ANSWER_HEADER + "\n".join(filter(None, [message.content, *calls])) + f"{END}\n")
        elif message.role == "tool":
            parts.append(f"{START}tool\n<tool_response>\n{message.content}\n</tool_response>{END}\n")
        else:
            parts.append(f"{START}{message.role}\n{message.content}{END}\n")
    if add_generation_prompt:
        parts.append(ANSWER_HEADER)
    return "".join(parts)
