"""Bodies that are long: their values are counted before they are parsed, and nobody waits while many prompts begin, nor
for them all if one fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, field_validator

from tandem import AsyncClient, RequestFailed
from tandem.client.completion import CompletionStream, Started
from tandem.gateway import body as bodies
from tandem.gateway import turns
from tandem.gateway.body import MANY_VALUES, ValueCount, parse
from tandem.gateway.chat_schema import MAX_MESSAGES, ChatRequest, Message, ToolCall
from tandem.gateway.completion_schema import CompletionRequest
from tandem.gateway.errors import ApiError
from tandem.gateway.fields import Strict
from tandem.gateway.generation import completions, pieces
from tandem.gateway.messages import MAX_ARGUMENT_VALUES, to_template
from tandem.gateway.responses import _messages
from tandem.gateway.responses_schema import ResponsesRequest
from tandem.gateway.tokenizing import TokenizeRequest
from tandem.gateway.turns import Turns
from tandem.gateway.wire import response_with
from tandem.protocol.messages import Cancel, Refused, Submit

from support.deadlines import DEADLINE_S, LONG_LEASE_S
from support.scripted_scheduler import ScriptedScheduler

Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet=st.sampled_from('a,[]{}:"\\\n\u00e9')),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
    max_leaves=30,
)


def count(value: Any) -> int:
    """An empty list or object counts as two."""
    if not isinstance(value, list | dict):
        return 1
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + (sum(map(count, inner)) if inner else 1)


@given(Json, st.booleans(), st.integers(1, 9))
def test_values_are_counted_however_a_body_is_cut(value: Any, ascii_only: bool, step: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    counted = ValueCount()
    for i in range(0, len(body), step):
        counted.add(body[i : i + step])
    assert counted.count == count(value)


MANY = 5_000


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [""] * MANY + [1]}),
        (CompletionRequest, {"prompt": [[1]] * MANY + [1]}),
        (CompletionRequest, {"prompt": [{}] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [""] * MANY}),
        (CompletionRequest, {"prompt": "x", "allowed_token_ids": [""] * MANY}),
        (CompletionRequest, {"prompt": "x", "bad_words": [1] * MANY}),
        (CompletionRequest, {"prompt": "x", "guided_choice": [1] * MANY}),
        (ChatRequest, {"messages": [1] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [1] * MANY}]}),
        (ChatRequest, {"messages": [], "tools": [1] * MANY}),
        (ChatRequest, {"messages": [], "documents": [1] * MANY}),
        (ResponsesRequest, {"input": [{"role": "user", "content": 1}] * MANY}),
        (ResponsesRequest, {"input": "x", "tools": [1] * MANY}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else json.dumps(value)[:30],
)
def test_lists_are_given_up_at_their_first_fault(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate_json(json.dumps(body))
    assert refused.value.error_count() < 20


PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "input_text", "image_url"])},
        optional={"text": st.sampled_from(["a", None, 1]), "unknown": st.sampled_from([None, 1])},
    ),
    max_size=3,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"id": st.just("x"), "function": st.sampled_from([{"name": "f", "arguments": "{}"}, {"name": "f"}, 1])},
        optional={"unknown": st.none(), "type": st.sampled_from(["function", "custom"])},
    ),
    max_size=3,
)
MESSAGES: st.SearchStrategy[list[Any]] = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "tool", "nobody"])},
            optional={
                "content": st.one_of(st.sampled_from(["a", None, 1, []]), PARTS),
                "tool_calls": CALLS,
                "unknown": st.sampled_from([None, None, 1]),
                "Another": st.none(),
            },
        ),
        st.fixed_dictionaries({"role": st.just("user"), "content": PARTS}),
        st.just({"role": "user", "content": "a"}),
        st.sampled_from([1, None, [], {"type": "function_call_output", "call_id": "a", "output": [{"type": "text"}]}]),
    ),
    max_size=4,
)
TOOLS = st.lists(
    st.sampled_from(
        [
            {"type": "function", "function": {"name": "f", "parameters": {"a": None}}, "unknown": None},
            {"type": "function", "name": "f"},
            {"type": "web_search"},
        ]
    ),
    max_size=2,
)
EXTRAS = st.sampled_from(
    [{}, {"unknown": None}, {"unknown": 1}, {"temperature": 1, "n": 1}, {"n": 1.0}, {"seed": True}]
)


async def outcome(model: type[Strict], body: bytes, values: int) -> Any:
    """What it was taken as, or what it was refused with."""
    try:
        return (await parse(body, model, values, Turns())).model_dump()
    except ApiError as error:
        return error.body


@pytest.mark.parametrize("model", [ChatRequest, ResponsesRequest, TokenizeRequest])
@given(MESSAGES, TOOLS, EXTRAS)
@example([{"role": "user", "content": "a", "unknown": None}] * 3, [], {})
@example([{"role": "user", "content": [{"type": "text", "text": "a", "unknown": None}] * 3}] * 2, [], {"unknown": None})
@example([{"role": "user", "content": "a"}] * MAX_MESSAGES, [], {"unknown": None})
@example([{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1), [], {})
def test_a_body_that_is_taken_in_parts_is_taken_as_a_whole_one_is(
    model: type[Strict], messages: list[Any], tools: list[Any], extras: dict[str, Any]
) -> None:
    body = json.dumps(
        {"input" if model is ResponsesRequest else "messages": messages, "tools": tools, **extras}
    ).encode()
    whole, parts = (asyncio.run(outcome(model, body, values)) for values in (0, MANY_VALUES))
    assert parts == whole


def test_nulls_of_many_kinds_do_not_have_all_else_validated_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a few messages before a million of other values hold everybody up for seconds."""
    validated = 0

    class Counted(ChatRequest):
        @field_validator("metadata")
        @classmethod
        def count(cls, value: Any) -> Any:
            nonlocal validated
            validated += 1
            return value

    parts: dict[type[BaseModel], Any] = {Counted: bodies.PARTS[ChatRequest]}
    monkeypatch.setattr(bodies, "PARTS", parts)
    messages = [{"role": "user", "content": "a", f"unknown{i}": None} for i in range(50)]
    asked = json.dumps({"messages": messages, "metadata": {"a": "b"}, "unknown": None}).encode()
    for values in (0, MANY_VALUES):
        validated = 0
        assert len(asyncio.run(parse(asked, Counted, values, Turns())).messages) == 50
        assert validated <= bodies.TRIES


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"messages": [{}}', b"[" * 10_000, b'{"messages": NaN}'])
def test_what_is_no_request_is_told_alike(body: bytes) -> None:
    whole, parts = (asyncio.run(outcome(ChatRequest, body, values)) for values in (0, MANY_VALUES))
    assert parts == whole
    assert "error" in whole


