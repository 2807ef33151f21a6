"""What programs written for OpenAI's or vLLM's servers send and expect, where they differ from what a schema alone
would take."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tandem.gateway.chat_schema import Message
from tandem.gateway.messages import to_template
from tandem.gateway.turns import Turns

from support.asking import ask_until
from support.gateway import MODEL, Served, events, gateway

pytestmark = pytest.mark.thorough

SUM = [{"role": "user", "content": "What is 2 + 3?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
FUNCTION = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
PERSON = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}


class Age(BaseModel):
    age: int


def chat(served: Served, messages: Any = SUM, **more: Any) -> Any:
    answer = served.post("/v1/chat/completions", {"messages": messages, "temperature": 0, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(served: Served, path: str, body: Any) -> dict[str, Any]:
    answer = served.post(path, content=json.dumps(body).encode())
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


# --- messages and fields as programs write them ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the SDK's own
def test_what_openais_sdk_parsed_can_be_passed_back(served: Served) -> None:
    client: Any
    with openai.OpenAI(base_url=served.api, api_key="unused", max_retries=0) as client:
        create, parse = client.chat.completions.create, client.chat.completions.parse
        parsed = parse(model=MODEL, messages=SUM, response_format=Age, temperature=0, max_tokens=60)
        assert isinstance(parsed.choices[0].message.parsed, Age)
        for message in (parsed.choices[0].message, parsed.choices[0].message.model_dump(warnings=False)):
            answer = create(model=MODEL, messages=[*SUM, message, *SUM], temperature=0)
            assert answer.choices[0].message.content
        tools = [{"type": "function", "function": FUNCTION}]
        called = parse(model=MODEL, messages=WEATHER, tools=tools, temperature=0).choices[0].message
        (call,) = called.tool_calls
        assert call.function.parsed_arguments == {"city": "Paris"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        for message in (called, called.model_dump()):
            assert create(model=MODEL, messages=[*WEATHER, message, result], tools=tools).choices[0].message.content


def test_null_asks_for_nothing_wherever_it_stands(served: Served) -> None:
    """As programs send it that write every field that they know, vLLM's messages for example."""
    message = {"content": "5", "role": "assistant", "refusal": None, "reasoning": None, "of_tomorrow": None}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}", "hint": None}, "also": None}
    plain = chat(served, [*SUM, {"role": "assistant", "content": "5"}, *SUM, {"role": "assistant", "content": "5"}])
    found = chat(
        served,
        [*SUM, message, *SUM, {**message, "another": None}],
        mm_processor_kwargs=None,
        kv_transfer_params=None,
        Temperature=None,
        **{"[a]": None, "": None, "é": None},
        stream_options=None,
    )
    assert found["choices"][0]["message"] == plain["choices"][0]["message"]
    assert found["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    parts = [{"type": "text", "text": "What is 2 + 3?", "detail": None}]
    result = {"role": "tool", "tool_call_id": "a", "content": parts}
    chat(served, [{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [call]}, result])
    tool = {"type": "function", "function": FUNCTION, "defer_loading": None}
    chat(served, tools=[tool], response_format={"type": "text", "x": None})
    item = {"role": "user", "content": [{"type": "input_text", "text": "hi", "x": None}], "y": None}
    assert served.post("/v1/responses", {"input": [item], "context_management": None}).status_code == 200
    schema = {"type": "object", "properties": {"a": {"const": None}}, "required": ["a"], "additionalProperties": False}
    kept = chat(served, extra=None, response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert json.loads(kept["choices"][0]["message"]["content"]) == {"a": None}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"foo": 1, "bar": None}, "foo"),
        ({"Temperature": 0, "bar": 10**4_000, "seed": None}, "Temperature"),
        ({"[a]": [float("nan")], "Bar": None}, "[a]"),
        ({"messages": [*SUM, {"role": "user", "content": "a", "bar": None, "foo": 0}]}, "messages.1.foo"),
        ({"stream": True, "stream_options": {"foo": False}}, "stream_options.foo"),
    ],
)
def test_what_asks_for_something_unknown_is_refused(served: Served, more: Any, field: str) -> None:
    error = refusal(served, "/v1/chat/completions", {"messages": SUM, **more})
    assert (error["param"], error["code"]) == (field, "unsupported_field")


