"""Stop strings: found however text and tokens are cut, nothing after them shown, the request ended at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import AsyncClient, InvalidRequest, ServiceUnavailable
from tandem.client.stopping import StopStrings
from tandem.protocol.messages import Cancel, Goodbye, Submit
from tandem.protocol.sampling import MAX_STOP_CHARS, MAX_STOP_STRINGS

from support.scripted_scheduler import EOS, TOKENIZER, ScriptedScheduler

LETTERS = st.text(alphabet="ab", min_size=1, max_size=5)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By looking at every beginning of the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    st.lists(LETTERS, min_size=1, max_size=4),
    st.booleans(),
)
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    finder = StopStrings(stops, include=include)
    shown = "".join([*(finder.push(piece) for piece in pieces), finder.finish()])
    assert (shown, finder.found) == expected("".join(pieces), stops, include)


@given(st.lists(st.text(alphabet="ab", min_size=1, max_size=3), max_size=12), st.lists(LETTERS, min_size=1, max_size=3))
def test_only_what_may_begin_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += finder.push(piece)
        if finder.found is not None:
            break
        held = text[len(shown) :]
        assert not held or any(len(held) < len(stop) and stop.startswith(held) for stop in stops)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def play(
    scenario: Callable[[ScriptedScheduler, AsyncClient], Coroutine[Any, Any, None]],
    text: str,
    pieces: int = 1,
) -> None:
    """The scheduler sends `text` and does not end the request until it is cancelled, as if it went on."""

    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.accept(submit)
        ids = ids_of(text)
        for offset in range(0, len(ids), pieces):
            scheduler.tokens(submit.ticket, ids[offset : offset + pieces], offset)

    async def settle(scheduler: ScriptedScheduler) -> None:
        await scheduler.until(Cancel)
        (submit,) = scheduler.of(Submit)
        scheduler.tokens(submit.ticket, [5, 6], len(ids_of(text)))  # was on its way
        scheduler.tokens(submit.ticket, [], 0, [scheduler.end(submit, len(ids_of(text)) + 2, "abort")])

    async def main() -> None:
        async with ScriptedScheduler(script) as scheduler, AsyncClient(scheduler.address) as client:
            ending = asyncio.create_task(settle(scheduler))
            try:
                await scenario(scheduler, client)
            finally:
                ending.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("pieces", [1, 2, 1000])
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", " thr", "one two"),  # ends within a token
        ("one two three", ["zzz", "two", "one th"], "one "),
        ("one two three", "one", ""),
        ("wait 😀 now", "😀", "wait "),  # a character of several tokens
        ("你好世界", "世", "你好"),
        ("a\n\nb", "\n\n", "a"),
    ],
)
def test_found_across_tokens(text: str, stop: Any, shown: str, pieces: int) -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        done = await client.generate("Hi", stop=stop)
        assert done.text == shown
        assert done.finish_reason == "stop"
        choice = done.choices[0]
        assert choice.stop_reason in ([stop] if isinstance(stop, str) else stop)
        # The tokens up to the one that completes it, and those alone are counted.
        assert ids_of(text)[: len(done.token_ids)] == done.token_ids
        assert str(choice.stop_reason) in TOKENIZER.decode(done.token_ids)
        assert str(choice.stop_reason) not in TOKENIZER.decode(done.token_ids[:-1])
        assert done.usage.completion_tokens == len(done.token_ids)
        assert done.usage.cached_tokens == 1  # known from how the scheduler ended it
        assert len(await scheduler.until(Cancel)) == 1
        assert scheduler.of(Submit)[0].sampling.stop == ()  # text stays here

    play(scenario, text, pieces)


def test_none_is_looked_for_before_min_tokens() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        count = len(ids_of("one two"))
        done = await client.generate("Hi", stop=["two", "one t"], min_tokens=count)
        assert done.text == "one two three "
        early = await client.generate("Hi", stop=["two"], min_tokens=count - 1)
        assert early.text == "one two three "  # it began before
        assert len(done.token_ids) > count

    play(scenario, "one two three two one")


def test_a_stream_never_shows_what_comes_after() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        chunks = [chunk async for chunk in client.stream("Hi", stop=["three four"], include_stop_str_in_output=True)]
        assert "".join(chunk.text for chunk in chunks) == "one two three four"
        assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", "three four")
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert tokens == ids_of("one two three four five six")[: len(tokens)]

    play(scenario, "one two three four five six")


def test_what_only_began_a_stop_string_is_shown_at_the_end() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        ids = [*ids_of("so it goes"), EOS]
        scheduler.accept(submit)
        scheduler.tokens(submit.ticket, ids, 0, [scheduler.end(submit, len(ids))])

    async def main() -> None:
        async with ScriptedScheduler(script) as scheduler, AsyncClient(scheduler.address) as client:
            done = await client.generate("Hi", stop=["goes on"])
            assert (done.text, done.finish_reason, done.choices[0].stop_reason) == ("so it goes", "stop", None)
            shown = await client.generate("Hi", skip_special_tokens=False, include_stop_str_in_output=True)
            assert shown.text == "so it goes" + TOKENIZER.decode([EOS], skip_special_tokens=False)
            named = await client.generate("Hi", stop_token_ids=[EOS], ignore_eos=True)
            assert named.choices[0].stop_reason == EOS
            assert scheduler.of(Cancel) == []

    asyncio.run(main())


def test_a_scheduler_that_leaves_does_not_take_a_found_end_away() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream("Hi", stop="two")
        async with stream:
            assert "".join([chunk.text async for chunk in stream]) == "one "
            scheduler.say(Goodbye(reason="done"))
            assert (await stream.result()).finish_reason == "stop"
        with pytest.raises(ServiceUnavailable):
            await client.stats(timeout=0.1)

    play(scenario, "one two three")


@pytest.mark.parametrize(
    "stop", ["", [""], ["x" * (MAX_STOP_CHARS + 1)], ["x"] * (MAX_STOP_STRINGS + 1), [3], 3, [["x"]]], ids=str
)
def test_stop_strings_that_cannot_be(stop: Any) -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(InvalidRequest, match="^stop"):
            await client.generate("Hi", stop=stop)
        done = await client.generate("Hi", stop=["x" * MAX_STOP_CHARS] * (MAX_STOP_STRINGS - 1) + ["one"])
        assert done.text == ""

    play(scenario, "one two")
