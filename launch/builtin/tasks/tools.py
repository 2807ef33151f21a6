"""Tool calls: choosing a function and its arguments from the request, and answering from what it returned."""

import json
from collections.abc import Callable

from ..chat import Chat, Message, ToolCall
from . import arithmetic, lists, smalltalk
from .source import Exchange, Source
from .toolbox import KNOWN, Tool, Use, invented


def _toolbox(s: Source) -> list[Tool]:
    count = s.pick((1, 1, 1, 2, 2, 3, 4))
    tools = [invented(s) if s.chance(0.35) else tool for tool in s.rng.sample(KNOWN, count)]
    return list({tool.name: tool for tool in tools}.values())


_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that can use tools.",
    "Use the functions when you need them.",
    "You are an assistant with access to functions.",
)


def _start(s: Source, tools: list[Tool]) -> Chat:
    system = [Message("system", s.pick(_SYSTEMS))] if s.chance(0.4) else []
    return Chat([*system], [tool.schema(s) for tool in tools])


def _draw_use(s: Source, tools: list[Tool]) -> tuple[Tool, Use] | None:
    """A use of one of the tools; None if all of them lie on the other side of the split, as a light's few uses may."""

    def draw() -> tuple[Tool, Use]:
        tool = s.pick(tools)
        return tool, tool.use(s)

    return s.find(draw, lambda drawn: f"tool {drawn[0].name} {json.dumps(drawn[1].arguments)}", tries=200)


def _first_use(s: Source) -> tuple[list[Tool], Tool, Use]:
    """Tools that have a use on this side of the split, and one such use."""
    while True:
        tools = _toolbox(s)
        if drawn := _draw_use(s, tools):
            return tools, *drawn


def _add_call(s: Source, chat: Chat, tool: Tool, use: Use) -> None:
    chat.messages.append(Message("user", s.casual(use.request)))
    chat.messages.append(Message("assistant", "", [ToolCall(tool.name, use.arguments)]))


def _add_result(chat: Chat, use: Use) -> None:
    chat.messages.append(Message("tool", json.dumps(use.result)))
    chat.messages.append(Message("assistant", use.answer))


def tool_call(s: Source) -> Chat:
    """A request that one of the listed tools serves; ends in the call."""
    tools, tool, use = _first_use(s)
    chat = _start(s, tools)
    _add_call(s, chat, tool, use)
    return chat


def tool_answer(s: Source) -> Chat:
    """The same, ending in the answer from the tool's result."""
    tools, tool, use = _first_use(s)
    chat = _start(s, tools)
    _add_call(s, chat, tool, use)
    _add_result(chat, use)
    return chat


def tool_chat(s: Source) -> Chat:
    """Several requests with tools at hand, some of which need none."""
    tools = _toolbox(s)
    chat = _start(s, tools)
    plain: tuple[Callable[[Source], Exchange], ...] = (smalltalk.greeting, lists.sorting, arithmetic.addition)
    if any(tool.name == "calculator" for tool in tools):
        plain = plain[:2]  # where there is a calculator, it calculates
    for _ in range(s.integer(1, 5)):
        drawn = None if s.chance(0.35) else _draw_use(s, tools)
        if drawn is None:
            request, answer = s.pick(plain)(s)
            chat.messages += [Message("user", request), Message("assistant", answer)]
            continue
        _add_call(s, chat, *drawn)
        _add_result(chat, drawn[1])
    return chat
