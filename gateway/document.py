"""What the OpenAPI document says beyond the types of fields: their bounds, what streams consist of, and examples."""

from __future__ import annotations

from typing import Any, Final

from pydantic import TypeAdapter

from ..protocol.messages import MAX_PRIORITY, MAX_SALT_CHARS, MAX_SAMPLES
from ..protocol.sampling import MAX_LOGIT_BIASES, SamplingParams

Schema = dict[str, Any]

BOUNDED: Final = ("CompletionRequest", "ChatRequest", "ResponsesRequest")
"""Whose fields are sampling parameters, which the SDK checks."""
LONG_NAMES: Final = {"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens"}
SAYS_NOTHING: Final = frozenset({"title", "description", "default"})


def say_bounds(schemas: dict[str, Schema]) -> None:
    """Adds to the requests' fields what the SDK demands of sampling parameters, so that it stands in one place only."""
    bounds = _bounds()
    for name in BOUNDED:
        for field, schema in schemas[name]["properties"].items():
            known = bounds.get(LONG_NAMES.get(field, field))
            if known is not None:
                _narrow(schema, known)


def _bounds() -> dict[str, Schema]:
    properties = TypeAdapter(SamplingParams).json_schema()["properties"]
    found = {name: _plain(schema) for name, schema in properties.items() if name != "structured_outputs"}
    found["logit_bias"].pop("maxLength")  # pydantic's word for it, which means nothing of an object
    found["logit_bias"] |= {"maxProperties": MAX_LOGIT_BIASES, "propertyNames": {"pattern": "^[0-9]{1,10}$"}}
    found["n"] = {"type": "integer", "minimum": 1, "maximum": MAX_SAMPLES}
    found["priority"] = {"type": "integer", "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY}
    found["cache_salt"] = {"type": "string", "maxLength": MAX_SALT_CHARS}
    return found


def _plain(schema: Schema) -> Schema:
    """Without null, which fields of requests may all be."""
    found = next((one for one in schema.get("anyOf", ()) if one["type"] != "null"), schema)
    return {key: value for key, value in found.items() if key not in SAYS_NOTHING}


def _narrow(schema: Schema, known: Schema) -> None:
    """Of the types that a field may have, the one that is known gets its bounds; a field may be tighter already."""
    for one in schema.get("anyOf", [schema]):
        if one.get("type") == known["type"]:
            one |= {**known, **one, **({"items": known["items"]} if "items" in known else {})}
            if "additionalProperties" in known:
                one["additionalProperties"] = known["additionalProperties"]
        elif one.get("type") == "string" and known.get("items", {}).get("type") == "string":  # one instead of a list
            one |= known["items"]


_EITHER: Final = (("prompt", "messages"), ("messages", "prompt"))


def say_alternatives(schemas: dict[str, Schema]) -> None:
    """Adds which fields belong together."""
    plain = {"properties": {"type": {"enum": ["text", "json_object"]}}}
    schemas["TextFormat"]["anyOf"] = [plain, _given("schema")]
    form = {"type": "object", **_given("schema")}
    schemas["ResponseFormat"]["anyOf"] = [plain, {"properties": {"json_schema": form}, "required": ["json_schema"]}]
    prompt, messages = ({**_given(one), "not": _given(other)} for one, other in _EITHER)
    messages["properties"]["add_special_tokens"] = {"enum": [False, None]}
    schemas["TokenizeRequest"]["anyOf"] = [prompt, messages]


def _given(field: str) -> Schema:
    return {"properties": {field: {"not": {"type": "null"}}}, "required": [field]}


def stream_of(*kinds: str, ends_with: str | None = None) -> Schema:
    """The schema of each event of a stream whose data are JSON of one of these kinds, `$ref`s of schemas. `ends_with`
    is the data of the last one."""
    contents = [{"$ref": kind} for kind in kinds]
    data: Schema = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": contents[0] if len(contents) == 1 else {"anyOf": contents},
    }
    if ends_with is not None:
        data = {"anyOf": [{"const": ends_with}, data]}
    properties = {"data": data, "event": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": ["data"], "additionalProperties": False}


_TOOL: Final = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_QUESTION: Final = [{"role": "user", "content": "What is 17 + 25?"}]
_WEATHER: Final = [{"role": "user", "content": "What is the weather in Paris?"}]
_SCHEMA: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_PERSON: Final = 'Give me a JSON object with name "Ana" and age 31.'

EXAMPLES: Final[dict[str, dict[str, Schema]]] = {
    "CompletionRequest": {
        "text": {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0},
        "several": {"prompt": ["Once upon a time", "There was"], "max_tokens": 8, "n": 2, "logprobs": 2, "seed": 7},
        "token ids": {"prompt": [72, 101, 108], "max_tokens": 4, "echo": True, "return_token_ids": True},
        "stream": {
            "prompt": "Once upon a time",
            "max_tokens": 16,
            "stop": ["."],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    },
    "ChatRequest": {
        "question": {"messages": _QUESTION, "max_completion_tokens": 32, "temperature": 0},
        "stream": {
            "messages": [{"role": "system", "content": "You are a helpful assistant."}, *_QUESTION],
            "max_completion_tokens": 32,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "tools": {
            "messages": _WEATHER,
            "tools": [{"type": "function", "function": _TOOL}],
            "tool_choice": "auto",
            "max_completion_tokens": 64,
            "temperature": 0,
        },
        "streamed call": {
            "messages": _WEATHER,
            "tools": [{"type": "function", "function": _TOOL}],
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            "max_completion_tokens": 64,
            "stream": True,
        },
        "JSON": {
            "messages": [{"role": "user", "content": _PERSON}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA}},
            "max_completion_tokens": 64,
            "temperature": 0,
        },
    },
    "ResponsesRequest": {
        "question": {"input": "What is 17 + 25?", "max_output_tokens": 32, "temperature": 0},
        "stream": {"input": _QUESTION, "instructions": "Be brief.", "max_output_tokens": 32, "stream": True},
        "tools": {
            "input": [
                *_WEATHER,
                {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
                {"type": "function_call_output", "call_id": "call_1", "output": '{"temperature": 21, "sky": "sunny"}'},
            ],
            "tools": [{"type": "function", **_TOOL}],
            "max_output_tokens": 64,
        },
        "streamed call": {
            "input": _WEATHER,
            "tools": [{"type": "function", **_TOOL}],
            "tool_choice": "required",
            "max_output_tokens": 64,
            "stream": True,
        },
        "JSON": {
            "input": _PERSON,
            "text": {"format": {"type": "json_schema", "name": "person", "schema": _SCHEMA}},
            "max_output_tokens": 64,
        },
    },
    "TokenizeRequest": {
        "text": {"prompt": "Once upon a time", "return_token_strs": True},
        "chat": {"messages": _QUESTION, "add_generation_prompt": True},
    },
    "DetokenizeRequest": {"token ids": {"tokens": [72, 101, 108]}},
}
"""Bodies for each request, that any served model takes if it has a tokenizer with a chat template that knows tools."""


def examples_of(request: str) -> dict[str, Schema]:
    """As a media type has them."""
    return {name: {"value": value} for name, value in EXAMPLES[request].items()}
