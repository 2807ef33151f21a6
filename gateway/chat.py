"""`/v1/chat/completions`: messages in, a message out, or calls of tools."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

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
)
from .config import GatewayConfig
from .errors import UNSUPPORTED, ApiError, refused
from .fields import told_as
from .generation import Piece, begun, completions, continuous_usage, pieces
from .limits import require_samples
from .logprobs import chat_logprobs
from .messages import to_template
from .sse import DONE, PLACE, EventStream, answered, event, text_event
from .tool_use import AnswerReader, NamedCall, Wanted, tool_use
from .turns import Turns
from .wire import as_dict, new_id, now, response_with, usage_of


def _wanted(asked: ChatRequest) -> Wanted:
    choice = asked.tool_choice
    return Wanted(
        tools=[tool.shown() for tool in asked.tools or ()],
        choice=choice if isinstance(choice, str) else None,
        function=choice.function.name if isinstance(choice, NamedToolChoice) else None,
        several=asked.parallel_tool_calls is not False,
        structure=asked.structure(),
        structure_field=asked.structure_field() or "response_format",
        function_field="tool_choice.function.name",
    )


def _variables(asked: ChatRequest, template: str) -> dict[str, Any] | None:
    """What the template may read besides; what is said of it by name goes before."""
    if asked.reasoning_effort is None:
        return asked.chat_template_kwargs
    if "reasoning_effort" not in template:
        raise refused(
            "reasoning_effort", "not supported here: the model's chat template does not read it", code=UNSUPPORTED
        )
    return {"reasoning_effort": asked.reasoning_effort, **(asked.chat_template_kwargs or {})}


class Chatting:
    """One request."""

    def __init__(self, backend: Backend, asked: ChatRequest, tokenizer: Tokenizer, config: GatewayConfig) -> None:
        require_samples(1, asked.n, config)
        self._asked = asked
        self._id, self._created = new_id("chatcmpl-", asked.request_id), now()
        self._model = backend.model(asked.model).name
        if asked.chat_template is not None and not config.trust_request_chat_template:
            raise refused("chat_template", "not taken from requests; --trust-request-chat-template allows it")
        template = tokenizer.chat_template(bool(asked.tools), asked.chat_template).source
        self._use = tool_use(_wanted(asked), template, tokenizer, config)
        self._sees_special = self._use.sees_special(tokenizer)
        if asked.stream_options is not None and not asked.stream:
            raise refused("stream_options", "only with stream: true")
        self._template = template
        self._options = ChatOptions(
            tools=self._use.tools,
            documents=asked.documents,
            chat_template=asked.chat_template,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=bool(asked.continue_final_message),
            template_variables=_variables(asked, template),
        )
        self._stream: CompletionStream

    async def begin(self, backend: Backend, turns: Turns) -> None:
        """What takes longer the longer the chat is."""
        messages = await to_template(self._asked.messages, self._template, turns)
        self._stream = backend.client.stream(
            messages, None, chat=self._options, **self._asked.options(), **self._sampling()
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
        if asked.top_logprobs and not asked.logprobs:
            raise refused("top_logprobs", "only with logprobs: true")
        if asked.logprobs:
            sampling["logprobs"] = asked.top_logprobs or 0
        return sampling

    # --- whole -----------------------------------------------------------------------------------------------------

    async def answer(self, request: Request) -> Response:
        return await answered(request, self._answer())

    async def _answer(self) -> Response:
        (completion,) = await completions([self._stream])
        with_ids = bool(self._asked.return_token_ids)
        answer = ChatResponse(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[],
            usage=usage_of(completion),
            prompt_token_ids=completion.prompt_token_ids if with_ids else None,
        )
        return await response_with(answer, (self._choice(choice) for choice in completion.choices))

    def _choice(self, choice: Choice) -> ChatChoice:
        reader = AnswerReader(self._use)
        reader.push(choice.text)
        reader.finish()
        calls = [_as_answer(call) for call in reader.calls]
        return ChatChoice(
            index=choice.index,
            message=AnswerMessage(content=reader.text if reader.text or not calls else None, tool_calls=calls or None),
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
        used = continuous_usage(options, [self._stream])
        texts_only = not self._asked.logprobs and not self._asked.return_token_ids and used is None
        readers: dict[int, AnswerReader] = {}
        written: dict[int, Callable[[str], bytes]] = {}
        async for _, chunk in found:
            index = chunk.index
            reader = readers.get(index)
            if reader is None:
                reader = readers[index] = AnswerReader(self._use)
                written[index] = text_event({**head, "choices": [_delta(index, {"content": PLACE})]})
                begin = {**head, "choices": [_delta(index, {"role": "assistant", "content": ""})]}
                yield event(begin if used is None else {**begin, "usage": used.so_far()})
            if texts_only and chunk.finish_reason is None:
                for news in reader.push(chunk.text):
                    if isinstance(news, str):
                        yield written[index](news)
                    else:
                        yield event({**head, "choices": [_delta(index, _gain(reader, news))]})
                continue
            if used is not None:
                used.add(chunk)
                head["usage"] = used.so_far()
            for choice in self._news(reader, chunk):
                yield event({**head, "choices": [choice]})
        if with_usage:
            yield event({**head, "usage": as_dict(usage_of(await self._stream.result()))})
        yield DONE

    def _news(self, reader: AnswerReader, chunk: Chunk) -> list[dict[str, Any]]:
        """The choices of the events that tell of a chunk."""
        found = [*reader.push(chunk.text)]
        reason = None
        if chunk.finish_reason is not None:
            found += reader.finish()
            reason = reader.reason(chunk.finish_reason)
        deltas = [_gain(reader, news) for news in found]
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


def _gain(reader: AnswerReader, news: str | NamedCall) -> dict[str, Any]:
    """The delta that tells of it."""
    if isinstance(news, str):
        return {"content": news}
    return {"tool_calls": [{"index": reader.calls.index(news), **as_dict(_as_answer(news))}]}


def _as_answer(call: NamedCall) -> AnswerToolCall:
    return AnswerToolCall(id=call.id, function=AnswerFunction(name=call.name, arguments=call.arguments))


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


async def chat(request: Request, backend: Backend, asked: ChatRequest, config: GatewayConfig, turns: Turns) -> Response:
    """Answers one request."""
    backend.model(asked.model)
    tokenizer = await backend.client.tokenizer()
    if tokenizer is None:
        raise ApiError(400, "messages: the model comes without a tokenizer; use /v1/completions with token ids")
    length = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    with told_as(asked.structure_field() or ("tools" if asked.tools else None), max_tokens=length, prompt="messages"):
        chatting = Chatting(backend, asked, tokenizer, config)
        await chatting.begin(backend, turns)
        return await (chatting.stream(request) if asked.stream else chatting.answer(request))
