"""`/v1/chat/completions`: messages in, a message out, or calls of tools."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from starlette.requests import Request
from starlette.responses import Response

from ..client.completion import CompletionStream
from ..client.prompts import ChatOptions
from ..client.results import Choice, Chunk
from ..client.tokenizer import Tokenizer
from .backend import Backend
from .chat_schema import (
    AnswerFunction,
    AnswerMessage,
    AnswerToolCall,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    NamedToolChoice,
    Tool,
)
from .config import GatewayConfig
from .errors import ApiError, refused
from .fields import told_as
from .generation import Piece, begun, completions, pieces
from .logprobs import chat_logprobs
from .messages import to_template
from .sse import DONE, EventStream, answered, event
from .strict_tools import strict_grammar
from .tools import OPEN, PARSERS, Call, ForcedCallParser, HermesParser, Parser, PlainText, forced_schema, format_of
from .wire import as_dict, json_response, new_id, now, usage_of


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request's tools mean for it."""

    tools: list[dict[str, Any]] | None
    """Shown to the model."""
    parser: type[Parser]
    structure: dict[str, Any]
    """What form the answer has: the SDK's `structured_outputs` as a keyword argument, or nothing."""


def tool_use(asked: ChatRequest, template: str, tokenizer: Tokenizer, config: GatewayConfig) -> ToolUse:
    """Raises ApiError if the model has no format of calls that is known here, or a choice makes no sense."""
    choice = asked.tool_choice
    if not asked.tools:
        if choice not in (None, "none", "auto"):
            raise refused("tool_choice", "needs tools to choose from")
        return ToolUse(None, PlainText, asked.structure())
    if choice == "none":
        return ToolUse(None, PlainText, asked.structure())
    name = format_of(template, config.tool_call_parser)
    if name is None:
        raise refused(
            "tools",
            "how this model writes tool calls is not known here (known are the Hermes and Llama JSON formats); "
            "--tool-call-parser names one if it is",
        )
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools]
    if choice is None or choice == "auto":
        structure = _strict_structure(asked, tools, name, tokenizer) if any(map(_is_strict, asked.tools)) else {}
        return ToolUse(tools, PARSERS[name], structure or asked.structure())
    chosen = tools
    if isinstance(choice, NamedToolChoice):
        chosen = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if not chosen:
            raise refused("tool_choice.function.name", f"{choice.function.name!r} is none of the tools")
    if asked.structure():
        raise refused("response_format", "not with a tool_choice that makes the answer a call")
    return ToolUse(tools, ForcedCallParser, {"structured_outputs": {"json": forced_schema(chosen)}})


def _is_strict(tool: Tool) -> bool:
    return bool(tool.function.strict)


