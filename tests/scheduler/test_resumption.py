"""Requests that come back: from another life of the scheduler, or over another connection of the same client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    ClientHello,
    Ping,
    Pong,
    Refused,
    Submit,
    Tokens,
    Welcome,
)
from tandem.protocol.sampling import SamplingParams

from support.peers import VOCAB, Scene, ScriptedClient, scene
from support.simulated_worker import continuation

PROMPT = [4, 5, 6, 7, 8]
LENGTH = 12
WHOLE = continuation(PROMPT, len(PROMPT) + LENGTH, frozenset(), VOCAB)[0]
SESSION = 1234567


def play(script: Callable[[Scene], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with scene(**options) as made:
            await script(made)

    asyncio.run(run())


async def greet(made: Scene, session: int) -> ScriptedClient:
    """A client that has heard of a model."""
    client = made.client()
    await client.send(ClientHello(version=PROTOCOL_VERSION, name="comes back", session=session))
    await client.wait(lambda: [one for one in client.got if isinstance(one, Welcome) and one.model is not None])
    return client


def submission(ticket: int, held: int = 0, prompt: list[int] = PROMPT, **fields: Any) -> Submit:
    """A request for LENGTH tokens, of which the client has the first `held`."""
    whole = continuation(prompt, len(prompt) + LENGTH, frozenset(), VOCAB)[0]
    sampling = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    return Submit(
        ticket=ticket,
        prompt=np.array(prompt, np.int32),
        generated=np.array(whole[:held], np.int32),
        sampling=sampling,
        **fields,
    )


def tokens_from(client: ScriptedClient, ticket: int, offset: int) -> list[int]:
    """As they came; no gap, no repeat."""
    found: list[int] = []
    for message in client.got:
        if isinstance(message, Tokens):
            borders = np.cumsum(message.count).tolist()
            for owner, at, count, end in zip(
                message.ticket.tolist(), message.offset.tolist(), message.count.tolist(), borders, strict=True
            ):
                if owner == ticket:
                    assert at == offset + len(found)
                    found += message.token[end - count : end].tolist()
    return found


def test_a_session_that_comes_back_supersedes_itself() -> None:
    """The first connection is open and its request runs; nothing told the scheduler that the client has left it."""

    async def script(made: Scene) -> None:
        worker = made.worker(manual=True)
        await worker.hello()
        first, stranger = await greet(made, SESSION), await greet(made, SESSION + 1)
        await first.send(submission(0))
        await stranger.send(submission(0, prompt=[9, 9]))
        await first.expect(Accepted)
        await stranger.expect(Accepted)
        for _ in range(4):
            await worker.wait(lambda: worker.simulated.plans)
            worker.compute()
        await first.wait(lambda: first.tokens(0))

        second = await greet(made, SESSION)
        held = len(first.tokens(0))
        await second.send(submission(7, held, resumed=True))
        await second.expect(Accepted)
        seen = await second.stats()
        assert seen.running + seen.waiting == 2  # the stranger's and the resumption: nothing runs twice
        assert seen.resumptions == 1
        worker.manual = False
        while worker.simulated.plans:
            worker.compute()
        await second.wait(lambda: second.ended(7))
        await stranger.wait(lambda: stranger.ended(0))
        assert tokens_from(second, 7, held) == WHOLE[held:]
        ended = second.ended(7)
        assert ended is not None
        assert (ended.reason, ended.prompt_tokens, ended.completion_tokens) == ("length", len(PROMPT), LENGTH)
        assert first.ended(0) is None  # it is nobody's any more
        (of_worker,) = (await second.stats()).workers
        assert of_worker.free_blocks == of_worker.num_blocks

    play(script)


@pytest.mark.parametrize("held", [1, LENGTH - 1])
def test_a_resumption_gets_what_is_missing(held: int) -> None:
    async def script(made: Scene) -> None:
        await made.worker().hello()
        client = await greet(made, SESSION)
        await client.send(submission(0, held, resumed=True))
        await client.wait(lambda: client.ended(0))
        assert tokens_from(client, 0, held) == WHOLE[held:]

    play(script)


def test_a_resumption_that_is_complete_ends_at_once() -> None:
    async def script(made: Scene) -> None:
        worker = made.worker(manual=True)
        await worker.hello()
        client = await greet(made, SESSION)
        await client.send(submission(0, LENGTH, resumed=True))
        ended = await client.wait(lambda: client.ended(0))
        assert (ended.reason, ended.completion_tokens) == ("length", LENGTH)
        stop = WHOLE[3]
        sampling = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, stop_token_ids=(stop,))
        prompt, generated = np.array(PROMPT, np.int32), np.array(WHOLE[:4], np.int32)
        await client.send(Submit(ticket=1, prompt=prompt, generated=generated, sampling=sampling, resumed=True))
        ended = await client.wait(lambda: client.ended(1))
        assert (ended.reason, ended.completion_tokens) == ("stop", 4)
        assert not worker.simulated.plans

    play(script)


def test_resumptions_go_before_new_work_and_the_most_urgent_of_it() -> None:
    async def script(made: Scene) -> None:
        worker = made.worker(manual=True, max_num_seqs=1)
        await worker.hello()
        client = await greet(made, SESSION)
        await client.send(submission(0))
        await worker.wait(lambda: worker.simulated.plans)
        await client.send(submission(1, priority=-1_000))
        await client.send(submission(2))
        await client.send(submission(3, 2, priority=1_000, resumed=True))
        await client.send(submission(4, 2, resumed=True))
        await client.expect(Accepted, 5)
        worker.manual = False
        while worker.simulated.plans:
            worker.compute()
        await client.wait(lambda: all(client.ended(ticket) for ticket in range(5)))
        order = [end.ticket for one in client.got if isinstance(one, Tokens) for end in one.ended]
        assert order == [0, 4, 3, 1, 2]

    play(script)


def test_a_resumption_is_of_one_sample() -> None:
    async def script(made: Scene) -> None:
        await made.worker().hello()
        client = await greet(made, SESSION)
        await client.send(submission(0, n=2, resumed=True))
        refused = await client.expect(Refused)
        assert (refused.code, refused.field, refused.limit, refused.value) == ("invalid", "n", "1", "2")

    play(script)


def test_a_ping_is_answered_if_it_wants_to_be() -> None:
    async def script(made: Scene) -> None:
        await made.worker().hello()
        client = await greet(made, 0)
        await client.send(Ping())
        await client.send(Ping(answer=True))
        pong = await client.expect(Pong)
        await client.stats()
        assert len([one for one in client.got if isinstance(one, Pong)]) == 1
        assert pong.epoch == made.service.epoch

    play(script)


def test_clients_without_a_session_are_strangers_to_each_other() -> None:
    async def script(made: Scene) -> None:
        await made.worker(manual=True).hello()
        first, second = await greet(made, 0), await greet(made, 0)
        for client in (first, second):
            await client.send(submission(0))
            await client.expect(Accepted)
        seen = await first.stats()
        assert seen.running + seen.waiting == 2

    play(script)
