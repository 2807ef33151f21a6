"""`/v1/responses`: messages in, a message out, whole or as OpenAI's named events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from ..client.completion import CompletionStream
from ..client.results import Completion
from ..client.tokenizer import Tokenizer
from .backend import Backend
from .chat_schema import Message
from .errors import ApiError
from .fields import told_as
from .generation import Piece, begun, completions, pieces
from .messages import to_template
from .responses_schema import (
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    ResponsesRequest,
    ResponsesResponse,
    ResponseUsage,
)
from .sse import EventStream, answered, event
from .wire import as_dict, json_response, new_id, now


class Responding:
    """One request."""

    def __init__(self, backend: Backend, asked: ResponsesRequest, tokenizer: Tokenizer) -> None:
        self._asked = asked
        self._id, self._message_id, self._created = new_id("resp_"), new_id("msg_"), now()
        self._model = backend.model(asked.model).name
        self._text = ""
        self._sequence = 0
        messages = to_template(_messages(asked), tokenizer.chat_template().source)
        self._stream: CompletionStream = backend.client.stream(messages, None, **asked.sampling())

    async def answer(self, request: Request) -> Response:
        (completion,) = await answered(request, completions([self._stream]))
        self._text = completion.text
        return json_response(self._response(completion))

    async def stream(self, request: Request) -> Response:
        found = await answered(request, begun(pieces([self._stream])))
        return EventStream(self._events(found), self._failed)

    async def _events(self, found: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        begun_response = as_dict(self._response(None))
        yield self._event("response.created", response=begun_response)
        yield self._event("response.in_progress", response=begun_response)
        item = {"output_index": 0, "item": as_dict(self._message("in_progress", []))}
        yield self._event("response.output_item.added", **item)
        place: dict[str, Any] = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        yield self._event("response.content_part.added", **place, part=as_dict(OutputText(text="")))
        texts: list[str] = []
        async for _, chunk in found:
            if chunk.text:
                texts.append(chunk.text)
                yield self._event("response.output_text.delta", **place, delta=chunk.text, logprobs=[])
        self._text = "".join(texts)
        response = self._response(await self._stream.result())
        yield self._event("response.output_text.done", **place, text=self._text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=as_dict(OutputText(text=self._text)))
        yield self._event("response.output_item.done", output_index=0, item=as_dict(response.output[0]))
        yield self._event(f"response.{response.status}", response=as_dict(response))

    def _event(self, kind: str, **content: Any) -> bytes:
        self._sequence += 1
        return event({"type": kind, "sequence_number": self._sequence - 1, **content}, kind)

    def _failed(self, error: dict[str, Any]) -> bytes:
        failed = {**as_dict(self._response(None)), "status": "failed"}
        failed["error"] = {"code": error["code"] or error["type"], "message": error["message"]}
        return self._event("response.failed", response=failed)

    def _message(self, status: Literal["in_progress", "completed", "incomplete"], texts: list[str]) -> OutputMessage:
        return OutputMessage(id=self._message_id, status=status, content=[OutputText(text=text) for text in texts])

    def _response(self, completion: Completion | None) -> ResponsesResponse:
        """As it stands; with the completion, as it ended."""
        asked = self._asked
        cut = completion is not None and completion.finish_reason == "length"
        status: Literal["in_progress", "completed", "incomplete"] = "incomplete" if cut else "completed"
        form = None if asked.text is None else asked.text.format
        return ResponsesResponse(
            id=self._id,
            created_at=self._created,
            status="in_progress" if completion is None else status,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata or {},
            model=self._model,
            output=[] if completion is None else [self._message(status, [self._text])],
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            temperature=asked.temperature,
            text={"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            tool_choice=asked.tool_choice or "auto",
            top_p=asked.top_p,
            usage=None if completion is None else _usage(completion),
            user=asked.user,
        )


def _messages(asked: ResponsesRequest) -> list[Message]:
    given = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    if isinstance(asked.input, str):
        return [*given, Message(role="user", content=asked.input)]
    return [*given, *(Message(role=one.role, content=one.content) for one in asked.input)]


def _usage(completion: Completion) -> ResponseUsage:
    used = completion.usage
    return ResponseUsage(
        input_tokens=used.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=used.cached_tokens),
        output_tokens=used.completion_tokens,
        total_tokens=used.total_tokens,
    )


async def respond(request: Request, backend: Backend, asked: ResponsesRequest) -> Response:
    """Answers one request."""
    backend.model(asked.model)
    tokenizer = await backend.client.tokenizer()
    if tokenizer is None:
        raise ApiError(400, "input: the model comes without a tokenizer; use /v1/completions with token ids")
    with told_as("text.format"):
        responding = Responding(backend, asked, tokenizer)
        return await (responding.stream(request) if asked.stream else responding.answer(request))
