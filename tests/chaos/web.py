"""Streams over HTTP, through gateways that are killed under them: then they count as killed, and begin again."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
from chaos.load import LATE_S, TIMEOUT_S, Load, Spec
from chaos.service import Kept

from support.deadlines import DEADLINE_S

AGAIN_S = 0.2
"""After this a gateway that does not listen (yet), or has no service (yet), is asked again."""


@dataclass
class WebLoad:
    """Streams that go on, each with one request after the other through one of the gateways, until `load.stopping`. The
    requests are those of `load`, which also takes what is wrong."""

    load: Load
    gateways: list[Kept]
    urls: list[str]
    streams: int
    finished: int = 0
    killed: int = 0
    """Requests whose gateway was killed."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for i in range(self.streams):
                group.create_task(self._stream(i))

    async def ready(self) -> None:
        """Waits until every gateway has a service. TimeoutError after DEADLINE_S."""
        async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient(timeout=DEADLINE_S) as client:
            for url in self.urls:
                while True:
                    if await _is_well(client, url):
                        break
                    await asyncio.sleep(AGAIN_S)

    async def _stream(self, index: int) -> None:
        gateway, url = self.gateways[index % len(self.gateways)], self.urls[index % len(self.urls)]
        which = index
        async with httpx.AsyncClient(timeout=None) as client:
            while not self.load.stopping:
                life = gateway.started
                try:
                    async with asyncio.timeout(TIMEOUT_S + LATE_S):
                        done = await self._request(client, url, which % len(self.load.wanted))
                except httpx.ConnectError:
                    done = False  # it is being started
                except (httpx.TransportError, TimeoutError) as error:
                    done = True
                    if not await _has_ended(gateway, life):
                        self.load.complain(f"request {which} over {gateway.name}, which was not killed: {error!r}")
                    self.killed += 1
                if done:
                    which += self.streams + 1
                else:
                    await asyncio.sleep(AGAIN_S)

    async def _request(self, client: httpx.AsyncClient, url: str, which: int) -> bool:
        """False if it was not accepted."""
        expected = self.load.expected[which].token_ids
        position, ends, last = 0, 0, ""
        async with client.stream("POST", f"{url}/v1/completions", json=_body(self.load.wanted[which])) as answer:
            if answer.status_code == 503:
                return False
            if answer.status_code != 200:
                self.load.complain(f"request {which} over HTTP: {answer.status_code} {await answer.aread()!r}")
                return True
            async for line in answer.aiter_lines():
                last = line.removeprefix("data: ") or last
                if last != line and last != "[DONE]" and line:
                    found = json.loads(last)
                    if "error" in found:
                        self.load.complain(f"request {which} over HTTP: {found}")
                        return True
                    (choice,) = found["choices"]
                    ids = choice["token_ids"]
                    if ids != expected[position : position + len(ids)]:
                        self.load.complain(f"request {which} over HTTP: after {position} came {ids}")
                    position += len(ids)
                    ends += choice["finish_reason"] is not None
        if (position, ends, last) != (len(expected), 1, "[DONE]"):
            self.load.complain(
                f"request {which} over HTTP: {position} tokens of {len(expected)}, ended {ends} times, last {last!r}"
            )
        self.finished += 1
        return True


def _body(spec: Spec) -> dict[str, Any]:
    """Log-probabilities are compared by those who come without HTTP."""
    sampling = {name: value for name, value in spec.sampling.items() if name != "logprobs"}
    return {"prompt": list(spec.prompt), "stream": True, "return_token_ids": True, **sampling}


async def _has_ended(gateway: Kept, life: int) -> bool:
    """Whether the process that was started as the `life`th ends, or has. A process that dies closes its connections
    before it is gone, and takes new ones in between."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if gateway.started > life:
                    return True
                await asyncio.sleep(AGAIN_S)
    except TimeoutError:
        return False


async def _is_well(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/health")).status_code == 200
    except httpx.TransportError:
        return False
