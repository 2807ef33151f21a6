"""What each path answers, over HTTP as strangers speak it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tandem import Client

from support.deadlines import DEADLINE_S
from support.gateway import MODEL, Served, events

SUM = "What is 123 + 456?"
ANSWER = "123 + 456 = 579"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_what_needs_no_model(served: Served) -> None:
    assert served.get("/health").json() == {"status": "ok"}
    assert served.get("/ping").status_code == 200
    assert served.get("/version").json()["version"]
    (card,) = served.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == (MODEL, 4096)
    assert served.get(f"/v1/models/{MODEL}").json() == card
    page = served.get("/metrics").text
    assert "tandem:scheduler_up 1.0" in page
    assert 'http_requests_total{handler="/v1/models/{model:path}",method="GET",status="200"}' in page


def test_a_chat(served: Served) -> None:
    answer = served.chat(SUM, model=MODEL)
    found = answer.json()
    (choice,) = found["choices"]
    assert choice["message"]["content"] == ANSWER
    assert choice["finish_reason"] == "stop"
    used = found["usage"]
    assert used["completion_tokens"] == len(ANSWER.replace(" ", "")) + 3
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert found["id"].startswith("chatcmpl-")


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_streamed_chat(served: Served, with_usage: bool) -> None:
    more = {"stream_options": {"include_usage": True}} if with_usage else {}
    *chunks, last = events(served.chat(SUM, stream=True, n=2, temperature=0.001, **more))
    assert last == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    if with_usage:
        *chunks, end = chunks
        assert end["choices"] == []
        assert end["usage"]["completion_tokens"] == 2 * 14
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in mine) == ANSWER
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_completions_of_several_prompts(served: Served) -> None:
    ids = served.post("/tokenize", {"prompt": "Once upon a time"}).json()["tokens"]
    with Client(served.address) as client:
        alone = [client.generate(prompt, temperature=0, max_tokens=9).text for prompt in ("Once upon a time", "There")]
    for prompts in (
        ["Once upon a time", "There"],
        [ids, served.post("/tokenize", {"prompt": "There"}).json()["tokens"]],
    ):
        found = served.post("/v1/completions", {"prompt": prompts, "temperature": 0, "max_tokens": 9}).json()
        assert [choice["text"] for choice in found["choices"]] == alone
        assert [choice["index"] for choice in found["choices"]] == [0, 1]
        assert found["usage"]["completion_tokens"] == 18
        *chunks, _ = events(
            served.post("/v1/completions", {"prompt": prompts, "temperature": 0, "max_tokens": 9, "stream": True})
        )
        for index in range(2):
            mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert "".join(one["text"] for one in mine) == alone[index]
            assert mine[-1]["finish_reason"] == "length"


def test_echo_and_stop(served: Served) -> None:
    asked = {"prompt": "Once upon a time", "temperature": 0, "echo": True}
    found = served.post("/v1/completions", {**asked, "max_tokens": 5}).json()["choices"][0]
    assert found["text"].startswith("Once upon a time")
    alone = served.post("/v1/completions", {**asked, "max_tokens": 0}).json()
    assert alone["choices"][0]["text"] == "Once upon a time"
    assert alone["usage"]["completion_tokens"] == 0
    story = served.post("/v1/completions", {"prompt": "Once upon a time", "temperature": 0, "stop": [".", "zz"]}).json()
    assert "." not in story["choices"][0]["text"]
    assert served.chat(SUM, stop="= 5").json()["choices"][0]["message"]["content"] == "123 + 456 "
    shown = served.chat(SUM, stop="= 5", include_stop_str_in_output=True).json()["choices"][0]
    assert (shown["message"]["content"], shown["stop_reason"]) == ("123 + 456 = 5", "= 5")


def test_a_tool_is_called_and_its_result_used(served: Served) -> None:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
    }
    choice = served.post("/v1/chat/completions", asked).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    deltas = [
        one["delta"]
        for chunk in events(served.post("/v1/chat/completions", {**asked, "stream": True}))[:-1]
        for one in chunk["choices"]
    ]
    assert not any(delta.get("content") for delta in deltas)
    (streamed,) = [called for delta in deltas for called in delta.get("tool_calls", [])]
    assert streamed["function"] == call["function"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"temperature": 21, "sky": "sunny"}'}
    asked["messages"] = [*asked["messages"], choice["message"], result]
    told = served.post("/v1/chat/completions", asked).json()["choices"][0]["message"]["content"]
    assert "21" in told or "sunny" in told
    no_tools = served.post("/v1/chat/completions", {**asked, "messages": asked["messages"][:1], "tool_choice": "none"})
    assert no_tools.json()["choices"][0]["message"]["tool_calls"] is None


def test_responses(served: Served) -> None:
    found = served.post("/v1/responses", {"input": SUM}).json()
    assert found["output"][0]["content"][0]["text"] == ANSWER
    assert (found["status"], found["store"]) == ("completed", False)
    history = [{"role": "user", "content": "What is 2 + 3?"}]
    first = served.post("/v1/responses", {"input": history}).json()
    history += [*first["output"], {"role": "user", "content": "Add 5 to that."}]
    again = served.post("/v1/responses", {"input": history, "max_output_tokens": 3}).json()
    assert again["incomplete_details"] == {"reason": "max_output_tokens"}
    told = events(served.post("/v1/responses", {"input": SUM, "stream": True}))
    assert [one["sequence_number"] for one in told] == list(range(len(told)))
    assert "".join(one["delta"] for one in told if one["type"] == "response.output_text.delta") == ANSWER
    assert told[-1]["type"] == "response.completed"
    assert told[-1]["response"]["output"][0]["content"][0]["text"] == ANSWER


def test_tokens_and_back(served: Served) -> None:
    text = "Hello 😀 世界"
    found = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = [{"role": "user", "content": SUM}]
    as_chat = served.post("/tokenize", {"messages": chat}).json()
    assert as_chat["count"] == served.chat(SUM).json()["usage"]["prompt_tokens"]


Refusal = tuple[str, dict[str, Any], str, str]
FUNCTION = {"type": "function", "name": "f"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/chat/completions", {**CHAT, "nonsense": 1}, "nonsense", "not supported"),
        ("/v1/chat/completions", {**CHAT, "functions": []}, "functions", "not supported"),
        ("/v1/chat/completions", {**CHAT, "temperature": "hot"}, "temperature", "number"),
        ("/v1/chat/completions", {**CHAT, "temperature": True}, "temperature", "number"),
        ("/v1/chat/completions", {**CHAT, "temperature": -0.001}, "temperature", "0"),
        ("/v1/chat/completions", {**CHAT, "temperature": 100.001}, "temperature", "100"),
        ("/v1/chat/completions", {**CHAT, "top_p": 0}, "top_p", "greater than 0"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens", "1"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differs"),
        ("/v1/chat/completions", {**CHAT, "n": 0}, "n", "at least 1"),
        ("/v1/chat/completions", {**CHAT, "n": 129}, "n", "128"),
        ("/v1/chat/completions", {**CHAT, "seed": -1}, "seed", "0"),
        ("/v1/chat/completions", {**CHAT, "seed": 2**63}, "seed", str(2**63 - 1)),
        ("/v1/chat/completions", {**CHAT, "seed": 10**400}, "seed", ""),
        ("/v1/chat/completions", {**CHAT, "stop": ["x"] * 33}, "stop", "32"),
        ("/v1/chat/completions", {**CHAT, "stop": ""}, "stop", ""),
        ("/v1/chat/completions", {**CHAT, "logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ("/v1/chat/completions", {**CHAT, "chat_template": "x"}, "chat_template", "trust"),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice", "tools"),
        ("/v1/chat/completions", {"messages": []}, "messages", "1"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "text"),
        ("/v1/chat/completions", {"messages": [{"role": "god", "content": "x"}]}, "messages.0.role", "system"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20, got 21"),
        ("/v1/chat/completions", {**CHAT, "tool_choice": {"type": "function"}}, "tool_choice.function", "needed"),
        (
            "/v1/chat/completions",
            {
                **CHAT,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}},
            },
            "response_format",
            "response_format: Invalid type: objekt",
        ),
        (
            "/v1/chat/completions",
            {
                **CHAT,
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}],
                "tool_choice": "required",
            },
            "tools",
            "tools: Invalid type: objekt",
        ),
        ("/v1/completions", {"prompt": "x", "guided_regex": "[0-9"}, "guided_regex", "unclosed"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "[0"}}, "structured_outputs.regex", ""),
        (
            "/v1/responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objekt"}}}},
            "text.format",
            "text.format: Invalid type: objekt",
        ),
        ("/v1/chat/completions", {}, "messages", "needed"),
        ("/v1/chat/completions", [], "", "object"),
        ("/v1/completions", {"prompt": []}, "prompt", ""),
        ("/v1/completions", {"prompt": [[]]}, "prompt", ""),
        ("/v1/completions", {"prompt": [-1]}, "prompt.0", "0, got -1"),
        ("/v1/completions", {"prompt": [1_536]}, "prompt", "1535"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "echo"),
        ("/v1/completions", {"prompt": [1] * 4_096}, "prompt", "4095"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix", "not supported here"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": 1}, "prompt_logprobs", "not supported here"),
        ("/v1/chat/completions", {**CHAT, "reasoning_effort": "low"}, "reasoning_effort", "not supported here"),
        ("/v1/chat/completions", {**CHAT, "store": 0}, "store", "boolean"),
        ("/v1/chat/completions", {**CHAT, "seed": -1}, "seed", "0, got -1"),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of", "ranking"),
        ("/v1/completions", {"prompt": "x", "priority": 1_001}, "priority", "1000"),
        ("/v1/responses", {"input": "x", "previous_response_id": "y"}, "previous_response_id", ""),
        ("/v1/responses", {"input": "x", "store": True}, "store", ""),
        ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, "tools.0.type", 'got "web_search"'),
        ("/v1/responses", {"input": "x", "tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            "/v1/responses",
            {"input": "x", "tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice.name",
            "'g' is none",
        ),
        ("/v1/responses", {"input": [{"type": "reasoning"}]}, "input.0", "function_call_output"),
        ("/v1/responses", {"input": [{"type": ["x"]}]}, "input.0", "function_call_output"),
        ("/v1/responses", {"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id", "needed"),
        ("/v1/responses", {"input": "x", "stream_options": {}}, "stream_options", "stream: true"),
        ("/v1/responses", {"input": "x", "top_logprobs": False}, "top_logprobs", "integer"),
        ("/tokenize", {}, "prompt", "either"),
        ("/detokenize", {"tokens": [10**6]}, "tokens", "1535"),
    ],
)
def test_refusals_name_what_is_wrong(served: Served, path: str, body: Any, param: str, words: str) -> None:
    answer = served.post(path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)
    assert words in error["message"], error["message"]
    assert "Traceback" not in error["message"]


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    """Programs that send every field they know send null, or what is so anyway, for what they do not want."""
    chat: dict[str, Any] = {
        **dict.fromkeys("audio function_call functions moderation prediction reasoning_effort".split()),
        **dict.fromkeys("prompt_logprobs truncate_prompt_tokens web_search_options tools tool_choice stop n".split()),
        "modalities": ["text"],
        "verbosity": "medium",
        "echo": False,
        "add_special_tokens": False,
        "use_beam_search": False,
        "detokenize": True,
        "logprobs": False,
        "top_logprobs": 0,
        "logit_bias": {},
        "parallel_tool_calls": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
    }
    told = events(served.chat(SUM, **chat))
    assert "".join(choice["delta"].get("content", "") for chunk in told[:-1] for choice in chunk["choices"]) == ANSWER
    nothing = dict.fromkeys("suffix prompt_logprobs truncate_prompt_tokens logprobs best_of stream_options".split())
    assert served.post("/v1/completions", {"prompt": "Once", "max_tokens": 2, **nothing}).status_code == 200
    none = dict.fromkeys("reasoning conversation previous_response_id prompt include moderation tools".split())
    found = served.post("/v1/responses", {"input": SUM, "top_logprobs": 0, "store": False, **none}).json()
    assert found["output"][0]["content"][0]["text"] == ANSWER


def test_statuses(served: Served) -> None:
    for answer, status, code in [
        (served.get("/nothing"), 404, "not_found"),
        (served.get("/v1/chat/completions"), 405, "method_not_allowed"),
        (served.chat("hi", model="gpt-4"), 404, "model_not_found"),
        (served.get("/v1/models/gpt-4"), 404, "model_not_found"),
        (served.post("/v1/completions", content=b"{", headers={"content-type": "text/plain"}), 415, None),
        (served.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"}), 415, None),
        (served.post("/v1/completions", content=b"{"), 400, "invalid_json"),
        (served.post("/v1/completions/x", content=b"{}"), 404, "not_found"),
    ]:
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == code


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics", "/v1/models", f"/v1/models/{MODEL}"])
def test_heads(served: Served, path: str) -> None:
    """Probes ask for the head alone."""
    answer = httpx.head(served.url + path, timeout=DEADLINE_S)
    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers["content-type"].startswith(served.get(path).headers["content-type"])


def test_request_ids(served: Served) -> None:
    assert served.get("/health", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    made = served.get("/health", headers={"x-request-id": "x" * 129}).headers["x-request-id"]
    assert len(made) == 32
