"""`/v1/responses`: messages and results of calls in, a message and calls out, whole or as OpenAI's named events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from ..client.completion import CompletionStream
from ..client.prompts import ChatOptions
from ..client.results import Completion
from ..client.tokenizer import Tokenizer
from .backend import Backend
from .chat_schema import CalledFunction, Message, ToolCall
from .config import GatewayConfig
from .errors import ApiError, refused
from .fields import told_as
from .generation import Piece, begun, completions, pieces
from .messages import text_of, to_template
from .response_items import Items
from .responses_schema import (
    FunctionCallItem,
    FunctionCallOutput,
    FunctionChoice,
    IncompleteDetails,
    InputTokensDetails,
    ResponseError,
    ResponsesRequest,
    ResponsesResponse,
    ResponseTool,
    ResponseUsage,
)
from .sse import EventStream, answered, event
from .tool_use import AnswerReader, Wanted, tool_use
from .turns import Turns
from .wire import as_dict, json_response, new_id, now

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class Responding:
    """One request."""

    def __init__(self, backend: Backend, asked: ResponsesRequest, tokenizer: Tokenizer, config: GatewayConfig) -> None:
        self._asked = asked
        self._id, self._created = new_id("resp_"), now()
        self._model = backend.model(asked.model).name
        self._items = Items()
        self._sequence = 0
        if asked.stream_options is not None and not asked.stream:
            raise refused("stream_options", "only with stream: true")
        template = tokenizer.chat_template(bool(asked.tools)).source
        use = tool_use(_wanted(asked), template, tokenizer, config)
        self._reader = AnswerReader(use)
        sampling = {**asked.sampling(), **use.structure}
        if use.sees_special(tokenizer):  # or nobody could tell a call
            sampling["skip_special_tokens"] = False
        self._template, self._tools, self._sampling = template, use.tools, sampling
        self._stream: CompletionStream

    async def begin(self, backend: Backend, turns: Turns) -> None:
        """What takes longer the longer the input is."""
        chat: list[Message] = []
        await turns.take(_messages(self._asked, chat))
        messages = await to_template(chat, self._template, turns)
        self._stream = backend.client.stream(messages, None, chat=ChatOptions(tools=self._tools), **self._sampling)

    async def answer(self, request: Request) -> Response:
        (completion,) = await answered(request, completions([self._stream]))
        for news in (*self._reader.push(completion.text), *self._reader.finish()):
            for _ in self._items.take(news):
                pass
        for _ in self._items.end(cut=_is_cut(completion)):
            pass
        return json_response(self._ended(completion))

    async def stream(self, request: Request) -> Response:
        found = await answered(request, begun(pieces([self._stream])))
        return EventStream(self._events(found), self._failed)

    async def _events(self, found: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        begun_response = as_dict(self._response("in_progress"))
        yield self._event("response.created", {"response": begun_response})
        yield self._event("response.in_progress", {"response": begun_response})
        async for _, chunk in found:
            for told in self._told(chunk.text):
                yield told
        completion = await self._stream.result()
        for news in self._reader.finish():
            for kind, content in self._items.take(news):
                yield self._event(kind, content)
        for kind, content in self._items.end(cut=_is_cut(completion)):
            yield self._event(kind, content)
        response = self._ended(completion)
        yield self._event(f"response.{response.status}", {"response": as_dict(response)})

    def _told(self, text: str) -> Iterator[bytes]:
        for news in self._reader.push(text):
            for kind, content in self._items.take(news):
                yield self._event(kind, content)

    def _event(self, kind: str, content: dict[str, Any]) -> bytes:
        self._sequence += 1
        return event({"type": kind, "sequence_number": self._sequence - 1, **content}, kind)

    def _failed(self, error: dict[str, Any]) -> bytes:
        code: Literal["rate_limit_exceeded", "invalid_prompt", "server_error"] = "server_error"
        if error["type"] in ("rate_limit_error", "invalid_request_error"):
            code = "rate_limit_exceeded" if error["type"] == "rate_limit_error" else "invalid_prompt"
        failed = self._response("failed")
        failed.error = ResponseError(code=code, message=error["message"])
        return self._event("response.failed", {"response": as_dict(failed)})

    def _ended(self, completion: Completion) -> ResponsesResponse:
        cut = _is_cut(completion)
        response = self._response("incomplete" if cut else "completed")
        response.incomplete_details = IncompleteDetails(reason="max_output_tokens") if cut else None
        response.output = self._items.found
        response.usage = _usage(completion)
        return response

    def _response(self, status: Status) -> ResponsesResponse:
        """As it stands, with no output."""
        asked = self._asked
        form = None if asked.text is None else asked.text.format
        choice = asked.tool_choice
        return ResponsesResponse(
            id=self._id,
            created_at=self._created,
            status=status,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata or {},
            model=self._model,
            output=[],
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            temperature=asked.temperature,
            text={"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            tool_choice=choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
            tools=[tool.model_dump() for tool in asked.tools or ()],
            top_p=asked.top_p,
            user=asked.user,
        )


def _wanted(asked: ResponsesRequest) -> Wanted:
    choice = asked.tool_choice
    return Wanted(
        tools=[_as_chat_has_it(tool) for tool in asked.tools or ()],
        choice=choice if isinstance(choice, str) else None,
        function=choice.name if isinstance(choice, FunctionChoice) else None,
        several=asked.parallel_tool_calls is not False,
        structure=asked.structure(),
        structure_field="text.format",
        function_field="tool_choice.name",
    )


def _as_chat_has_it(tool: ResponseTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _messages(asked: ResponsesRequest, chat: list[Message]) -> Iterator[None]:
    """Makes `chat` of it, in steps: calls become part of the assistant's message before them, and the system's and
    developer's messages that follow the instructions part of these, as chat templates expect it: many take one such
    message, the first."""
    leading = []
    if asked.instructions is not None:
        leading.append(asked.instructions)
        chat.append(Message(role="system", content=asked.instructions))
    if isinstance(asked.input, str):
        chat.append(Message(role="user", content=asked.input))
        return
    for item in asked.input:
        yield
        if isinstance(item, FunctionCallItem):
            if not chat or chat[-1].role != "assistant":
                chat.append(Message(role="assistant"))
            function = CalledFunction(name=item.name, arguments=item.arguments)
            calls = chat[-1].tool_calls = chat[-1].tool_calls or []
            calls.append(ToolCall(id=item.call_id, function=function))
        elif isinstance(item, FunctionCallOutput):
            chat.append(Message(role="tool", tool_call_id=item.call_id, content=item.output))
        elif leading and len(chat) == 1 and item.role in ("system", "developer"):
            leading.append(text_of(item.content))
        else:
            chat.append(Message(role=item.role, content=item.content))
    if leading:  # at once: of thousands, the text so far would be copied for each
        chat[0].content = "\n\n".join(leading)


def _is_cut(completion: Completion) -> bool:
    return completion.finish_reason == "length"


def _usage(completion: Completion) -> ResponseUsage:
    used = completion.usage
    return ResponseUsage(
        input_tokens=used.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=used.cached_tokens),
        output_tokens=used.completion_tokens,
        total_tokens=used.total_tokens,
    )


async def respond(
    request: Request, backend: Backend, asked: ResponsesRequest, config: GatewayConfig, turns: Turns
) -> Response:
    """Answers one request."""
    backend.model(asked.model)
    tokenizer = await backend.client.tokenizer()
    if tokenizer is None:
        raise ApiError(400, "input: the model comes without a tokenizer; use /v1/completions with token ids")
    structure = "text.format" if asked.structure() else "tools" if asked.tools else None
    with told_as(structure, max_tokens="max_output_tokens", prompt="input"):
        responding = Responding(backend, asked, tokenizer, config)
        await responding.begin(backend, turns)
        return await (responding.stream(request) if asked.stream else responding.answer(request))
