"""Workers that leave a service under load, by `tandem drain` and by SIGTERM, and one that joins it: every stream gets
what it would have got."""

from __future__ import annotations

import asyncio
import fcntl
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem import AsyncClient
from tandem.protocol.messages import Stats, WorkerStats

from support.commands import Command, files_below, gone, tandem
from support.deadlines import DEADLINE_S

pytestmark = pytest.mark.thorough

STREAMS = 16
MAX_TOKENS = 150
Tokens = list[int]


@dataclass
class Service:
    """`tandem serve` with two workers, and what its streams get when nothing happens."""

    address: str
    serve: Command
    engine: list[str]
    expected: list[Tokens]

    def worker(self, name: str) -> psutil.Process:
        """The process of a worker of the launcher's."""
        (found,) = [one for one in self.serve.descendants() if f'"name":"{name}"' in " ".join(one.cmdline())]
        return found


@contextmanager
def serving(address: str, engine: list[str]) -> Iterator[Service]:
    engine = [*engine, "--batch-invariant", "--max-model-len", "512", "--max-num-seqs", "16"]
    with tandem(
        "serve", "--no-http", "--address", address, "--data-parallel-size", "2", *engine, environment={}
    ) as serve:
        serve.wait_for("Ctrl-C ends it.")
        assert serve.process.stdout is not None
        fcntl.fcntl(serve.process.stdout, fcntl.F_SETPIPE_SZ, 4_096)  # full at once, as nobody reads until the end
        yield Service(address, serve, engine, asyncio.run(_undisturbed(address)))
        serve.send(signal.SIGINT)
        assert serve.finish() == 0, serve.output


def _request(index: int) -> tuple[Tokens, dict[str, Any]]:
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}]
    sampling = {**kinds[index % 3], "seed": index, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    return list(range(5 + index, 15 + 3 * index)), sampling


async def _undisturbed(address: str) -> list[Tokens]:
    async with AsyncClient(address) as client, asyncio.timeout(DEADLINE_S):
        requests = [_request(index) for index in range(STREAMS)]
        answers = await asyncio.gather(*(client.generate(prompt, **sampling) for prompt, sampling in requests))
    return [list(one.token_ids) for one in answers]


class Load:
    """Streams that ask for the same again and again, and compare what comes."""

    def __init__(self, client: AsyncClient, expected: list[Tokens]) -> None:
        self._client = client
        self._expected = expected
        self._stopping = False
        self._tokens = [0] * len(expected)
        self._news = asyncio.Event()

    async def stream(self, index: int) -> None:
        prompt, sampling = _request(index)
        while not self._stopping:
            got: Tokens = []
            async for chunk in self._client.stream(prompt, **sampling):
                got += chunk.token_ids
                assert got == self._expected[index][: len(got)]
                self._tokens[index] += len(chunk.token_ids)
                self._news.set()
            assert len(got) == MAX_TOKENS

    async def all_get_on(self) -> None:
        """Until every stream has had another token."""
        before = list(self._tokens)
        while any(now <= then for now, then in zip(self._tokens, before, strict=True)):
            self._news.clear()
            await self._news.wait()

    async def wait(self, condition: Callable[[Stats], bool]) -> Stats:
        """Statistics for which the condition holds; asked for whenever a token has come."""
        while not condition(stats := await self._client.stats()):
            self._news.clear()
            await self._news.wait()
        return stats

    async def stats(self) -> Stats:
        return await self._client.stats()

    def stop(self) -> None:
        self._stopping = True


@asynccontextmanager
async def load(service: Service) -> AsyncIterator[Load]:
    """All streams run on both workers when this begins, and have ended when it is over."""
    async with AsyncClient(service.address) as client, asyncio.timeout(DEADLINE_S):
        made = Load(client, service.expected)
        async with asyncio.TaskGroup() as group:
            for index in range(STREAMS):
                group.create_task(made.stream(index))
            await made.all_get_on()
            await made.wait(lambda stats: [one.name for one in busy(stats)] == ["worker-0", "worker-1"])
            yield made
            made.stop()
        stats = await client.stats()
        assert (stats.running, stats.waiting) == (0, 0)


def busy(stats: Stats) -> list[WorkerStats]:
    return sorted((one for one in stats.workers if one.running), key=lambda one: one.name)


def test_workers_leave_and_join_under_load_and_no_token_is_lost(runtime: Path, engine: list[str]) -> None:
    with serving(f"ipc://{runtime}/mine", engine) as service:
        asyncio.run(_sigterm(service))
        asyncio.run(_drain_and_join(service))
        assert service.serve.output.count("worker-1 was ") == 1, "it is not started again"
    assert files_below(runtime) == []


async def _sigterm(service: Service) -> None:
    """A worker's streams go on elsewhere at once; another is started in its place and gets work."""
    async with load(service) as streams:
        process = service.worker("worker-1")
        before = await streams.stats()
        process.terminate()
        assert await asyncio.to_thread(gone, [process])
        await streams.all_get_on()
        await streams.wait(
            lambda stats: (
                stats.joined_workers > before.joined_workers
                and [one.name for one in busy(stats)] == ["worker-0", "worker-1"]
            )
        )
        await streams.all_get_on()
        after = await streams.stats()
        assert after.moved > before.moved
        assert after.lost_workers == before.lost_workers, "it left on purpose: nobody is suspected"


async def _drain_and_join(service: Service) -> None:
    async with load(service) as streams:
        process = service.worker("worker-1")
        await asyncio.to_thread(drained, service, "worker-1")
        assert await asyncio.to_thread(gone, [process])
        await streams.all_get_on()
        assert [one.name for one in (await streams.stats()).workers] == ["worker-0"]
        await asyncio.to_thread(service.serve.wait_for, "worker-1 was drained and has ended")

        arguments = ["worker", "--scheduler", service.address, "--name", "newcomer", *service.engine]
        with tandem(*arguments, environment={}) as newcomer:
            await streams.wait(lambda stats: [one.name for one in busy(stats)] == ["newcomer", "worker-0"])
            await streams.all_get_on()
            await asyncio.to_thread(drained, service, "newcomer")
            assert await asyncio.to_thread(newcomer.finish) == 0, newcomer.output
        await streams.all_get_on()
        assert [one.name for one in (await streams.stats()).workers] == ["worker-0"]


def drained(service: Service, name: str) -> None:
    """By the command."""
    with tandem("drain", name, "--connect", service.address, environment={}) as command:
        assert command.finish() == 0, command.output
        assert f"{name} is drained" in command.output
