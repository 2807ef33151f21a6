"""Open requests outlive their scheduler, their connection and what is lost between: they go on where they stand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import fields, replace
from typing import Any

import pytest

from tandem import (
    AsyncClient,
    InvalidRequest,
    ModelChanged,
    OffsetError,
    RequestCancelled,
    ServiceUnavailable,
)
from tandem.client.resumption import MAX_REPAIRS
from tandem.protocol.messages import (
    Cancel,
    ClientHello,
    FetchFile,
    Goodbye,
    ModelDescription,
    Ping,
    Pong,
    Refused,
    Submit,
    UnknownPeer,
)

from support.deadlines import DEADLINE_S
from support.scripted_scheduler import FILES, MODEL, ScriptedScheduler

TOKENS = list(range(5, 25))
"""What every request is answered with, whatever happens on the way."""

Script = Callable[[ScriptedScheduler, Submit], None]
Scenario = Callable[[ScriptedScheduler, AsyncClient], Coroutine[Any, Any, None]]


def play(scenario: Scenario, script: Script, client_options: dict[str, Any] | None = None, **options: Any) -> None:
    async def main() -> None:
        async with (
            ScriptedScheduler(script, **options) as scheduler,
            AsyncClient(scheduler.address, **(client_options or {})) as client,
        ):
            await client.tokenizer()  # whose files would be asked for between the messages that a test looks at
            async with asyncio.timeout(DEADLINE_S):
                await scenario(scheduler, client)

    asyncio.run(main())


def some(scheduler: ScriptedScheduler, submit: Submit, count: int) -> int:
    """The next `count` tokens; returns the position after them."""
    start = len(submit.generated)
    scheduler.tokens(submit.ticket, TOKENS[start : start + count], start)
    return start + count


def rest(scheduler: ScriptedScheduler, submit: Submit) -> None:
    """Takes the request and answers it to its end, from where it stands."""
    assert submit.generated.tolist() == TOKENS[: len(submit.generated)]
    scheduler.accept(submit)
    start = len(submit.generated)
    scheduler.tokens(submit.ticket, TOKENS[start:], start, [scheduler.end(submit, len(TOKENS), "length")])


def restart(scheduler: ScriptedScheduler) -> None:
    """Another life, and the client hears of it at once."""
    scheduler.restart()
    scheduler.say(UnknownPeer(epoch=scheduler.epoch))


def first_three_then(lose: Callable[[ScriptedScheduler], None]) -> Script:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if submit.resumed:
            rest(scheduler, submit)
        else:
            scheduler.accept(submit)
            some(scheduler, submit, 3)
            lose(scheduler)

    return script


def forget(scheduler: ScriptedScheduler) -> None:
    """The same life, but the connection is another one to it."""
    scheduler.say(UnknownPeer(epoch=scheduler.epoch))


def new_life_unasked(scheduler: ScriptedScheduler) -> None:
    scheduler.epoch += 1
    scheduler.welcome()


def leave(scheduler: ScriptedScheduler) -> None:
    scheduler.say(Goodbye(reason="maintenance"))
    scheduler.restart()


@pytest.mark.parametrize("lose", [restart, forget, new_life_unasked, leave])
def test_a_stream_goes_on_at_the_next_token(lose: Callable[[ScriptedScheduler], None]) -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1, 2], seed=5, priority=3, cache_salt="mine", temperature=0.7, timeout=50)
        got = [(chunk.offset, chunk.token_ids) async for chunk in stream]
        assert got == [(0, TOKENS[:3]), (3, TOKENS[3:])]
        first, second = scheduler.of(Submit)
        assert (first.resumed, second.resumed) == (False, True)
        assert second.ticket > first.ticket
        assert (second.prompt.tolist(), second.generated.tolist()) == ([1, 2], TOKENS[:3])
        assert second.sampling == first.sampling
        assert (second.priority, second.cache_salt, second.sample) == (3, "mine", 0)
        assert first.timeout_s is not None
        assert second.timeout_s is not None
        assert 0 < second.timeout_s < first.timeout_s <= 50
        sessions = {hello.session for hello in scheduler.of(ClientHello)}
        assert len(sessions) == 1
        assert 0 not in sessions
        assert client._connection.open_requests == 0

    play(scenario, first_three_then(lose))


def test_samples_go_on_one_by_one() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if submit.resumed:
            rest(scheduler, submit)
            return
        for index in range(submit.n):
            scheduler.accept(replace(submit, ticket=submit.ticket + index))
        scheduler.tokens(submit.ticket + 1, TOKENS[:2], 0)
        restart(scheduler)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        done = await client.generate([1], n=3, temperature=1.0)
        assert [choice.token_ids for choice in done.choices] == [TOKENS] * 3
        again = scheduler.of(Submit)[1:]
        assert [(one.sample, one.n, len(one.generated)) for one in again] == [(0, 1, 0), (1, 1, 2), (2, 1, 0)]
        assert len({one.sampling.seed for one in scheduler.of(Submit)}) == 1

    play(scenario, script)


def test_a_scheduler_that_was_killed_is_found_again_at_its_address() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        streams = [client.stream([1]) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        scheduler.socket.close(0)
        scheduler.restart()
        scheduler.listen()
        for stream in streams:
            assert (await stream.result()).token_ids == TOKENS

    play(scenario, first_three_then(lambda _: None), lease_s=0.3)


def test_a_scheduler_that_cannot_be_reached_is_noticed_before_anything_is_to_be_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a client with open requests. Its next ping would be due in an hour here."""

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        lost, keep_in_touch = asyncio.Event(), client._connection._keep_in_touch

        def watched(now: float, silence: float) -> bool:
            if not (reached := keep_in_touch(now, silence)):
                lost.set()
            return reached

        monkeypatch.setattr(client._connection, "_keep_in_touch", watched)
        stream = client.stream([1])
        await anext(stream)
        monkeypatch.setattr("tandem.client.connection.LONGEST_SILENCE_S", 3600.0)
        scheduler.socket.close(0)
        await lost.wait()
        scheduler.restart()
        scheduler.listen()
        assert (await stream.result()).token_ids == TOKENS

    play(scenario, first_three_then(lambda _: None), {"reconnect_timeout": None}, lease_s=3 * 3600.0)


