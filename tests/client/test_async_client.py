"""AsyncClient: completions, streams, chats and lists of prompts."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tandem import (
    AsyncClient,
    Chunk,
    ConfigurationError,
    InvalidRequest,
    RequestCancelled,
    RequestFailed,
    SamplingParams,
    ServiceUnavailable,
)
from tandem.client.aio import LONG_TEXTS
from tandem.client.prompts import LONG_TEXT
from tandem.client.stream import MAX_UNREAD_TOKENS
from tandem.protocol.messages import Cancel, Submit

from support.deadlines import DEADLINE_S
from support.scripted_scheduler import ANSWER, EOS, TOKENIZER, ScriptedScheduler

ANSWER_IDS = TOKENIZER.encode(ANSWER, add_special_tokens=False)


def play(
    scenario: Callable[[ScriptedScheduler, AsyncClient], Coroutine[Any, Any, None]],
    script: Callable[[ScriptedScheduler, Submit], None] | None = None,
    **client_options: Any,
) -> None:
    async def main() -> None:
        async with (
            ScriptedScheduler(script) as scheduler,
            AsyncClient(scheduler.address, connect_timeout=DEADLINE_S, **client_options) as client,
        ):
            await scenario(scheduler, client)

    asyncio.run(main())


def test_a_completion() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        completion = await client.generate("Hi there", max_tokens=20, seed=3)
        assert completion.text == ANSWER
        assert completion.token_ids == [*ANSWER_IDS, EOS]
        assert completion.finish_reason == "stop"
        assert completion.prompt_token_ids == TOKENIZER.encode("Hi there")
        assert completion.seed == 3
        usage, timings = completion.usage, completion.timings
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (
            len(completion.prompt_token_ids),
            len(ANSWER_IDS) + 1,
            1,
        )
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert (timings.queue_s, timings.first_token_s, timings.total_s) == (0.25, 0.5, 0.75)
        assert 0.0 < timings.client_first_token_s <= timings.client_total_s
        assert scheduler.of(Submit)[0].prompt.tolist() == completion.prompt_token_ids

    play(scenario)


def test_a_stream() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        chunks: list[Chunk] = []
        stream = client.stream("Hi")
        async for chunk in stream:
            chunks.append(chunk)
        assert "".join(chunk.text for chunk in chunks) == stream.text == ANSWER
        assert not any("\ufffd" in chunk.text for chunk in chunks)
        offset = 0
        for chunk in chunks:
            assert chunk.offset == offset
            offset += len(chunk.token_ids)
        assert offset == len(ANSWER_IDS) + 1
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        completion = await stream.result()
        assert completion.text == ANSWER
        assert [chunk async for chunk in stream] == []

    play(scenario)


def test_an_end_that_comes_alone_is_a_chunk_without_tokens() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        half = TOKENIZER.encode("😀", add_special_tokens=False)[:-1]
        scheduler.accept(submit)
        scheduler.tokens(submit.ticket, half, 0)
        held.append(lambda: scheduler.tokens(submit.ticket, [], 0, [scheduler.end(submit, len(half), "length")]))

    held: list[Callable[[], None]] = []

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream("Hi")
        first = await anext(stream)
        assert (first.text, first.finish_reason) == ("", None)
        held[0]()
        last = await anext(stream)
        assert (last.text, last.token_ids, last.finish_reason) == ("\ufffd", [], "length")

    play(scenario, script)


@pytest.mark.parametrize(
    ("params", "ids", "text"),
    [
        ({}, [*ANSWER_IDS, EOS], ANSWER),
        ({"ignore_eos": True}, [EOS, *ANSWER_IDS], ANSWER),  # passed over: a special token has no text
        ({"stop_token_ids": [ANSWER_IDS[1]]}, ANSWER_IDS[:2], TOKENIZER.decode(ANSWER_IDS[:1])),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, [*ANSWER_IDS, EOS], ANSWER),
    ],
)
def test_the_stop_token_is_no_text(params: dict[str, Any], ids: list[int], text: str) -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.accept(submit)
        scheduler.tokens(submit.ticket, ids, 0, [scheduler.end(submit, len(ids))])

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        completion = await client.generate("Hi", **params)
        assert completion.text == text
        assert completion.token_ids == ids

    play(scenario, script)


def test_a_chat() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        messages = [{"role": "user", "content": "Hi"}]
        for call in (client.chat(messages), client.generate(messages), client.stream(messages).result()):
            assert (await call).text == ANSWER
        await client.chat(
            messages, chat_template="{{ tools|length }}{{ x }}", tools=[{}], template_variables={"x": "y"}
        )
        prompts = [
            TOKENIZER.decode(submit.prompt.tolist(), skip_special_tokens=False) for submit in scheduler.of(Submit)
        ]
        assert prompts == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"] * 3 + ["1y"]
        with pytest.raises(InvalidRequest, match="role"):
            await client.chat([{"content": "Hi"}])
        with pytest.raises(ConfigurationError, match="compile"):
            await client.chat(messages, chat_template="{% if %}")

    play(scenario)


def test_a_list_keeps_its_order_and_its_bound() -> None:
    waiting: list[Submit] = []
    most = 0

    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        nonlocal most
        waiting.append(submit)
        most = max(most, len(waiting))
        if len(waiting) == 3 or len(scheduler.of(Submit)) == 10:
            for submission in reversed(waiting):  # the answer is the prompt
                scheduler.accept(submission)
                scheduler.tokens(
                    submission.ticket, submission.prompt.tolist(), 0, [scheduler.end(submission, 1, "length")]
                )
            waiting.clear()

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        completions = await client.generate([[i] for i in range(10, 20)], max_tokens=1)
        assert [completion.token_ids for completion in completions] == [[i] for i in range(10, 20)]
        assert most == 3

    play(scenario, script, max_concurrency=3)


def test_a_list_with_its_own_parameters() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        await client.generate(
            ["a", [1], [{"role": "user", "content": "x"}]], [SamplingParams(seed=i) for i in range(3)]
        )
        assert [submit.sampling.seed for submit in scheduler.of(Submit)] == [0, 1, 2]
        with pytest.raises(InvalidRequest, match="1 for 2 prompts"):
            await client.generate(["a", "b"], [SamplingParams()])
        wrong: Any = {"temperature": 1}
        with pytest.raises(InvalidRequest, match="expected a SamplingParams, got dict"):
            await client.generate("a", wrong)

    play(scenario, max_concurrency=1)


def test_the_first_failure_of_a_list_cancels_the_rest() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.begin(submit)
        if submit.ticket == 2:
            scheduler.tokens(submit.ticket, [], 0, [scheduler.end(submit, 3, "error")])

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(RequestFailed):
            await client.generate([[1], [2], [3], [4]])
        assert not client._connection.open_requests

    play(scenario, script)


def test_generate_may_take_more_tokens_than_a_reader_may_leave() -> None:
    count = MAX_UNREAD_TOKENS + 1_000

    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.accept(submit)
        scheduler.tokens(submit.ticket, [5] * count, 0, [scheduler.end(submit, count, "length")])

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        assert (await client.generate([1])).token_ids == [5] * count

    play(scenario, script)


def test_many_streams_at_once() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        async def read() -> str:
            return "".join([chunk.text async for chunk in client.stream("Hi")])

        assert await asyncio.gather(*(read() for _ in range(200))) == [ANSWER] * 200

    play(scenario)


def test_two_clients_in_one_loop() -> None:
    async def main() -> None:
        async with (
            ScriptedScheduler() as one,
            ScriptedScheduler() as other,
            AsyncClient(one.address) as first,
            AsyncClient(other.address) as second,
        ):
            answers = await asyncio.gather(first.generate("a"), second.generate("b"))
            assert [answer.text for answer in answers] == [ANSWER] * 2
            assert len(one.of(Submit)) == len(other.of(Submit)) == 1

    asyncio.run(main())


def test_bounds_of_the_client_itself() -> None:
    with pytest.raises(InvalidRequest, match="max_concurrency"):
        AsyncClient("ipc:///x", max_concurrency=0)
    with pytest.raises(ConfigurationError, match="address"):
        AsyncClient("http://x")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"connect_timeout": "1"}, "connect_timeout"),
        ({"reconnect_timeout": -1}, "reconnect_timeout"),
        ({"max_concurrency": "8"}, "max_concurrency"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"name": 3}, "name"),
        ({"name": "x" * 257}, "name"),
        ({"address": 3}, "address"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as refused:
        AsyncClient(**{"address": "ipc:///tmp/none", **arguments})
    assert refused.value.field == field


@pytest.mark.parametrize("timeout", ["5", True, -1, float("nan")])
def test_timeouts_that_cannot_be_are_refused(timeout: Any) -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        for prompt in ("Hi", ["Hi"]):
            with pytest.raises(InvalidRequest, match="timeout: expected seconds"):
                await client.generate(prompt, timeout=timeout)

    play(scenario)


def test_no_time_limit_is_none_or_infinite() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        for timeout in (None, float("inf")):
            assert (await client.generate("Hi", timeout=timeout)).text == ANSWER

    play(scenario, reconnect_timeout=None)


@pytest.mark.parametrize("close", [False, True])
def test_a_request_that_is_ended_while_it_is_being_sent_is_cancelled(close: bool) -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        await client.tokenizer()
        stream = client.stream([{"role": "user", "content": "Hi"}])  # rendered on another thread
        reading = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        assert stream.history is None
        if close:
            await stream.aclose()
        else:
            client.cancel(stream)
        with pytest.raises(RequestCancelled):
            await reading
        assert [cancel.ticket for cancel in await scheduler.until(Cancel)] == [0]

    play(scenario, ScriptedScheduler.begin)


class Held(dict[str, str]):
    """A message that cannot be read before `open` is set."""

    def __init__(self, text: str) -> None:
        super().__init__(role="user", content=text)
        self.open = threading.Event()

    def items(self) -> Any:
        assert self.open.wait(DEADLINE_S)
        return super().items()


def test_short_prompts_wait_for_no_long_ones() -> None:
    """However many of these are being made tokens of."""

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        long = [Held("word " * LONG_TEXT) for _ in range(40)]
        calls = [asyncio.create_task(client.generate([message])) for message in long]
        await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            assert (await client.generate("Hi")).text == ANSWER
            assert (await client.generate([{"role": "user", "content": "Hi"}])).text == ANSWER
            assert not any(call.done() for call in calls)
            for message in long:
                message.open.set()
            for refused in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(refused, InvalidRequest)
                assert refused.field == "prompt"
        assert len(scheduler.of(Submit)) == 2

    play(scenario)


def test_closing_ends_long_prompts_that_wait_for_a_thread() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        await client.tokenizer()
        long = [Held("word " * LONG_TEXT) for _ in range(2 + LONG_TEXTS)]
        calls = [asyncio.create_task(client.generate([message])) for message in long]
        await asyncio.sleep(0)
        await client.close()
        for message in long:
            message.open.set()
        async with asyncio.timeout(DEADLINE_S):
            ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, InvalidRequest | ServiceUnavailable) for end in ends)
        assert isinstance(ends[-1], ServiceUnavailable)

    play(scenario)


def test_closing_while_the_tokenizer_is_fetched_cancels_no_task() -> None:
    async def main() -> None:
        async with ScriptedScheduler() as scheduler:
            client = AsyncClient(scheduler.address, connect_timeout=DEADLINE_S)
            await client.connect()
            call = asyncio.create_task(client.generate("Hi"))
            await asyncio.sleep(0)
            await client.close()
            with pytest.raises(RequestCancelled, match="the client was closed"):
                await call

    asyncio.run(main())