def test_vllms_fields_at_values_that_change_nothing(served: Served) -> None:
    plain = chat(served)
    body: dict[str, Any] = {
        "length_penalty": 1.0,
        "use_beam_search": False,
        "return_tokens_as_token_ids": False,
        "include_reasoning": True,
        "structured_outputs": None,
        "stop": [],
        "stop_token_ids": [],
        "bad_words": [],
        "logit_bias": {},
        "tools": [],
        "metadata": {},
        "request_id": "my-own.name",
    }
    found = chat(served, **body)
    assert found["id"] == "chatcmpl-my-own.name"
    assert found["choices"] == plain["choices"]
    text = {"prompt": "Once", "max_tokens": 2, "request_id": "b"}
    assert served.post("/v1/completions", text).json()["id"] == "cmpl-b"
    assert refusal(served, "/v1/completions", {"prompt": "a", "length_penalty": 1.5})["param"] == "length_penalty"


def test_reasoning_goes_by_either_name() -> None:
    for field in ("reasoning", "reasoning_content"):
        message = Message.model_validate({"role": "assistant", "content": "5", field: "2 and 3 …"})
        made = asyncio.run(to_template([message], "", Turns()))
        assert made == [{"role": "assistant", "content": "5", "reasoning_content": "2 and 3 …"}]


def test_effort_is_a_variable_of_the_chat_template(served: Served) -> None:
    template = "{{ reasoning_effort }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with gateway(served.address, "--trust-request-chat-template") as (trusting, _):
        for more, text in (
            ({"reasoning_effort": "low"}, "lowhi"),
            ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "highhi"),
            ({"reasoning_effort": None}, "hi"),
        ):
            messages = [{"role": "user", "content": "hi"}]
            found = chat(trusting, messages, chat_template=template, return_token_ids=True, max_tokens=1, **more)
            ids = found["prompt_token_ids"]
            assert trusting.post("/detokenize", {"tokens": ids}).json()["prompt"] == text