def test_what_is_resumed_waits_until_there_is_a_model() -> None:
    def lose_the_model(scheduler: ScriptedScheduler) -> None:
        scheduler.model = None
        restart(scheduler)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1])
        await anext(stream)
        await scheduler.until(ClientHello, 2)
        assert len(scheduler.of(Submit)) == 1
        scheduler.model = MODEL
        scheduler.welcome()
        assert (await stream.result()).token_ids == TOKENS

    play(scenario, first_three_then(lose_the_model))


def test_a_scheduler_that_gets_no_model_fails_what_is_open() -> None:
    def lose_the_model(scheduler: ScriptedScheduler) -> None:
        scheduler.model = None
        restart(scheduler)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1])
        with pytest.raises(ServiceUnavailable, match=r"no worker with a loaded model; .* for 1 s"):
            await stream.result()
        assert stream.history is not None
        assert stream.history.generated == TOKENS[:3]
        assert client._connection.open_requests == 0

    play(scenario, first_three_then(lose_the_model), {"connect_timeout": 1.0, "reconnect_timeout": 0.7}, lease_s=0.3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"weights": "others"}, "weights"), ({"max_model_len": 64}, "max_model_len"), ({"vocab_size": 9}, "vocab_size")],
)
def test_another_model_cannot_go_on(changes: dict[str, Any], named: str) -> None:
    def swap(scheduler: ScriptedScheduler) -> None:
        scheduler.model = replace(MODEL, **changes)
        restart(scheduler)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(ModelChanged, match=named):
            await client.generate([1])
        assert len(scheduler.of(Submit)) == 1
        scheduler.script = rest
        assert (await client.generate([1])).token_ids == TOKENS  # new work is another matter

    play(scenario, first_three_then(swap))


