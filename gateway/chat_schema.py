"""`/v1/chat/completions`: what is asked and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..protocol.sampling import MAX_LOGPROBS
from .fields import Array, No, SamplingFields, ShortText, StreamOptions, Strict, StructureFields, Yes
from .logprobs import ChatLogprobs
from .wire import Answer, Usage

MAX_MESSAGES = 16_384
MAX_TOOLS = 1_024
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class CacheControl(Strict):
    """What Anthropic's API wants to hear before it caches a prefix; here prefixes are cached unasked."""

    type: Literal["ephemeral"]
    ttl: ShortText | None = None


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: Array[Any] | None = None
    logprobs: Array[Any] | None = None
    cache_control: CacheControl | None = None


class CalledFunction(Strict):
    name: ToolName
    arguments: str
    parsed_arguments: Any = None
    """What OpenAI's SDK made of the arguments; it stays in a message that is passed back."""


class ToolCall(Strict):
    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """One of a chat. Assistant messages may be what an answer held, passed back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Array[TextPart] | None = None
    name: ShortText | None = None
    tool_calls: Annotated[Array[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: ShortText | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's newer name of reasoning_content."""
    parsed: Any = None
    """What OpenAI's SDK made of the content; it stays in a message that is passed back."""
    audio: None = None
    function_call: None = None
    annotations: Array[Any] | None = None
    cache_control: CacheControl | None = None


class FunctionTool(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionTool
    cache_control: CacheControl | None = None

    def shown(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {"type": self.type, "function": given(self.function)}


def given(function: FunctionTool) -> dict[str, Any]:
    """What it holds that is not null. The schema of its parameters is not copied: it may be large."""
    found = ((name, getattr(function, name)) for name in ("name", "description", "parameters", "strict"))
    return {name: value for name, value in found if value is not None}


class NamedFunction(Strict):
    name: ToolName


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingFields, StructureFields):
    """OpenAI's chat request, with vLLM's further fields."""

    model: ShortText | None = None
    messages: Annotated[Array[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[Array[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    user: ShortText | None = None
    metadata: dict[str, str] | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    modalities: Array[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    add_special_tokens: No | None = None
    """The chat template writes them."""
    echo: No | None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_retention: None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    """A variable of the chat template, if it reads one of this name."""
    web_search_options: None = None
    spaces_between_special_tokens: Yes | None = None
    return_token_ids: bool | None = None
    include_reasoning: bool | None = None
    """No part of an answer is told apart as reasoning."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Array[dict[str, Any]] | None = None


class AnswerFunction(Answer):
    name: str
    arguments: str


class AnswerToolCall(Answer):
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChoice(Answer):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(Answer):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    service_tier: str | None = None
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ToolCallDelta(AnswerToolCall):
    index: int


class ChatDelta(Answer):
    """What a message gains."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(Answer):
    """The data of an event of a stream: of one choice, or at the end the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