def test_marks_for_a_cache_change_nothing(served: Served) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    tool = {"type": "function", "function": FUNCTION}
    plain = chat(served, WEATHER, tools=[tool])
    part = {"type": "text", "text": WEATHER[0]["content"], **mark}
    marked = chat(served, [{"role": "user", "content": [part], **mark}], tools=[{**tool, **mark}])
    assert marked["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    call, same = (one["choices"][0]["message"]["tool_calls"][0]["function"] for one in (plain, marked))
    assert call == same


def test_what_no_answer_holds_may_be_included(served: Served) -> None:
    for include in ([], ["reasoning.encrypted_content", "file_search_call.results"]):
        answer = served.post("/v1/responses", {"input": "What is 2 + 3?", "include": include, "temperature": 0})
        assert answer.json()["output"][0]["content"][0]["text"] == "2 + 3 = 5"
    error = refusal(served, "/v1/responses", {"input": "a", "include": ["message.output_text.logprobs"]})
    assert error["param"] == "include.0"


def test_instructions_and_system_messages_are_one(served: Served) -> None:
    """The built-in model's chat template, as many others, takes one system message, the first."""
    question = {"role": "user", "content": "What is 2 + 3?"}
    parts = [{"type": "input_text", "text": "Answer in one line."}, {"type": "input_text", "text": "No words."}]
    system = [{"role": "developer", "content": parts}, {"role": "system", "content": "Digits."}]

    def used(**body: Any) -> int:
        answer = served.post("/v1/responses", {**body, "temperature": 0})
        assert answer.status_code == 200, answer.text
        assert answer.json()["output"][0]["content"][0]["text"] == "2 + 3 = 5"
        return int(answer.json()["usage"]["input_tokens"])

    whole = "Be brief.\n\nAnswer in one line.\nNo words.\n\nDigits."
    assert used(input=[*system, question], instructions="Be brief.") == used(input=[question], instructions=whole)
    late = {"input": [question, *system], "instructions": "Be brief."}
    error = refusal(served, "/v1/responses", late)
    assert (error["param"], error["message"].startswith("input: ")) == ("input", True)
    assert "system message" in error["message"]


def test_a_forced_call_leaves_no_text_to_have_a_form(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    tools = [{"type": "function", "function": FUNCTION}]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        found = chat(served, WEATHER, tools=tools, tool_choice=choice, response_format=form)
        (call,) = found["choices"][0]["message"]["tool_calls"]
        assert set(json.loads(call["function"]["arguments"])) == {"city"}
    body = {
        "input": WEATHER,
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "text": {"format": {"type": "json_schema", "name": "person", "schema": PERSON}},
    }
    (item,) = served.post("/v1/responses", body).json()["output"]
    assert (item["type"], item["name"]) == ("function_call", "get_weather")
    both = {"messages": WEATHER, "tools": tools, "tool_choice": "required", "guided_json": PERSON}
    assert refusal(served, "/v1/chat/completions", both)["param"] == "guided_json"


def test_whitespace_of_json_can_be_said(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    plain = chat(served, guided_json=schema, max_tokens=64)["choices"][0]["message"]["content"]
    assert " " in plain, "there is something to forbid"
    for form, allowed in (
        ({"structured_outputs": {"json": schema, "disable_any_whitespace": True}}, set()),
        ({"structured_outputs": {"json": schema, "whitespace_pattern": "\t"}}, {"\t"}),
        ({"guided_json": schema, "guided_whitespace_pattern": "\t"}, {"\t"}),
    ):
        text = chat(served, **form, max_tokens=64)["choices"][0]["message"]["content"]
        assert {one for one in text if one.isspace()} <= allowed
        json.loads(text)
    for field, wrong in (
        ("structured_outputs", {"structured_outputs": {"json": schema, "whitespace_pattern": "("}}),
        ("guided_json", {"guided_json": schema, "guided_whitespace_pattern": "("}),
    ):
        assert refusal(served, "/v1/chat/completions", {"messages": SUM, **wrong})["param"].startswith(field)
    alone = {"prompt": "a", "guided_whitespace_pattern": " "}
    assert refusal(served, "/v1/completions", alone)["param"] == "guided_whitespace_pattern"
    twice = {**alone, "structured_outputs": {"json": schema, "whitespace_pattern": "\t"}}
    assert refusal(served, "/v1/completions", twice)["param"] == "guided_whitespace_pattern"


# --- usage while it grows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_total", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_with_every_event(served: Served, path: str, with_total: bool) -> None:
    prompt = {"messages": SUM} if "chat" in path else {"prompt": ["Once upon a time", "There was"]}
    options = {"continuous_usage_stats": True, "include_usage": with_total}
    body = {**prompt, "n": 2, "seed": 4, "temperature": 1, "max_tokens": 6, "stream": True, "stream_options": options}
    whole = served.post(path, {**prompt, "n": 2, "seed": 4, "temperature": 1, "max_tokens": 6}).json()["usage"]
    *chunks, last = events(served.post(path, body))
    assert last == "[DONE]"
    if with_total:
        *chunks, total = chunks
        assert total["choices"] == []
        assert total["usage"]["total_tokens"] == whole["total_tokens"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    told = chunks[-1]["usage"]
    assert all(told[name] == whole[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens"))


# --- what went wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "field", "hint"),
    [
        ("/v1/chat/completions", {"messages": SUM, "max_completion_tokens": 0}, "max_completion_tokens", "got 0"),
        ("/v1/chat/completions", {"messages": SUM, "max_tokens": 0}, "max_tokens", "got 0"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens", "got 0"),
        ("/v1/completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("/v1/responses", {"input": []}, "input", "at least 1 item"),
        ("/v1/responses", {"input": "a", "store": True}, "store", "should be false: nothing is stored"),
        ("/v1/responses", {"input": "a", "previous_response_id": "b"}, "previous_response_id", "conversation so far"),
        ("/v1/chat/completions", {"messages": SUM, "use_beam_search": True}, "use_beam_search", "should be false"),
    ],
)
def test_a_fault_is_told_in_the_words_of_the_request(
    served: Served, path: str, body: Any, field: str, hint: str
) -> None:
    error = refusal(served, path, body)
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")
    assert hint in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5_000}]}, "messages"),
        ("/v1/responses", {"input": "word " * 5_000}, "input"),
        ("/v1/completions", {"prompt": "word " * 5_000}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 4_096}, "prompt"),
        ("/v1/completions", {"prompt": ["word", "word " * 5_000], "add_special_tokens": False}, "prompt"),
    ],
)
def test_a_prompt_over_the_context_is_told_as_programs_look_for_it(
    served: Served, path: str, body: Any, field: str
) -> None:
    """litellm, say, tells it by these words, others by the code; they cut the chat and try again."""
    for stream in (False, True):
        error = refusal(served, path, {**body, "stream": stream})
        assert (error["param"], error["code"]) == (field, "context_length_exceeded")
        assert "this model's maximum context length is 4096 tokens" in error["message"]


