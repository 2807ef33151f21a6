"""Whatever the scheduler and the network do to a client's messages, its readers see each token once, in order."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem import AsyncClient
from tandem.protocol.messages import Cancel, Goodbye, Refused, Submit, Suspected, UnknownPeer

from support.deadlines import DEADLINE_S
from support.scripted_scheduler import ScriptedScheduler

STREAMS = 3
LENGTH = 12
MAX_GOODBYES = 3
"""One that says goodbye at every try is given up; see MAX_REPAIRS."""
STEPS = (
    "tokens",
    "gap",
    "repeat",
    "bad end",
    "restart",
    "told restart",
    "forget",
    "goodbye",
    "stale",
    "suspect",
    "full",
)


def whole(stream: int) -> list[int]:
    return [10 * stream + position % 10 + 5 for position in range(LENGTH)]


@dataclass
class Live:
    """A request that the scheduler has, and how much of it has gone out."""

    submit: Submit
    position: int

    @property
    def stream(self) -> int:
        return int(self.submit.prompt[0])


class Villain(ScriptedScheduler):
    """Does what a list of steps says, and after that what a scheduler should."""

    def __init__(self) -> None:
        super().__init__(lambda _, submit: self.take(submit), lease_s=0.3)
        self.live: dict[int, Live] = {}
        self.former: list[Live] = []
        """Of lives before, and cancelled ones."""
        self.refusals = 0
        self.arrived = asyncio.Event()

    def take(self, submit: Submit) -> None:
        assert submit.generated.tolist() == whole(int(submit.prompt[0]))[: len(submit.generated)]
        if submit.resumed and self.refusals:
            self.refusals -= 1
            code, wait = "overloaded", 0.001
            self.say(Refused(epoch=self.epoch, ticket=submit.ticket, code=code, message="full", retry_after_s=wait))
            return
        assert submit.ticket not in self.live
        self.accept(submit)
        self.live[submit.ticket] = Live(submit, len(submit.generated))
        self.arrived.set()

    def lose_all(self) -> None:
        self.former += self.live.values()
        self.live.clear()

    def _on_message(self, frames: list[bytes]) -> None:
        super()._on_message(frames)
        match self.received[-1]:
            case Cancel():
                cancelled = self.live.pop(self.received[-1].ticket, None)
                if cancelled is not None:
                    self.former.append(cancelled)

    async def one(self, choice: int) -> Live:
        """One of those that it has; waits for the client if it has none."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.live:
                self.arrived.clear()
                await self.arrived.wait()
        return list(self.live.values())[choice % len(self.live)]

    def send(self, live: Live, count: int) -> None:
        tokens = whole(live.stream)[live.position : live.position + count]
        if tokens:
            self.tokens(live.submit.ticket, tokens, live.position)
            live.position += len(tokens)

    def finish(self, live: Live) -> None:
        self.send(live, LENGTH)
        self.tokens(live.submit.ticket, [], 0, [self.end(live.submit, LENGTH, "length")])
        del self.live[live.submit.ticket]

    def breaks(self, live: Live, offset: int) -> None:
        """The next token, so that there is progress, and then one where none is due."""
        self.send(live, 1)
        self.tokens(live.submit.ticket, [3], offset)

    async def step(self, name: str, choice: int) -> None:
        if name in ("restart", "told restart", "goodbye"):
            if name == "goodbye":
                self.say(Goodbye(reason="maintenance"))
            self.lose_all()
            self.restart()
            if name == "told restart":
                self.say(UnknownPeer(epoch=self.epoch))
            return
        if name == "full":
            self.refusals = 1 + choice % 3
            return
        live = await self.one(choice)
        if name == "tokens":
            self.send(live, 1 + choice % 3)
        elif name == "gap":
            self.breaks(live, live.position + 2 + choice % 5)
        elif name == "repeat":
            self.breaks(live, max(0, live.position - choice % 5))
        elif name == "bad end":
            self.send(live, 1)
            self.tokens(live.submit.ticket, [], 0, [self.end(live.submit, live.position + 1 + choice)])
            self.former.append(self.live.pop(live.submit.ticket))
        elif name == "forget":
            self.lose_all()
            self.say(UnknownPeer(epoch=self.epoch))
        elif name == "suspect":
            ticket, count = np.array([live.submit.ticket], np.int64), np.array([choice % 3], np.int32)
            self.say(Suspected(epoch=self.epoch, ticket=ticket, count=count))
        elif name == "stale" and self.former:
            old = self.former[choice % len(self.former)]
            self.tokens(old.submit.ticket, [3], old.position, epoch=self.epoch - choice % 2)


async def read(client: AsyncClient, stream: int) -> list[int]:
    got: list[int] = []
    async for chunk in client.stream([stream, 1], temperature=1.0, seed=stream, max_tokens=LENGTH):
        assert chunk.offset == len(got)
        got += chunk.token_ids
    return got


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 10)), max_size=14))
def test_readers_see_each_token_once_and_in_order(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        goodbyes = 0
        async with Villain() as villain, AsyncClient(villain.address, reconnect_timeout=DEADLINE_S) as client:
            await client.tokenizer()
            readers = [asyncio.create_task(read(client, stream)) for stream in range(STREAMS)]
            await villain.until(Submit, STREAMS)
            for name, choice in steps:
                goodbyes += name == "goodbye"
                if name != "goodbye" or goodbyes <= MAX_GOODBYES:
                    await villain.step(name, choice)
            villain.refusals = 0
            everything = asyncio.gather(*readers)
            async with asyncio.timeout(DEADLINE_S):
                while not everything.done():
                    for live in list(villain.live.values()):
                        villain.finish(live)
                    villain.arrived.clear()
                    another = asyncio.create_task(villain.arrived.wait())
                    waiting: set[asyncio.Future[Any]] = {everything, another}
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    another.cancel()
            assert await everything == [whole(stream) for stream in range(STREAMS)]
            assert client._connection.open_requests == 0

    asyncio.run(main())
