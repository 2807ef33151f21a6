"""`/v1/responses`: what is asked and what is answered. Text in, text and calls of functions out; nothing is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, RootModel, Tag

from .chat_schema import MAX_TOOLS, TextPart, ToolName
from .errors import refused
from .fields import Array, Float, No, ShortText, Strict
from .wire import Answer

MAX_ITEMS = 16_384


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputMessage(Strict):
    """A message; those of role assistant may be what an answer held, passed back as it came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Array[TextPart]
    id: ShortText | None = None
    status: ItemStatus | None = None
    phase: str | None = None


class FunctionCallItem(Strict):
    """A call that an answer held, passed back as it came."""

    type: Literal["function_call"]
    call_id: ShortText
    name: ToolName
    arguments: str
    id: ShortText | None = None
    status: ItemStatus | None = None


class FunctionCallOutput(Strict):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: ShortText
    output: str | Array[TextPart]
    id: ShortText | None = None
    status: ItemStatus | None = None


def _item_kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return _ITEMS.get(kind) if isinstance(kind, str) else None


_ITEMS = {
    "message": "InputMessage",
    "function_call": "FunctionCallItem",
    "function_call_output": "FunctionCallOutput",
}
InputItem = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[FunctionCallItem, Tag("FunctionCallItem")]
    | Annotated[FunctionCallOutput, Tag("FunctionCallOutput")],
    Discriminator(
        _item_kind,
        custom_error_type="item_type",
        custom_error_message=f"the type of an item should be one of {', '.join(_ITEMS)}",
    ),
]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: ShortText | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseTool(Strict):
    """A function that the model may call. Other tools are the server's own in OpenAI's API; this one has none."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Strict):
    type: Literal["function"]
    name: ToolName


Includable = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
]
"""Parts of items that no answer of this server holds, so that they can be asked for without effect."""


class ResponseStreamOptions(Strict):
    include_obfuscation: No | None = None


class ResponsesRequest(Strict):
    """OpenAI's request for a response, as far as it is about text and functions."""

    model: ShortText | None = None
    input: str | Annotated[Array[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | Array[str] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[Array[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    store: No | None = None
    background: No | None = None
    previous_response_id: None = None
    conversation: None = None
    reasoning: None = None
    prompt: None = None
    include: Array[Includable] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Of the server's own tools, of which there are none."""
    metadata: dict[str, str] | None = None
    user: ShortText | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: None = None
    moderation: None = None

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for the SDK."""
        names = ("temperature", "top_p", "top_k", "seed", "stop")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.max_output_tokens is not None:
            given["max_tokens"] = self.max_output_tokens
        return given

    def structure(self) -> dict[str, Any]:
        """The SDK's `structured_outputs` as a keyword argument, if any form is asked for."""
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return {}
        if form.type == "json_object":
            return {"structured_outputs": {"json_object": True}}
        if form.schema_ is None:
            raise refused("text.format.schema", "this field is needed with type json_schema")
        return {"structured_outputs": {"json": form.schema_}}


class OutputText(Answer):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(Answer):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class OutputFunctionCall(Answer):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(Answer):
    cached_tokens: int = 0
    cache_write_tokens: Literal[0] = 0
    """OpenAI bills these; what is computed here enters the cache without being told of."""


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
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
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
    output: list[OutputMessage | OutputFunctionCall]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None = None
    text: dict[str, Any] = {"format": {"type": "text"}}
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class ResponseEvent(Answer):
    """The response as it stands."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: ResponsesResponse


class ItemEvent(Answer):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputMessage | OutputFunctionCall


class _OfItem(Answer):
    sequence_number: int
    item_id: str
    output_index: int


class PartEvent(_OfItem):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: OutputText


class TextDeltaEvent(_OfItem):
    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    delta: str
    logprobs: list[Any]


class TextDoneEvent(_OfItem):
    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[Any]


class ArgumentsDeltaEvent(_OfItem):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_OfItem):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ResponseStreamEvent(
    RootModel[
        Annotated[
            ResponseEvent
            | ItemEvent
            | PartEvent
            | TextDeltaEvent
            | TextDoneEvent
            | ArgumentsDeltaEvent
            | ArgumentsDoneEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """The data of an event of a stream."""
