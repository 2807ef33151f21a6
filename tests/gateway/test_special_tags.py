"""A model whose tags around calls are special tokens: texts do not show those, and calls are found all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tandem.launch.builtin import MODEL_DIR

from support.gateway import Served, events, service

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "tools": [WEATHER]}
CALLED = {"name": "get_weather", "arguments": '{"city": "Paris"}'}


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The built-in model with such tags."""
    folder = tmp_path_factory.mktemp("special") / "model"
    shutil.copytree(MODEL_DIR, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tags = [token for token in tokenizer["added_tokens"] if "tool_call" in token["content"]]
    assert len(tags) == 2
    for tag in tags:
        tag["special"] = True
    file.write_text(json.dumps(tokenizer))
    with service("--model", str(folder)) as found:
        yield found


@pytest.mark.thorough
def test_calls_are_found_whole_and_streamed(special: Served) -> None:
    choice = special.post("/v1/chat/completions", ASKED).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [CALLED]
    deltas = [
        choice["delta"]
        for chunk in events(special.post("/v1/chat/completions", {**ASKED, "stream": True}))[:-1]
        for choice in chunk["choices"]
    ]
    assert not any(delta.get("content") for delta in deltas)
    assert [call["function"] for delta in deltas for call in delta.get("tool_calls", [])] == [CALLED]
    tool = {"type": "function", **WEATHER["function"]}
    output = special.post("/v1/responses", {"input": ASKED["messages"], "tools": [tool]}).json()["output"]
    assert [(item["name"], item["arguments"]) for item in output] == [tuple(CALLED.values())]


def test_whoever_wants_no_special_tokens_gets_none(special: Served) -> None:
    """Then the call is text like any other; so it is for who has no tools."""
    message = special.post("/v1/chat/completions", {**ASKED, "skip_special_tokens": True}).json()["choices"][0][
        "message"
    ]
    assert message["tool_calls"] is None
    assert json.loads(message["content"]) == {"name": "get_weather", "arguments": {"city": "Paris"}}
    shown = special.post("/v1/chat/completions", {**ASKED, "messages": [{"role": "user", "content": "What is 2 + 3?"}]})
    assert shown.json()["choices"][0]["message"]["content"] == "2 + 3 = 5"
