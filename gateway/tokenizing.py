"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import Response

from ..client.prompts import ChatOptions, to_token_ids
from ..client.tokenizer import Tokenizer
from .backend import Backend
from .chat_schema import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from .errors import refused
from .fields import Array, ShortText, Strict, TokenId
from .messages import to_template
from .turns import Turns
from .wire import Answer, json_response

MAX_TOKENS = 262_144
"""Of one request, or as many as the model's context holds if that is more."""


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
    tokens: Array[TokenId]
    skip_special_tokens: bool = False


class DetokenizeResponse(Answer):
    prompt: str


async def tokenize(backend: Backend, asked: TokenizeRequest, turns: Turns) -> Response:
    """The token ids that a prompt would have."""
    model = backend.model(asked.model)
    tokenizer = await backend.tokenizer()
    if (asked.prompt is None) == (asked.messages is None):
        raise refused("prompt", "either prompt or messages is to be given, and not both")
    field = "prompt" if asked.messages is None else "messages"
    admit = partial(_admit, field, max(MAX_TOKENS, model.max_model_len))
    encode: Callable[[], list[int]]
    if asked.messages is None:
        special = asked.add_special_tokens is not False
        encode = partial(tokenizer.encode, asked.prompt or "", special, admit=admit)
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
        encode = partial(_chat_ids, chat, tokenizer, options, admit)

    def answer() -> Response:
        ids = encode()
        text_of = cache(partial(tokenizer.decode, skip_special_tokens=False))
        strings = [text_of((id_,)) for id_ in ids] if asked.return_token_strs else None
        return json_response(
            TokenizeResponse(count=len(ids), max_model_len=model.max_model_len, tokens=ids, token_strs=strings)
        )

    return await backend.aside(answer)


def _chat_ids(
    chat: list[dict[str, Any]], tokenizer: Tokenizer, options: ChatOptions, admit: Callable[[int], None]
) -> list[int]:
    ids: list[int] = to_token_ids(chat, tokenizer, options, admit).tolist()
    return ids


def _admit(field: str, limit: int, count: int) -> None:
    """Raises ApiError for more tokens than one answer tells."""
    if count > limit:
        raise refused(field, f"{count} tokens are over the limit of {limit}")


async def detokenize(backend: Backend, asked: DetokenizeRequest) -> Response:
    """The text of token ids."""
    model = backend.model(asked.model)
    tokenizer = await backend.tokenizer()
    _admit("tokens", max(MAX_TOKENS, model.max_model_len), len(asked.tokens))
    outside = next((id_ for id_ in asked.tokens if id_ >= model.vocab_size), None)
    if outside is not None:
        raise refused("tokens", f"{outside} is no token id; the vocabulary has ids 0 to {model.vocab_size - 1}")
    text = await backend.aside(partial(tokenizer.decode, asked.tokens, asked.skip_special_tokens))
    return json_response(DetokenizeResponse(prompt=text))
