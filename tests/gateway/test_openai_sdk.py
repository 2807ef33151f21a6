"""OpenAI's own Python SDK against the gateway, as its users write it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from support.gateway import MODEL, Served

SUM = [{"role": "user", "content": "What is 123 + 456?"}]
ANSWER = "123 + 456 = 579"


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.api, api_key="unused", max_retries=0) as found:
        yield found


def test_a_chat_and_its_stream(client: Any) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=SUM, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    assert whole.usage is not None
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=SUM, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_many_at_once(served: Served) -> None:
    async def run() -> list[Any]:
        client: Any
        async with openai.AsyncOpenAI(base_url=served.api, api_key="unused", max_retries=0) as client:

            async def one(i: int) -> Any:
                content = f"What is {i} + 100?"
                if i % 2:
                    text = ""
                    async with client.chat.completions.stream(
                        model=MODEL, messages=[{"role": "user", "content": content}]
                    ) as stream:
                        async for event in stream:
                            if event.type == "content.delta":
                                text += event.delta
                    return text
                done = await client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": content}]
                )
                return done.choices[0].message.content

            return await asyncio.gather(*(one(i) for i in range(100, 124)))

    assert asyncio.run(run()) == [f"{i} + 100 = {i + 100}" for i in range(100, 124)]


def test_completions_with_logprobs(client: Any) -> None:
    done = client.completions.create(
        model=MODEL, prompt=["Once upon a time", "There was"], max_tokens=4, temperature=0, logprobs=3, echo=True
    )
    assert len(done.choices) == 2
    for choice in done.choices:
        found = choice.logprobs
        assert found is not None
        assert found.tokens
        assert found.token_logprobs
        assert found.top_logprobs
        assert found.text_offset
        assert "".join(found.tokens) == choice.text
        assert found.token_logprobs[0] is None
        assert all(value is not None and value <= 0 for value in found.token_logprobs[1:])
        for offset, token in zip(found.text_offset, found.tokens, strict=True):
            assert choice.text[offset : offset + len(token)] == token
        for token, value, top in zip(
            found.tokens[-4:], found.token_logprobs[-4:], found.top_logprobs[-4:], strict=True
        ):
            assert top[token] == value == max(top.values())  # greedy


def test_chats_with_logprobs(client: Any) -> None:
    done = client.chat.completions.create(
        model=MODEL,
        messages=SUM,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(one.token for one in logprobs.content).startswith(ANSWER)
    assert all(len(one.top_logprobs) == 2 for one in logprobs.content)
    stream = client.chat.completions.create(
        model=MODEL, messages=SUM, temperature=0, logprobs=True, top_logprobs=2, stream=True
    )
    streamed = [
        one
        for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for one in choice.logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in logprobs.content]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in logprobs.content], abs=1e-3)


class Person(BaseModel):
    name: str
    age: int


def test_structured_output(client: Any) -> None:
    messages = [{"role": "user", "content": 'Give me a JSON object with name "Ana" and age 31.'}]
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=messages,
        response_format=Person,
        temperature=0,
        max_tokens=100,
    )
    assert parsed.choices[0].message.parsed == Person(name="Ana", age=31)
    loose = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=100,
    )
    assert json.loads(loose.choices[0].message.content or "") == {"name": "Ana", "age": 31}
    chosen = client.chat.completions.create(
        model=MODEL,
        messages=SUM,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert chosen.choices[0].message.content in ("yes", "no")
    response = client.responses.parse(model=MODEL, input=messages, text_format=Person)
    assert response.output_parsed == Person(name="Ana", age=31)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools(client: Any, choice: object) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    done = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}],
        tool_choice=choice,
        temperature=0,
        max_tokens=200,
    )
    assert done.choices[0].finish_reason == "tool_calls"
    (call,) = done.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


class GetWeather(BaseModel):
    """Get the weather of a city"""

    city: Literal["Rome", "Oslo"]


class LookUp(BaseModel):
    """Get the weather of a city"""

    city: str


WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


def test_strict_tools_that_the_model_may_call(client: Any) -> None:
    """What `pydantic_function_tool` makes is strict; with "auto" the calls follow the schema all the same, and answers
    that are no calls stay what they are."""
    tools = [openai.pydantic_function_tool(LookUp, name="get_weather")]
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 200}
    done = client.chat.completions.parse(messages=WEATHER, tools=tools, **asked)
    assert done.choices[0].finish_reason == "tool_calls"
    (call,) = done.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == LookUp(city="Paris")
    plain = client.chat.completions.parse(messages=SUM, tools=tools, **asked)
    assert plain.choices[0].message.content == ANSWER
    assert not plain.choices[0].message.tool_calls
    with client.chat.completions.stream(messages=WEATHER, tools=tools, **asked) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
        assert call.function.parsed_arguments == LookUp(city="Paris")


def test_a_strict_schema_is_followed_against_the_models_will(client: Any) -> None:
    tools = [openai.pydantic_function_tool(GetWeather, name="get_weather")]
    done = client.chat.completions.parse(model=MODEL, messages=WEATHER, tools=tools, temperature=0, max_tokens=200)
    (call,) = done.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments.city in ("Rome", "Oslo")


def test_strict_tools_beside_structured_output(client: Any) -> None:
    tools = [openai.pydantic_function_tool(LookUp, name="get_weather")]
    asked: dict[str, Any] = {"model": MODEL, "tools": tools, "response_format": Person, "max_tokens": 100}
    messages = [{"role": "user", "content": 'Give me a JSON object with name "Ana" and age 31.'}]
    done = client.chat.completions.parse(messages=messages, temperature=0, **asked)
    assert done.choices[0].message.parsed == Person(name="Ana", age=31)
    done = client.chat.completions.parse(messages=WEATHER, temperature=0, **asked)
    (call,) = done.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == LookUp(city="Paris")


def test_responses(client: Any) -> None:
    done = client.responses.create(model=MODEL, input="What is 123 + 456?", instructions="Be brief.", store=False)
    assert done.output_text
    with client.responses.stream(model=MODEL, input="What is 123 + 456?") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == ANSWER


def test_errors_are_those_that_its_users_catch(client: Any, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=SUM, temperature=-1)
    assert bad.value.param == "temperature"
    assert [model.id for model in client.models.list()] == [MODEL]
