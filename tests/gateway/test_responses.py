"""Functions in `/v1/responses`, through OpenAI's own SDK, whose types every event and answer must fit exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import BaseModel

from support.gateway import MODEL, Served

ASKED: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": False,
}
NAMED = {"type": "function", "name": "get_weather"}
OTHER = {**TOOL, "name": "get_time", "description": "Get the time"}
ARGUMENTS = '{"city": "Paris"}'


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.api, api_key="unused", max_retries=0) as found:
        yield found


def options(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "tools": [TOOL], "temperature": 0, "max_output_tokens": 200, **more}


def require_as_typed(found: Any) -> None:
    """The SDK takes what it gets without a look; this looks."""
    assert isinstance(found, BaseModel)
    type(found).model_validate(found.to_dict())


@pytest.mark.parametrize(("choice", "strict"), [("auto", False), ("auto", True), ("required", False), (NAMED, False)])
def test_a_function_is_called_and_its_result_used(client: Any, choice: object, strict: bool) -> None:
    tools = [OTHER, {**TOOL, "strict": strict}] if choice == NAMED else [{**TOOL, "strict": strict}]
    done = client.responses.create(input=ASKED, **options(tools=tools, tool_choice=choice))
    require_as_typed(done)
    (call,) = done.output
    assert (call.type, call.name, call.arguments, call.status) == (
        "function_call",
        "get_weather",
        ARGUMENTS,
        "completed",
    )
    assert [tool.name for tool in done.tools] == [tool["name"] for tool in tools]
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": json.dumps({"temperature": 21, "sky": "sunny"}),
    }
    told = client.responses.create(input=[*ASKED, *done.output, result], **options())
    require_as_typed(told)
    assert told.output_text == "It is 21 degrees and sunny in Paris."
    parts = {**result, "output": [{"type": "input_text", "text": result["output"]}]}
    assert client.responses.create(input=[*ASKED, *done.output, parts], **options()).output_text == told.output_text


def test_streamed_calls(client: Any) -> None:
    told = list(client.responses.create(input=ASKED, stream=True, **options()))
    for event in told:
        require_as_typed(event)
    assert [event.type.removeprefix("response.") for event in told] == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in told] == list(range(len(told)))
    added, delta, done, ended = told[2:6]
    assert (added.item.status, added.item.arguments) == ("in_progress", "")
    assert added.item.id == delta.item_id == done.item_id == ended.item.id
    assert delta.delta == done.arguments == ended.item.arguments == ARGUMENTS
    assert told[-1].response.output == [ended.item]
    with client.responses.stream(input=ASKED, **options(tools=[{**TOOL, "strict": True}])) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_response().output
    assert call.parsed_arguments == {"city": "Paris"}


def test_text_beside_functions(client: Any) -> None:
    asked = {"input": "What is 123 + 456?", **options()}
    told = list(client.responses.create(stream=True, **asked))
    for event in told:
        require_as_typed(event)
    text = "".join(event.delta for event in told if event.type == "response.output_text.delta")
    assert text == "123 + 456 = 579"
    assert told[-1].response.output_text == text
    assert client.responses.create(**asked).output_text == text
    no_call = client.responses.create(input=ASKED, **options(tool_choice="none"))
    assert [item.type for item in no_call.output] == ["message"]
    cut = client.responses.create(input=ASKED, **options(tool_choice="none", max_output_tokens=2))
    require_as_typed(cut)
    assert (cut.status, cut.output[0].status, cut.incomplete_details.reason) == (
        "incomplete",
        "incomplete",
        "max_output_tokens",
    )
