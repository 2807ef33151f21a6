"""Several samples, priorities, salts and deadlines: what is sent, and what a caller gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from tandem import AsyncClient, InvalidRequest, RequestCancelled, RequestFailed, RequestTimeout, SamplingParams
from tandem.client.stream import History
from tandem.protocol.messages import Cancel, Refused, Submit, Tokens

from support.deadlines import DEADLINE_S
from support.scripted_scheduler import EOS, TOKENIZER, ScriptedScheduler


def play(
    scenario: Callable[[ScriptedScheduler, AsyncClient], Coroutine[Any, Any, None]],
    script: Callable[[ScriptedScheduler, Submit], None],
    **options: Any,
) -> None:
    async def main() -> None:
        async with ScriptedScheduler(script, **options) as scheduler, AsyncClient(scheduler.address) as client:
            await scenario(scheduler, client)

    asyncio.run(main())


def words(*texts: str) -> list[list[int]]:
    return [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]


ANSWERS = words("first", "second one", "the third")


def sample_of(submit: Submit, index: int) -> Submit:
    """The request that sample `index` of a submission is."""
    return Submit(ticket=submit.ticket + index, prompt=submit.prompt, sampling=submit.sampling)


def interleaved(scheduler: ScriptedScheduler, submit: Submit) -> None:
    """Each sample answers in two pieces, the last sample first."""
    parts = [sample_of(submit, index) for index in range(submit.n)]
    for part in parts:
        scheduler.accept(part)
    for index, part in reversed(list(enumerate(parts))):
        scheduler.tokens(part.ticket, ANSWERS[index][:1], 0)
    for index, part in reversed(list(enumerate(parts))):
        rest = [*ANSWERS[index][1:], EOS]
        scheduler.tokens(part.ticket, rest, 1, [scheduler.end(part, len(rest) + 1)])


def test_samples_come_as_choices_of_one_completion() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        done = await client.generate([1, 2], n=3, temperature=1.0)
        assert [choice.text for choice in done.choices] == ["first", "second one", "the third"]
        assert [choice.index for choice in done.choices] == [0, 1, 2]
        assert [choice.token_ids for choice in done.choices] == [[*answer, EOS] for answer in ANSWERS]
        assert all(choice.finish_reason == "stop" for choice in done.choices)
        assert (done.text, done.token_ids) == (done.choices[0].text, done.choices[0].token_ids)
        assert done.usage.prompt_tokens == 2
        assert done.usage.completion_tokens == sum(len(answer) + 1 for answer in ANSWERS)
        (submit,) = scheduler.of(Submit)
        assert (submit.n, submit.sample) == (3, 0)

    play(scenario, interleaved)


def test_more_samples_than_the_service_allows_are_not_even_made() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        for many in (4, 65_536):
            with pytest.raises(InvalidRequest, match="over the limit of 3 samples") as refused:
                await client.generate([1, 2], n=many, temperature=1.0)
            assert (refused.value.field, refused.value.limit, refused.value.value) == ("n", 3, many)
        assert len((await client.generate([1, 2], n=3, temperature=1.0)).choices) == 3
        assert len(scheduler.of(Submit)) == 1

    play(scenario, interleaved, max_n=3)


def test_a_stream_says_whose_each_chunk_is() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        texts, ends, offsets = ["", "", ""], [], [0, 0, 0]
        async with client.stream([1, 2], n=3, temperature=1.0) as stream:
            async for chunk in stream:
                assert chunk.offset == offsets[chunk.index]
                offsets[chunk.index] += len(chunk.token_ids)
                texts[chunk.index] += chunk.text
                if chunk.finish_reason is not None:
                    ends.append(chunk.index)
            done = await stream.result()
        assert texts == ["first", "second one", "the third"] == [choice.text for choice in done.choices]
        assert sorted(ends) == [0, 1, 2]

    play(scenario, interleaved)


def test_letting_go_of_a_stream_cancels_every_sample() -> None:
    def begin(scheduler: ScriptedScheduler, submit: Submit) -> None:
        for index in range(submit.n):
            scheduler.begin(sample_of(submit, index))

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        async with client.stream([1], n=3, temperature=1.0) as stream:
            await anext(stream)
        cancelled = await scheduler.until(Cancel, 3)
        first = scheduler.of(Submit)[0].ticket
        assert sorted(cancel.ticket for cancel in cancelled) == [first, first + 1, first + 2]

    play(scenario, begin)


def test_a_sample_that_fails_ends_the_others() -> None:
    def second_fails(scheduler: ScriptedScheduler, submit: Submit) -> None:
        for index in range(submit.n):
            scheduler.begin(sample_of(submit, index))
        scheduler.tokens(submit.ticket + 1, [], 3, [scheduler.end(sample_of(submit, 1), 3, "error")])

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(RequestFailed):
            async for _ in client.stream([1], n=3, temperature=1.0):
                pass
        first = scheduler.of(Submit)[0].ticket
        assert sorted(cancel.ticket for cancel in await scheduler.until(Cancel, 2)) == [first, first + 2]

    play(scenario, second_fails)


def test_a_sample_that_fails_is_told_at_once_though_others_go_on() -> None:
    def last_fails(scheduler: ScriptedScheduler, submit: Submit) -> None:
        for index in range(submit.n):
            scheduler.begin(sample_of(submit, index))
        scheduler.tokens(submit.ticket + 2, [], 3, [scheduler.end(sample_of(submit, 2), 3, "error")])

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(RequestFailed):
                await client.generate([1], n=3, temperature=1.0)
        first = scheduler.of(Submit)[0].ticket
        assert sorted(cancel.ticket for cancel in await scheduler.until(Cancel, 2)) == [first, first + 1]
        assert not client._connection.open_requests

    play(scenario, last_fails)


def test_what_has_arrived_of_any_sample_is_read_before_the_error() -> None:
    def two_of_three_begin(scheduler: ScriptedScheduler, submit: Submit) -> None:
        rows = [submit.ticket, submit.ticket + 2]  # in one message, so that they arrive together
        scheduler.say(
            Tokens(
                epoch=scheduler.epoch,
                ticket=np.array(rows, np.int64),
                offset=np.zeros(2, np.int32),
                count=np.ones(2, np.int32),
                token=np.array([5, 6], np.int32),
            )
        )

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1], n=3, temperature=1.0)
        first = await anext(stream)
        client.cancel(stream)
        second = await anext(stream)
        assert [(chunk.index, chunk.token_ids) for chunk in (first, second)] == [(0, [5]), (2, [6])]
        with pytest.raises(RequestCancelled):
            await anext(stream)

    play(scenario, two_of_three_begin)


def test_tickets_of_samples_are_never_given_again() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        for n in (3, 1, 2):
            await client.generate([1], n=n, temperature=1.0)
        first, second, third = scheduler.of(Submit)
        assert second.ticket == first.ticket + 3
        assert third.ticket == second.ticket + 1

    play(scenario, interleaved)


@pytest.mark.parametrize(
    ("options", "field", "words_in_it"),
    [
        ({"n": 0}, "n", "at least 1"),
        ({"n": 2.0}, "n", "whole number"),
        ({"n": True}, "n", "whole number"),
        ({"n": 70_000}, "n", "at most 65536"),
        ({"n": 2, "temperature": 0.0}, "n", "all be the same"),
        ({"priority": 1_001}, "priority", "at most 1000"),
        ({"priority": "high"}, "priority", "whole number"),
        ({"cache_salt": 7}, "cache_salt", "expected text"),
        ({"cache_salt": "a\udcff"}, "cache_salt", r"lone surrogate U\+DCFF"),
        ({"cache_salt": "x" * 257}, "cache_salt", "257 characters, over the limit of 256"),
        ({"timeout": -1}, "timeout", "at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], field: str, words_in_it: str) -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(InvalidRequest, match=words_in_it) as caught:
            await client.generate([1], **options)
        assert caught.value.field == field
        with pytest.raises(InvalidRequest, match=words_in_it):
            await client.stream([1], **options).result()
        assert not scheduler.of(Submit)

    play(scenario, ScriptedScheduler.answer)


def test_priority_salt_and_timeout_travel() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        await client.generate([1], priority=-3, cache_salt="tenant 7", timeout=30.0)
        await client.generate([[1], [2]], priority=5, timeout=float("inf"))
        first, second, third = scheduler.of(Submit)
        assert (first.priority, first.cache_salt) == (-3, "tenant 7")
        assert first.timeout_s is not None
        assert 0 < first.timeout_s <= 30.0
        assert (second.priority, second.cache_salt, second.timeout_s) == (5, "", None)
        assert third.priority == 5

    play(scenario, ScriptedScheduler.answer)


def times_out(scheduler: ScriptedScheduler, submit: Submit) -> None:
    scheduler.accept(submit)
    scheduler.tokens(submit.ticket, ANSWERS[1], 0, [scheduler.end(submit, len(ANSWERS[1]), "timeout")])


def test_what_a_request_has_when_its_time_is_over_comes_with_the_error() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(RequestTimeout, match="timeout of 25 s") as caught:
            await client.generate([1, 2], timeout=25)
        partial = caught.value.completion
        assert (partial.text, partial.token_ids, partial.finish_reason) == ("second one", ANSWERS[1], "timeout")
        assert (partial.usage.prompt_tokens, partial.usage.cached_tokens) == (2, 1)
        stream = client.stream([1, 2], timeout=25)
        with pytest.raises(RequestTimeout) as again:
            await stream.result()
        assert stream.text == again.value.completion.text == "second one"
        assert not scheduler.of(Cancel)

    play(scenario, times_out)


def test_a_stream_gives_what_came_and_the_end_of_each_sample_and_then_raises() -> None:
    def one_ends_and_two_time_out(scheduler: ScriptedScheduler, submit: Submit) -> None:
        parts = [sample_of(submit, index) for index in range(3)]
        for part in parts:
            scheduler.tokens(part.ticket, [5, 6], 0)
        for part, reason in zip(parts, ("timeout", "length", "timeout"), strict=True):
            scheduler.tokens(part.ticket, [], 0, [scheduler.end(part, 2, reason)])

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
        ends = {}

        async def read() -> None:
            async for chunk in client.stream([1], n=3, temperature=1.0, timeout=25):
                tokens[chunk.index] += chunk.token_ids
                if chunk.finish_reason is not None:
                    ends[chunk.index] = chunk.finish_reason

        with pytest.raises(RequestTimeout) as caught:
            await read()
        assert tokens == {0: [5, 6], 1: [5, 6], 2: [5, 6]}
        assert ends == {0: "timeout", 1: "length", 2: "timeout"}
        assert [choice.finish_reason for choice in caught.value.completion.choices] == ["timeout", "length", "timeout"]
        assert caught.value.completion.usage.completion_tokens == 6
        assert not scheduler.of(Cancel)

    play(scenario, one_ends_and_two_time_out)


def test_a_resumption_is_of_one_sample_and_has_what_is_left_of_its_time() -> None:
    async def main() -> None:
        now = asyncio.get_running_loop().time()
        history = History(
            np.array([1, 2], np.int32),
            SamplingParams(seed=3),
            sample=4,
            priority=-1,
            cache_salt="salt",
            deadline=now + 5.0,
            generated=[7],
        )
        resumed = history.submission(ticket=9)
        assert (resumed.n, resumed.sample, resumed.priority, resumed.cache_salt) == (1, 4, -1, "salt")
        assert resumed.timeout_s is not None
        assert 0.0 < resumed.timeout_s <= 5.0
        for deadline, left in ((now - 1.0, 0.001), (now + 1e12, 1e9)):  # what the protocol takes
            history.deadline = deadline
            assert history.submission(ticket=9).timeout_s == left

    asyncio.run(main())


def test_a_service_that_does_not_end_a_request_in_time_is_not_waited_for() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(RequestTimeout, match=r"timeout of 0\.5 s") as caught:
            await client.generate([1], timeout=0.5)
        assert caught.value.completion.token_ids == [5, 6, 7]
        assert caught.value.completion.finish_reason == "timeout"
        await scheduler.until(Cancel)

    play(scenario, ScriptedScheduler.begin)


def test_no_time_at_all_sends_nothing() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(RequestTimeout) as caught:
            await client.generate([1], timeout=0)
        assert caught.value.completion is None
        assert not scheduler.of(Submit)

    play(scenario, ScriptedScheduler.answer)


def test_a_request_that_the_scheduler_failed_on_says_so() -> None:
    def refuse(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.say(
            Refused(epoch=scheduler.epoch, ticket=submit.ticket, code="internal", message="the scheduler failed on it")
        )

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(RequestFailed, match="the scheduler failed on it"):
            await client.generate([1])

    play(scenario, refuse)
