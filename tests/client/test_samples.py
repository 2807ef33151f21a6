"""Several samples, priorities, salts and deadlines: what is sent, and what a caller gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tandem import AsyncClient, InvalidRequest, RequestFailed, RequestTimeout
from tandem.protocol.messages import Cancel, Refused, Submit

from support.scripted_scheduler import EOS, TOKENIZER, ScriptedScheduler


def play(
    scenario: Callable[[ScriptedScheduler, AsyncClient], Coroutine[Any, Any, None]],
    script: Callable[[ScriptedScheduler, Submit], None],
) -> None:
    async def main() -> None:
        async with ScriptedScheduler(script) as scheduler, AsyncClient(scheduler.address) as client:
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
        ({"cache_salt": "x" * 257}, "cache_salt", "257 characters, over the limit of 256"),
        ({"timeout": -1}, "timeout", "at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], field: str, words_in_it: str) -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        for call in (lambda: client.generate([1], **options), lambda: client.stream([1], **options).result()):
            with pytest.raises(InvalidRequest, match=words_in_it) as caught:
                await call()
            assert caught.value.field == field
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


def test_a_service_that_does_not_end_a_request_in_time_is_not_waited_for() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(RequestTimeout, match=r"timeout of 0\.05 s") as caught:
            await client.generate([1], timeout=0.05)
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
