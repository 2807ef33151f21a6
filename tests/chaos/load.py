"""Streams whose every token is known beforehand."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

from tandem import AsyncClient, Completion, PositionLogprobs

from support.deadlines import DEADLINE_S

TIMEOUT_S = 3_600.0
"""Deadline of each request: all streams together get a few tokens each between two faults, on a busy machine too."""
LATE_S = 10.0
"""By so much a busy machine may miss it."""


@dataclass(frozen=True)
class Spec:
    """A request: what is asked for."""

    prompt: tuple[int, ...]
    sampling: dict[str, Any]


def specs(seed: int, count: int, vocab: int) -> list[Spec]:
    """Requests of all kinds: greedy and sampled, short and long, some with a stop token, some with shared prompts."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(4, vocab) for _ in range(40))
    made = []
    for i in range(count):
        own = tuple(rng.randrange(4, vocab) for _ in range(rng.randint(1, 60)))
        prompt = shared + own if i % 3 == 0 else own
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 0.8, "top_p": 0.9},
            {"temperature": 1.2, "top_k": 20},
            {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
            {"temperature": 1.0, "min_p": 0.02, "logprobs": 3},
        ]
        sampling = {**kinds[i % len(kinds)], "seed": 1_000 + i, "max_tokens": rng.randint(20, 160), "ignore_eos": True}
        if i % 5 == 0:
            sampling["stop_token_ids"] = [rng.randrange(4, vocab) for _ in range(3)]
        made.append(Spec(prompt, sampling))
    return made


async def undisturbed(address: str, wanted: list[Spec], **access: Any) -> list[Completion]:
    """What each request gets when nothing happens."""
    async with AsyncClient(address, connect_timeout=DEADLINE_S, **access) as client:
        return await asyncio.gather(*(client.generate(list(one.prompt), **one.sampling) for one in wanted))


@dataclass
class Turn:
    """A request of a stream, on its way."""

    client: AsyncClient
    stream: int
    which: int
    prompt: tuple[int, ...]
    begun_at: float
    """Loop times."""
    moved_at: float
    """When it last got a token, or began."""
    position: int = 0
    pauses: list[tuple[int, float]] = field(default_factory=list)
    """Where tokens came after over a second, and when."""
    is_reported: bool = False


@dataclass
class Load:
    """Streams that go on, each with one request after the other, until `stop`; every token is compared as it comes."""

    address: str
    wanted: list[Spec]
    expected: list[Completion]
    clients: int
    streams: int
    access: dict[str, Any] = field(default_factory=lambda: {"insecure": True})
    """How clients get in."""
    finished: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    turns: dict[int, Turn] = field(default_factory=dict)
    """By stream: what it is at."""
    reports: list[str] = field(default_factory=list)
    """Of requests that stood still for long; see watch.py."""
    longest_pause_s: float = 0.0
    """Without a token, of any stream."""
    stopping: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for i in range(self.clients):
                group.create_task(self._client(i))

    async def progress(self, tokens: int) -> None:
        """Waits until so many more tokens have come."""
        goal = self.tokens + tokens
        while self.tokens < goal and not self.wrong:
            self.news.clear()
            await self.news.wait()

    async def _client(self, index: int) -> None:
        async with AsyncClient(
            self.address,
            connect_timeout=DEADLINE_S,
            reconnect_timeout=DEADLINE_S,
            name=f"client {index}",
            **self.access,
        ) as client:
            own = range(index, self.streams, self.clients)
            async with asyncio.TaskGroup() as group:
                for stream in own:
                    group.create_task(self._stream(client, stream))
            if client._connection.open_requests:
                self.wrong.append(f"client {index} has {client._connection.open_requests} requests left")

    async def _stream(self, client: AsyncClient, stream: int) -> None:
        which = stream
        while not self.stopping:
            try:
                await self._request(client, stream, which % len(self.wanted))
            except Exception as error:  # noqa: BLE001 - whatever it is, nothing may fail
                self.complain(f"request {which % len(self.wanted)} of stream {stream}: {error!r}")
            which += self.streams + 1

    async def _request(self, client: AsyncClient, stream: int, which: int) -> None:
        spec, expected = self.wanted[which], self.expected[which].token_ids
        position, ends = 0, 0
        logprobs: list[PositionLogprobs] = []
        now = asyncio.get_running_loop().time()
        turn = self.turns[stream] = Turn(client, stream, which, spec.prompt, now, now)
        async with asyncio.timeout(TIMEOUT_S + LATE_S):
            async for chunk in client.stream(list(spec.prompt), timeout=TIMEOUT_S, **spec.sampling):
                if chunk.offset != position or chunk.token_ids != expected[position : position + len(chunk.token_ids)]:
                    self.complain(f"request {which}: at {chunk.offset} came {chunk.token_ids}, after {position}")
                position += len(chunk.token_ids)
                ends += chunk.finish_reason is not None
                logprobs += chunk.logprobs or ()
                self.tokens += len(chunk.token_ids)
                self._note(turn, position)
                self.news.set()
        if position != len(expected) or ends != 1:
            self.complain(f"request {which}: {position} tokens of {len(expected)}, ended {ends} times")
        if logprobs != (self.expected[which].logprobs or []):
            self.complain(f"request {which}: other log-probabilities")
        self.finished += 1
        del self.turns[stream]

    def _note(self, turn: Turn, position: int) -> None:
        now = asyncio.get_running_loop().time()
        pause = now - turn.moved_at
        if pause > 1.0:
            turn.pauses.append((turn.position, now))
        self.longest_pause_s = max(self.longest_pause_s, pause)
        turn.position, turn.moved_at = position, now

    def complain(self, what: str) -> None:
        self.wrong.append(what)
        self.news.set()