def test_what_names_and_defaults_alone_distinguish_goes_on() -> None:
    def rename(scheduler: ScriptedScheduler) -> None:
        scheduler.model = replace(MODEL, name="renamed", default_sampling={})
        restart(scheduler)

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        assert (await client.generate([1])).token_ids == TOKENS

    play(scenario, first_three_then(rename))


def test_a_full_service_is_waited_for_with_what_it_had_begun() -> None:
    refusals: list[int] = []

    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if not submit.resumed:
            scheduler.accept(submit)
            some(scheduler, submit, 3)
            restart(scheduler)
        elif len(refusals) < 3:
            refusals.append(submit.ticket)
            scheduler.say(
                Refused(
                    epoch=scheduler.epoch, ticket=submit.ticket, code="overloaded", message="full", retry_after_s=0.001
                )
            )
        else:
            rest(scheduler, submit)

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        assert (await client.generate([1])).token_ids == TOKENS
        assert len(set(refusals)) == 3

    play(scenario, script)


def test_an_invalid_resumption_fails() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if submit.resumed:
            scheduler.say(
                Refused(epoch=scheduler.epoch, ticket=submit.ticket, code="invalid", message="no", field="prompt")
            )
        else:
            restart(scheduler)

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(InvalidRequest, match="no"):
            await client.generate([1])

    play(scenario, script)


# --- streams that break -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [5, 1, 0], ids=["gap", "repeat", "repeat from the start"])
def test_a_gap_or_repeat_is_asked_for_again(offset: int) -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if submit.ticket == 0:
            scheduler.accept(submit)
            some(scheduler, submit, 3)
            scheduler.tokens(submit.ticket, [8], offset)
            scheduler.tokens(submit.ticket, [8], offset + 1)  # on its way when the request is cancelled
        else:
            rest(scheduler, submit)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        broken, whole = client.stream([1, 2]), client.stream([1, 2])
        assert (await broken.result()).token_ids == TOKENS
        assert (await whole.result()).token_ids == TOKENS
        assert [cancel.ticket for cancel in scheduler.of(Cancel)] == [0]
        assert [(one.resumed, len(one.generated)) for one in scheduler.of(Submit)] == [
            (False, 0),
            (True, 3),
            (False, 0),
        ]

    play(scenario, script)


def test_a_lost_tail_is_asked_for_again() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if submit.resumed:
            rest(scheduler, submit)
            return
        scheduler.accept(submit)
        some(scheduler, submit, 3)
        scheduler.tokens(submit.ticket, [], 0, [scheduler.end(submit, 4)])

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        assert (await client.generate([1])).token_ids == TOKENS
        assert not scheduler.of(Cancel)  # there was nothing left to cancel

    play(scenario, script)


def test_a_stream_that_breaks_all_the_time_fails() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.accept(submit)
        if not submit.resumed:
            some(scheduler, submit, 3)
        scheduler.tokens(submit.ticket, [8], 9)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1])
        with pytest.raises(OffsetError) as info:
            await stream.result()
        assert (info.value.expected, info.value.got) == (3, 9)
        assert stream.history is not None
        assert stream.history.generated == TOKENS[:3]
        assert len(scheduler.of(Submit)) == MAX_REPAIRS + 1
        assert len(await scheduler.until(Cancel, MAX_REPAIRS + 1)) == MAX_REPAIRS + 1

    play(scenario, script)


def test_a_stream_that_breaks_often_but_gets_on_is_whole_in_the_end() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.accept(submit)
        position = some(scheduler, submit, 1)
        if position == len(TOKENS):
            scheduler.tokens(submit.ticket, [], 0, [scheduler.end(submit, position, "length")])
        else:
            scheduler.tokens(submit.ticket, [8], position + 1)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        assert (await client.generate([1])).token_ids == TOKENS
        assert len(scheduler.of(Submit)) == len(TOKENS)

    play(scenario, script)


def test_a_scheduler_that_says_goodbye_to_every_try_is_given_up() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.say(Goodbye(reason="protocol error: I do not like it"))

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(ServiceUnavailable, match="I do not like it"):
            await client.generate([1])
        assert len(scheduler.of(Submit)) == MAX_REPAIRS + 1

    play(scenario, script)