def _strict_structure(
    asked: ChatRequest, tools: list[dict[str, Any]], format_: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Calls that follow their schemas, and beside them what form the request asks for. Raises ApiError for a form
    that is no JSON."""
    several = asked.parallel_tool_calls is not False
    form = asked.structure().get("structured_outputs")
    answer = None
    if form is not None:
        answer = {"type": "object"} if form.get("json_object") else form.get("json")
        if isinstance(answer, str):
            answer = _parsed(answer)
        if not isinstance(answer, dict):
            raise refused(
                asked.structure_field() or "response_format",
                "beside strict tools an answer can only be JSON of a schema",
            )
    return {
        "structured_outputs": {"grammar": strict_grammar(tools, format_, tokenizer, several=several, answer=answer)}
    }


def _parsed(schema: str) -> Any:
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        return None


class Chatting:
    """One request."""

    def __init__(self, backend: Backend, asked: ChatRequest, tokenizer: Tokenizer, config: GatewayConfig) -> None:
        self._asked = asked
        self._id, self._created = new_id("chatcmpl-"), now()
        self._model = backend.model(asked.model).name
        if asked.chat_template is not None and not config.trust_request_chat_template:
            raise refused("chat_template", "not taken from requests; --trust-request-chat-template allows it")
        template = tokenizer.chat_template(bool(asked.tools), asked.chat_template).source
        self._use = tool_use(asked, template, tokenizer, config)
        self._sees_special = self._use.parser is HermesParser and tokenizer.token_id(OPEN) in tokenizer.special_ids
        if asked.stream_options is not None and not asked.stream:
            raise refused("stream_options", "only with stream: true")
        options = ChatOptions(
            tools=self._use.tools,
            documents=asked.documents,
            chat_template=asked.chat_template,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=bool(asked.continue_final_message),
            template_variables=asked.chat_template_kwargs,
        )
        self._stream: CompletionStream = backend.client.stream(
            to_template(asked.messages, template), None, chat=options, **asked.options(), **self._sampling()
        )

    def _sampling(self) -> dict[str, Any]:
        asked = self._asked
        sampling = {**asked.sampling(), **self._use.structure}
        if self._sees_special:  # or nobody could tell a call
            sampling.setdefault("skip_special_tokens", False)
        if asked.max_completion_tokens is not None and asked.max_tokens not in (None, asked.max_completion_tokens):
            raise refused("max_tokens", "differs from max_completion_tokens, which is its new name; give one")
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        if most is not None:
            sampling["max_tokens"] = most
        if asked.top_logprobs is not None and not asked.logprobs:
            raise refused("top_logprobs", "only with logprobs: true")
        if asked.logprobs:
            sampling["logprobs"] = asked.top_logprobs or 0
        return sampling

    # --- whole -----------------------------------------------------------------------------------------------------

    async def answer(self, request: Request) -> Response:
        (completion,) = await answered(request, completions([self._stream]))
        with_ids = bool(self._asked.return_token_ids)
        answer = ChatResponse(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(choice) for choice in completion.choices],
            usage=usage_of(completion),
            prompt_token_ids=completion.prompt_token_ids if with_ids else None,
        )
        return json_response(answer)

    def _choice(self, choice: Choice) -> ChatChoice:
        reader = _Reader(self._use.parser(), self._asked.parallel_tool_calls is not False)
        reader.push(choice.text)
        reader.finish()
        return ChatChoice(
            index=choice.index,
            message=AnswerMessage(
                content=reader.text if reader.text or not reader.calls else None, tool_calls=reader.calls or None
            ),
            logprobs=chat_logprobs(choice.logprobs),
            finish_reason=reader.reason(choice.finish_reason),
            stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if self._asked.return_token_ids else None,
        )

    # --- streamed --------------------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> Response:
        found = await answered(request, begun(pieces([self._stream])))
        return EventStream(self._events(found), lambda error: event({"error": error}) + DONE)

    async def _events(self, found: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        options = self._asked.stream_options
        with_usage = options is not None and options.include_usage
        head: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [],
        }
        if with_usage:
            head["usage"] = None
        readers: dict[int, _Reader] = {}
        async for _, chunk in found:
            reader = readers.get(chunk.index)
            if reader is None:
                reader = _Reader(self._use.parser(), self._asked.parallel_tool_calls is not False)
                readers[chunk.index] = reader
                yield event({**head, "choices": [_delta(chunk.index, {"role": "assistant", "content": ""})]})
            for choice in self._news(reader, chunk):
                yield event({**head, "choices": [choice]})
        if with_usage:
            yield event({**head, "usage": as_dict(usage_of(await self._stream.result()))})
        yield DONE

    def _news(self, reader: _Reader, chunk: Chunk) -> list[dict[str, Any]]:
        """The choices of the events that tell of a chunk."""
        deltas = reader.push(chunk.text)
        reason = None
        if chunk.finish_reason is not None:
            deltas += reader.finish()
            reason = reader.reason(chunk.finish_reason)
        logprobs = chat_logprobs(chunk.logprobs)
        if logprobs is not None or self._asked.return_token_ids or (reason is not None and not deltas):
            deltas = deltas or [{}]
        news = [_delta(chunk.index, delta) for delta in deltas]
        if news:
            if logprobs is not None:
                news[0]["logprobs"] = as_dict(logprobs)
            if self._asked.return_token_ids:
                news[0]["token_ids"] = chunk.token_ids
            if reason is not None:
                news[-1]["finish_reason"] = reason
                news[-1]["stop_reason"] = chunk.stop_reason
        return news


class _Reader:
    """Reads one answer for text and calls."""

    def __init__(self, parser: Parser, several: bool) -> None:
        self._parser = parser
        self._several = several
        self._pieces: list[str] = []
        self.calls: list[AnswerToolCall] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, text: str) -> list[dict[str, Any]]:
        """What a message gains."""
        return [delta for found in self._parser.push(text) if (delta := self._take(found))]

    def finish(self) -> list[dict[str, Any]]:
        return [delta for found in self._parser.finish() if (delta := self._take(found))]

    def reason(self, reason: str) -> Literal["stop", "length", "tool_calls"]:
        if reason == "stop" and self.calls:
            return "tool_calls"
        return cast(Literal["stop", "length"], reason)

    def _take(self, found: str | Call) -> dict[str, Any] | None:
        if isinstance(found, str):
            self._pieces.append(found)
            return {"content": found}
        if self.calls and not self._several:
            return None  # parallel_tool_calls: false
        call = AnswerToolCall(id=new_id("call_"), function=AnswerFunction(name=found.name, arguments=found.arguments))
        self.calls.append(call)
        return {"tool_calls": [{"index": len(self.calls) - 1, **as_dict(call)}]}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


async def chat(request: Request, backend: Backend, asked: ChatRequest, config: GatewayConfig) -> Response:
    """Answers one request."""
    backend.model(asked.model)
    tokenizer = await backend.client.tokenizer()
    if tokenizer is None:
        raise ApiError(400, "messages: the model comes without a tokenizer; use /v1/completions with token ids")
    with told_as(asked.structure_field() or ("tools" if asked.tools else None)):
        chatting = Chatting(backend, asked, tokenizer, config)
        return await (chatting.stream(request) if asked.stream else chatting.answer(request))
