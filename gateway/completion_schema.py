"""`/v1/completions`: what is asked and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .errors import refused
from .fields import Array, SamplingFields, ShortText, StreamOptions, StructureFields, TokenId, Yes
from .logprobs import CompletionLogprobs
from .wire import Answer, Usage

MAX_PROMPTS = 2_048
DEFAULT_MAX_TOKENS = 16
"""OpenAI's, and vLLM's."""

TokenIds = Annotated[Array[TokenId], Field(min_length=1)]


class CompletionRequest(SamplingFields, StructureFields):
    """OpenAI's completion request, with vLLM's further fields."""

    model: ShortText | None = None
    prompt: (
        str
        | TokenIds
        | Annotated[Array[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[Array[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = DEFAULT_MAX_TOKENS
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: None = None
    user: ShortText | None = None
    add_special_tokens: bool | None = None
    spaces_between_special_tokens: Yes | None = None
    return_token_ids: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)

    def wanted_tokens(self) -> int | None:
        """What to pass as max_tokens: with `echo` a prompt alone may be asked for."""
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "0 leaves nothing to answer; it must be at least 1 unless echo is true")
        return 1 if self.max_tokens == 0 else self.max_tokens


class CompletionChunkChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class CompletionChoice(CompletionChunkChoice):
    prompt_token_ids: list[int] | None = None


class CompletionResponse(Answer):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionChunk(Answer):
    """The data of an event of a stream: of one choice, or at the end the usage."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
