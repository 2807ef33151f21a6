"""`/v1/responses`: what is asked and what is answered. Text in, text out; nothing is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .chat_schema import TextPart
from .errors import refused
from .fields import Float, ShortText, Strict
from .wire import Answer

MAX_ITEMS = 16_384


class InputMessage(Strict):
    """A message; those of role assistant may be what an answer held, passed back as it came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: ShortText | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: ShortText | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Strict):
    """OpenAI's request for a response, as far as it is about text."""

    model: ShortText | None = None
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    reasoning: None = None
    prompt: None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    top_logprobs: Literal[0] | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    user: ShortText | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for the SDK."""
        names = ("temperature", "top_p", "top_k", "seed", "stop")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.max_output_tokens is not None:
            given["max_tokens"] = self.max_output_tokens
        form = None if self.text is None else self.text.format
        if form is not None and form.type == "json_object":
            given["structured_outputs"] = {"json_object": True}
        if form is not None and form.type == "json_schema":
            if form.schema_ is None:
                raise refused("text.format.schema", "this field is needed with type json_schema")
            given["structured_outputs"] = {"json": form.schema_}
        return given


class OutputText(Answer):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(Answer):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputTokensDetails(Answer):
    cached_tokens: int = 0


class OutputTokensDetails(Answer):
    reasoning_tokens: int = 0


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ResponseError(Answer):
    code: str
    message: str


class ResponsesResponse(Answer):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None = None
    text: dict[str, Any] = {"format": {"type": "text"}}
    tool_choice: str = "auto"
    tools: list[Any] = []
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
