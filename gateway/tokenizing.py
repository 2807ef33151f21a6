"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import Response

from ..client.prompts import ChatOptions, to_token_ids
from .backend import Backend
from .chat_schema import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from .errors import refused
from .fields import Array, ShortText, Strict, TokenId
from .messages import to_template
from .turns import Turns
from .wire import Answer, json_response

MAX_TOKENS = 262_144


class TokenizeRequest(Strict):
    """Of a text, or of a chat."""

    model: ShortText | None = None
    prompt: str | None = None
    messages: Annotated[Array[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[Array[Tool], Field(max_length=MAX_TOOLS)] | None = None


class TokenizeResponse(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    model: ShortText | None = None
    tokens: Annotated[Array[TokenId], Field(max_length=MAX_TOKENS)]
    skip_special_tokens: bool = False


class DetokenizeResponse(Answer):
    prompt: str


async def tokenize(backend: Backend, asked: TokenizeRequest, turns: Turns) -> Response:
    """The token ids that a prompt would have."""
    model = backend.model(asked.model)
    tokenizer = await backend.tokenizer()
    if (asked.prompt is None) == (asked.messages is None):
        raise refused("prompt", "either prompt or messages is to be given, and not both")
    if asked.messages is None:
        special = asked.add_special_tokens is not False
        ids = await asyncio.to_thread(tokenizer.encode, asked.prompt or "", special)
    else:
        if asked.add_special_tokens:
            raise refused("add_special_tokens", "not with messages: the chat template writes them")
        tools = [tool.shown() for tool in asked.tools] if asked.tools else None
        options = ChatOptions(
            tools=tools,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=bool(asked.continue_final_message),
            template_variables=asked.chat_template_kwargs,
        )
        chat = await to_template(asked.messages, tokenizer.chat_template(bool(tools)).source, turns)
        ids = (await asyncio.to_thread(to_token_ids, chat, tokenizer, options)).tolist()
    strings = [tokenizer.decode([id_], False) for id_ in ids] if asked.return_token_strs else None
    return json_response(
        TokenizeResponse(count=len(ids), max_model_len=model.max_model_len, tokens=ids, token_strs=strings)
    )


async def detokenize(backend: Backend, asked: DetokenizeRequest) -> Response:
    """The text of token ids."""
    model = backend.model(asked.model)
    tokenizer = await backend.tokenizer()
    outside = next((id_ for id_ in asked.tokens if id_ >= model.vocab_size), None)
    if outside is not None:
        raise refused("tokens", f"{outside} is no token id; the vocabulary has ids 0 to {model.vocab_size - 1}")
    text = await asyncio.to_thread(tokenizer.decode, asked.tokens, asked.skip_special_tokens)
    return json_response(DetokenizeResponse(prompt=text))