@pytest.mark.parametrize("name", ["content", "tool_calls"])
def test_a_long_body_lets_the_loop_come_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its values are spread: over messages, or within one."""
    monkeypatch.setattr(turns, "PIECE_S", -1.0)
    call = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
    one = {"role": "assistant", name: [{"type": "text", "text": "a"} if name == "content" else call] * 200}
    messages = [one, *[{"role": "user", "content": "a"}] * 300]

    async def run() -> tuple[int, int]:
        rounds = Rounds()
        asked = await parse(json.dumps({"messages": messages}).encode(), ChatRequest, MANY_VALUES, Turns())
        parsed = rounds.count
        made = await to_template(asked.messages, "", Turns())
        assert len(made) == 301
        await rounds.end()
        return parsed, rounds.count - parsed

    parsed, made = asyncio.run(run())
    assert parsed >= 490
    assert made >= 290


def test_arguments_of_calls_have_their_own_bound() -> None:
    """They are text to a body, and JSON to a chat template."""
    arguments = json.dumps({"a": [0] * MAX_ARGUMENT_VALUES})
    call = ToolCall.model_validate({"id": "a", "function": {"name": "f", "arguments": arguments}})
    messages = [Message(role="user", content="a"), Message(role="assistant", tool_calls=[call])]
    with pytest.raises(ApiError, match="the limit is 100000") as refused:
        asyncio.run(to_template(messages, "", Turns()))
    assert refused.value.body["error"]["param"] == "messages.1.tool_calls.0.function.arguments"


def test_a_chat_is_made_of_thousands_of_items_without_copying_what_there_is_for_each() -> None:
    system: list[dict[str, Any]] = [{"role": "system", "content": "b"}] * 3
    calls = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}] * 3
    asked = ResponsesRequest.model_validate({"instructions": "a", "input": [*system, *calls]})
    chat: list[Message] = []
    texts: set[object] = set()
    lists: set[int] = set()
    for _ in _messages(asked, chat):
        texts.add(chat[0].content)
        lists.update(id(message.tool_calls) for message in chat if message.tool_calls)
    first, second = chat
    assert (texts, first.content) == ({"a"}, "a\n\nb\n\nb\n\nb")
    assert len(second.tool_calls or ()) == 3
    assert lists == {id(second.tool_calls)}


class Rounds:
    """Counts how often the loop came round."""

    def __init__(self) -> None:
        self.count = 0
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self.count += 1
            await asyncio.sleep(0)

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _whole(streams: list[CompletionStream]) -> None:
    await completions(streams)


async def _streamed(streams: list[CompletionStream]) -> None:
    async for _ in pieces(streams):
        pass


@pytest.mark.parametrize("way", [_whole, _streamed])
def test_prompts_begin_one_at_a_time(way: Callable[[list[CompletionStream]], Awaitable[None]]) -> None:
    async def run() -> list[int]:
        rounds = Rounds()
        began: list[int] = []

        async def start(_: float | None) -> Started:
            began.append(rounds.count)
            if len(began) == 50:
                raise RuntimeError("enough")
            return Started([], True, lambda stream, error: None, asyncio.get_running_loop())  # nothing comes of it

        streams = [CompletionStream(start, None) for _ in range(100)]
        with pytest.raises(RuntimeError, match="enough"):
            await way(streams)
        await rounds.end()
        return began

    began = asyncio.run(run())
    assert len(began) == 50
    assert len(set(began)) == 50


@pytest.mark.parametrize("way", [_whole, _streamed])
def test_a_failure_keeps_its_cause_for_the_log(way: Callable[[list[CompletionStream]], Awaitable[None]]) -> None:
    async def fail(_: float | None) -> Started:
        raise RuntimeError("a mishap") from OSError("its cause")

    async def run() -> None:
        await way([CompletionStream(fail, None), CompletionStream(fail, None)])

    with pytest.raises(RuntimeError, match="a mishap") as failed:
        asyncio.run(run())
    assert isinstance(failed.value.__cause__, OSError)


@pytest.mark.parametrize("way", [_whole, _streamed])
def test_a_prompt_that_fails_ends_the_others_before_all_have_begun(
    way: Callable[[list[CompletionStream]], Awaitable[None]],
) -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if submit.prompt.tolist() == [1]:
            scheduler.begin(submit)
        else:
            scheduler.say(Refused(epoch=scheduler.epoch, ticket=submit.ticket, code="internal", message="a mishap"))

    async def run() -> None:
        begins: asyncio.Future[Started] = asyncio.get_running_loop().create_future()

        async def never(_: float | None) -> Started:
            return await begins

        async with (
            ScriptedScheduler(script, lease_s=LONG_LEASE_S) as scheduler,
            AsyncClient(scheduler.address, connect_timeout=DEADLINE_S) as client,
        ):
            streams = [client.stream([1]), client.stream([2]), CompletionStream(never, None), client.stream([1])]
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises(RequestFailed, match="a mishap"):
                    await way(streams)
            assert begins.cancelled()
            (cancelled,) = await scheduler.until(Cancel)
            begun, _ = scheduler.of(Submit)
            assert cancelled.ticket == begun.ticket

    asyncio.run(run())


class Choice(BaseModel):
    text: str


class Whole(BaseModel):
    name: str
    choices: list[Choice]
    usage: int


def test_choices_are_written_one_at_a_time() -> None:
    async def run() -> tuple[Any, list[int]]:
        rounds = Rounds()
        made: list[int] = []

        def choice(index: int) -> Choice:
            made.append(rounds.count)
            return Choice(text=f'{index}"choices":[]')

        whole = Whole(name='"choices":[]', choices=[], usage=7)
        response = await response_with(whole, (choice(i) for i in range(20)))
        await rounds.end()
        return json.loads(bytes(response.body)), made

    answer, made = asyncio.run(run())
    expected = [{"text": f'{i}"choices":[]'} for i in range(20)]
    assert answer == {"name": '"choices":[]', "choices": expected, "usage": 7}
    assert len(set(made)) == 20
