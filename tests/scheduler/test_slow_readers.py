"""A client that asks and never reads: what is kept for it is bounded, and nobody else notices."""

from __future__ import annotations

import asyncio

import numpy as np
import zmq

from tandem.protocol.codec import decode, encode
from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AskStats,
    ClientHello,
    Ping,
    Submit,
    Tokens,
    UnknownPeer,
    Welcome,
)
from tandem.protocol.sampling import SamplingParams

from support.deadlines import DEADLINE_S
from support.peers import EVERYTHING, VOCAB, ScriptedClient, scene
from support.simulated_worker import continuation

PROMPT = [4, 5, 6]
LENGTH = 20
ENOUGH = 200_000
"""Questions; far fewer fill every queue."""


def request(ticket: int) -> Submit:
    sampling = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    return Submit(ticket=ticket, prompt=np.array(PROMPT, np.int32), sampling=sampling)


def test_a_client_that_never_reads_loses_its_own_requests_and_no_token_without_a_word() -> None:
    async def script() -> None:
        async with scene() as made:
            worker, other = made.worker(manual=True), made.client()
            await worker.hello()
            await other.hello()
            await other.wait(lambda: [one for one in other.got if isinstance(one, Welcome) and one.model is not None])
            slow = made.context.socket(zmq.DEALER)
            slow.set(zmq.RCVHWM, 1)
            slow.connect(f"{made.address}/clients")
            try:
                await flood(slow, other)
                await other.send(request(0))
                await other.expect(Accepted)
                worker.manual = False
                while worker.simulated.plans:
                    worker.compute()
                await other.wait(lambda: other.ended(0))
                whole = continuation(PROMPT, len(PROMPT) + LENGTH, frozenset(), VOCAB)[0]
                assert other.tokens(0) == whole
                await read_what_was_kept(slow, whole)
            finally:
                slow.close(0)

    async def flood(slow: zmq.Socket[bytes], other: ScriptedClient) -> None:
        """Starts a request, and then asks until the scheduler has had enough."""
        slow.send(encode(ClientHello(version=PROTOCOL_VERSION)))
        slow.send(encode(request(0)))
        async with asyncio.timeout(DEADLINE_S):
            while (await other.stats()).running + (await other.stats()).waiting == 0:
                pass
            sent = 0
            while (found := await other.stats()).clients == 2:
                for _ in range(500):
                    try:
                        slow.send(encode(AskStats()), zmq.DONTWAIT)
                        sent += 1
                    except zmq.Again:
                        break
                assert sent < ENOUGH
        found = await other.stats()  # its requests end in the next turn of the loop
        assert (found.clients, found.running, found.waiting) == (1, 0, 0)

    async def read_what_was_kept(slow: zmq.Socket[bytes], whole: list[int]) -> None:
        """What comes is whole as far as it goes; then the client hears that it is not known any more."""
        tokens: list[int] = []
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if not slow.poll(0):
                    slow.send(encode(Ping()))  # an answer to an earlier one may have found the queue full
                    await asyncio.sleep(0.01)
                    continue
                message = decode(slow.recv(), *EVERYTHING)
                if isinstance(message, Tokens):
                    assert message.offset.tolist() == [len(tokens)]
                    tokens += message.token.tolist()
                elif isinstance(message, UnknownPeer):
                    break
        assert tokens == whole[: len(tokens)]

    asyncio.run(script())