def test_long_texts_are_tokenized_and_put_together_again(served: Served) -> None:
    text = "Once upon a time é 日本 " * 4_000
    found = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) > 16_384
    once = served.post("/tokenize", {"prompt": "Once upon a time é 日本 " * 2, "return_token_strs": True}).json()
    assert found["tokens"][:20] == once["tokens"][:20]
    assert found["token_strs"][:20] == once["token_strs"][:20]
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json()["prompt"] == text
    for path, body, field in (
        ("/tokenize", {"prompt": "日" * 100_000}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "日" * 100_000}]}, "messages"),
        ("/detokenize", {"tokens": [5] * 262_145}, "tokens"),
    ):
        error = refusal(served, path, body)
        assert error["param"] == field
        assert "over the limit of 262144" in error["message"]


def test_paths_with_a_slash_too_many(served: Served) -> None:
    assert served.get("/v1/models/").json() == served.get("/v1/models").json()
    answer = served.post("/v1/chat/completions/", {"messages": SUM, "temperature": 0})
    assert answer.json()["choices"][0]["message"]["content"] == "2 + 3 = 5"
    with gateway(served.address, keys="secret") as (guarded, _):
        assert guarded.get("/health/").status_code == 200
        assert guarded.get("/v1/models/").status_code == 401
        assert guarded.get("/health/../v1/models/").status_code == 401


@pytest.mark.parametrize(
    ("path", "meant"), [("/chat/completions", "/v1/chat/completions"), ("/v1/v1/models", "/v1/models"), ("/", None)]
)
def test_a_base_url_that_is_wrong(served: Served, path: str, meant: str | None) -> None:
    answer = served.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"there is nothing at {path}" + (f"; {meant} is there" if meant else "")


# --- HTTP -------------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_passed_over(served: Served) -> None:
    answer = served.post("/v1/completions", content=b"\xef\xbb\xbf" + json.dumps({"prompt": "Once"}).encode())
    assert answer.status_code == 200, answer.text


def test_a_stream_over_http_1_0_has_no_chunks(served: Served) -> None:
    """Its clients know none: nginx speaks it to what stands behind it unless told otherwise."""
    body = json.dumps({"messages": SUM, "temperature": 0, "stream": True}).encode()
    described = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    request = f"POST /v1/chat/completions HTTP/1.0\r\n{described}\r\n".encode() + body
    for sent, in_stream in ((request, True), (b"GET /v1/models HTTP/1.0\r\n\r\n", False)):
        with served.connect() as connection:
            connection.sendall(sent)
            head, _, answer = _read_all(connection).partition("\r\n\r\n")
        status, *fields = head.split("\r\n")
        assert status.endswith(" 200 OK")
        assert not any(field.lower().startswith("transfer-encoding") for field in fields)
        assert "connection: close" in fields
        if in_stream:
            *pieces, done, end = answer.split("\n\n")
            assert (done, end) == ("data: [DONE]", "")
            deltas = [json.loads(one.removeprefix("data: "))["choices"][0]["delta"] for one in pieces]
            assert "".join(delta.get("content", "") for delta in deltas) == "2 + 3 = 5"
        else:
            assert json.loads(answer)["data"][0]["id"] == MODEL


def _read_all(connection: socket.socket) -> str:
    pieces = []
    while piece := connection.recv(65_536):
        pieces.append(piece)
    return b"".join(pieces).decode()


def test_a_client_that_leaves_is_no_error_in_the_log(served: Served) -> None:
    with gateway(served.address) as (found, command):
        client: Any
        with openai.OpenAI(base_url=found.api, api_key="unused", max_retries=0) as client:
            more = {"stream": True, "max_tokens": 4_000, "extra_body": {"ignore_eos": True}}
            for _ in client.chat.completions.create(model=MODEL, messages=SUM, **more):
                break
        ask_until(lambda: 'http_requests_total{handler="/v1/chat/completions"' in found.get("/metrics").text)
        found.require_healthy()
    assert "Traceback" not in command.output
    assert "ERROR" not in command.output
