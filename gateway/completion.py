"""`/v1/completions`: text or token ids in, text out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Literal, cast

from starlette.requests import Request
from starlette.responses import Response

from ..client.completion import CompletionStream
from ..client.prompts import require_count
from ..client.results import Choice, Chunk, Completion
from ..client.tokenizer import Tokenizer
from .backend import Backend
from .completion_schema import CompletionChoice, CompletionRequest, CompletionResponse
from .config import GatewayConfig
from .errors import ApiError, refused
from .fields import told_as
from .generation import Piece, begun, completions, continuous_usage, pieces
from .limits import require_room
from .logprobs import LegacyLogprobs
from .sse import DONE, PLACE, EventStream, answered, event, text_event
from .wire import as_dict, new_id, now, response_with, usage_of


class Completing:
    """One request."""

    def __init__(
        self, backend: Backend, asked: CompletionRequest, tokenizer: Tokenizer | None, config: GatewayConfig
    ) -> None:
        require_room(asked, config)
        self._asked = asked
        self._tokenizer = tokenizer
        self._model = backend.model(asked.model).name
        self._id, self._created = new_id("cmpl-", asked.request_id), now()
        self._n = asked.n or 1
        self._prompt_only = asked.max_tokens == 0
        self._sampling = sampling = {**asked.sampling(), **asked.structure(), "max_tokens": asked.wanted_tokens()}
        if asked.logprobs is not None:
            sampling["logprobs"] = asked.logprobs
            if asked.echo:
                sampling["prompt_logprobs"] = asked.logprobs
        if asked.stream_options is not None and not asked.stream:
            raise refused("stream_options", "only with stream: true")
        self._streams: list[CompletionStream] = []

    async def begin(self, backend: Backend) -> None:
        """What takes longer the longer the prompts are."""
        for given in self._asked.prompts():
            prompt = await self._prompt(given, backend)
            self._streams.append(backend.client.stream(prompt, None, **self._asked.options(), **self._sampling))

    async def _prompt(self, prompt: str | list[int], backend: Backend) -> str | list[int]:
        """Text becomes token ids here only where the SDK's own way is not what was asked for."""
        if isinstance(prompt, str) and self._asked.add_special_tokens is False:
            if self._tokenizer is None:
                raise ApiError(400, "prompt: the model comes without a tokenizer; pass token ids", param="prompt")
            admit = partial(require_count, backend.client.model.max_model_len)
            return await backend.aside(partial(self._tokenizer.encode, prompt, add_special_tokens=False, admit=admit))
        return prompt

    def _text_of(self, id_: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([id_], skip_special_tokens=False)

    # --- whole -----------------------------------------------------------------------------------------------------

    async def answer(self, request: Request) -> Response:
        return await answered(request, self._answer())

    async def _answer(self) -> Response:
        found = await completions(self._streams)
        output = 0 if self._prompt_only else None
        answer = CompletionResponse(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[],
            usage=usage_of(*found, completion_tokens=output),
        )
        choices = (
            self._choice(index, choice, completion)
            for index, completion in enumerate(found)
            for choice in completion.choices
        )
        return await response_with(answer, choices)

    def _choice(self, prompt_index: int, choice: Choice, completion: Completion) -> CompletionChoice:
        echo, only = bool(self._asked.echo), self._prompt_only
        text = "" if only else choice.text
        logprobs = None
        if self._asked.logprobs is not None:
            logprobs = LegacyLogprobs(self._text_of)
            if echo:
                logprobs.add_prompt(completion)
            if not only:
                logprobs.add(choice.logprobs or [])
        return CompletionChoice(
            index=prompt_index * self._n + choice.index,
            text=self._echoed(prompt_index, completion) + text if echo else text,
            logprobs=None if logprobs is None else logprobs.taken(),
            finish_reason="length" if only else cast(Literal["stop", "length"], choice.finish_reason),
            stop_reason=None if only else choice.stop_reason,
            token_ids=([] if only else choice.token_ids) if self._asked.return_token_ids else None,
            prompt_token_ids=completion.prompt_token_ids if self._asked.return_token_ids else None,
        )

    def _echoed(self, prompt_index: int, completion: Completion) -> str:
        prompt = self._asked.prompts()[prompt_index]
        if isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise ApiError(400, "echo: the model comes without a tokenizer: token ids have no text", param="echo")
        skip = self._asked.skip_special_tokens is not False
        return self._tokenizer.decode(completion.prompt_token_ids, skip)

    # --- streamed --------------------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> Response:
        if self._asked.echo:
            raise refused("echo", "not with stream: true; the prompt is known to whoever sent it")
        found = await answered(request, begun(pieces(self._streams)))
        return EventStream(self._events(found), lambda error: event({"error": error}) + DONE)

    async def _events(self, found: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        options = self._asked.stream_options
        with_usage = options is not None and options.include_usage
        head: dict[str, Any] = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
        }
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        used = continuous_usage(options, self._streams)
        texts_only = self._asked.logprobs is None and not self._asked.return_token_ids and used is None
        written: dict[int, Callable[[str], bytes]] = {}
        logprobs: dict[int, LegacyLogprobs] = {}
        async for prompt_index, chunk in found:
            index = prompt_index * self._n + chunk.index
            if texts_only and chunk.finish_reason is None:
                if index not in written:
                    written[index] = text_event({**head, "choices": [_choice(index, PLACE)], **more})
                yield written[index](chunk.text)
                continue
            choice = _choice(index, chunk.text, chunk)
            if self._asked.logprobs is not None:
                growing = logprobs.setdefault(index, LegacyLogprobs(self._text_of))
                growing.add(chunk.logprobs or [])
                choice["logprobs"] = as_dict(growing.taken())
            if self._asked.return_token_ids:
                choice["token_ids"] = chunk.token_ids
            if used is not None:
                used.add(chunk)
                more = {"usage": used.so_far()}
            yield event({**head, "choices": [choice], **more})
        if with_usage:
            total = usage_of(*[await stream.result() for stream in self._streams])
            yield event({**head, "choices": [], "usage": as_dict(total)})
        yield DONE


def _choice(index: int, text: str, chunk: Chunk | None = None) -> dict[str, Any]:
    """Of an event, which goes on unless `chunk` tells how it ends."""
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": None if chunk is None else chunk.finish_reason,
        "stop_reason": None if chunk is None else chunk.stop_reason,
    }


async def complete(request: Request, backend: Backend, asked: CompletionRequest, config: GatewayConfig) -> Response:
    """Answers one request."""
    backend.model(asked.model)
    tokenizer = await backend.client.tokenizer()
    with told_as(asked.structure_field()):
        completing = Completing(backend, asked, tokenizer, config)
        begin = completing.begin(backend)
        await (answered(request, begin) if asked.add_special_tokens is False else begin)  # else there is no wait in it
        return await (completing.stream(request) if asked.stream else completing.answer(request))