# --- silence, and letting go ------------------------------------------------------------------------------------------


def test_a_scheduler_that_answers_nothing_is_tried_through_a_new_socket() -> None:
    """As after a cut that neither end was told of: what is sent arrives nowhere, and nothing comes."""

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        client._connection._silence_limit_s = 0.3
        scheduler.answers_pings = False
        stream = client.stream([1])
        assert (await stream.result()).token_ids == TOKENS
        assert len(set(scheduler._routes)) >= 2
        assert {len(one.generated) for one in scheduler.of(Submit) if one.resumed} == {3}

    play(scenario, first_three_then(lambda _: None), lease_s=0.3)


def test_a_client_that_was_busy_does_not_blame_the_scheduler() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        connection = client._connection
        connection._silence_limit_s = 0.3
        scheduler.answers_pings = False
        while connection._asked_at is None:
            await scheduler.until(Ping, len(scheduler.of(Ping)) + 1)
        scheduler.say(Pong(epoch=scheduler.epoch))
        scheduler.answers_pings = True
        time.sleep(0.5)  # noqa: ASYNC251 - the whole loop is to stand still, with the answer unread
        await client.stats()
        assert len(scheduler.of(ClientHello)) == 1

    play(scenario, rest, lease_s=0.3)


def test_a_request_that_waits_for_a_service_can_be_cancelled() -> None:
    def vanish(scheduler: ScriptedScheduler) -> None:
        scheduler.greeting = lambda _: None
        restart(scheduler)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        cancelled = client.stream([1])
        await anext(cancelled)
        await scheduler.until(ClientHello, 2)
        client.cancel(cancelled)
        with pytest.raises(RequestCancelled):
            await cancelled.result()
        assert client._connection.open_requests == 0
        scheduler.greeting = ScriptedScheduler.welcome
        scheduler.script = rest
        assert (await client.generate([2])).token_ids == TOKENS
        assert [one.prompt.tolist() for one in scheduler.of(Submit)] == [[1], [2]]
        assert not scheduler.of(Cancel)  # that scheduler never had it

    play(scenario, first_three_then(vanish))


def test_files_that_were_on_their_way_are_asked_for_again() -> None:
    async def main() -> None:
        async with ScriptedScheduler(rest) as scheduler, AsyncClient(scheduler.address) as client:
            scheduler.answers_fetches = False
            fetching = asyncio.create_task(client.tokenizer())
            await scheduler.until(FetchFile)
            scheduler.answers_fetches = True
            restart(scheduler)
            assert await fetching is not None

    asyncio.run(main())


def test_a_scheduler_that_comes_back_with_the_same_files_is_not_asked_for_them() -> None:
    """Thousands of clients would all ask at once, in the middle of the recovery."""

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        tokenizer, fetched = await client.tokenizer(), len(scheduler.of(FetchFile))
        assert (await client.generate([1])).token_ids == TOKENS
        assert len(scheduler.of(ClientHello)) == 2
        assert await client.tokenizer() is tokenizer
        assert len(scheduler.of(FetchFile)) == fetched > 0
        scheduler.file_infos = scheduler.file_infos[:-1]
        restart(scheduler)
        await scheduler.until(ClientHello, 3)
        assert (await client.generate([1], temperature=0.0)).token_ids == TOKENS
        assert await client.tokenizer() is not tokenizer

    def once(scheduler: ScriptedScheduler, submit: Submit) -> None:
        (rest if len(scheduler.of(ClientHello)) > 2 else first_three_then(restart))(scheduler, submit)

    play(scenario, once)


def test_a_description_that_is_equal_is_the_same_model() -> None:
    again = ModelDescription(**{f.name: getattr(MODEL, f.name) for f in fields(ModelDescription)})
    assert again is not MODEL

    def reload(scheduler: ScriptedScheduler) -> None:
        scheduler.model = again
        restart(scheduler)

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        assert (await client.generate([1])).token_ids == TOKENS

    play(scenario, first_three_then(reload), files=FILES)
