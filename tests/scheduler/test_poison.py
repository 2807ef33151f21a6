"""The poison rule over real sockets: the SDK, a real service, and workers that die of one request and are started
again."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import pytest

from tandem import AsyncClient, RequestFailed
from tandem.protocol.codec import encode
from tandem.protocol.messages import Goodbye, Idle, WorkerWelcome
from tandem.protocol.process import started_at
from tandem.protocol.sampling import sample_seed
from tandem.protocol.transport import Address

from support.deadlines import DEADLINE_S
from support.peers import VOCAB, Scene, ScriptedWorker, scene
from support.simulated_worker import continuation

POISON = [9, 9, 9]
INNOCENT = [[20 + i, i] for i in range(8)]
TOKENS = 45
"""Enough to be cleared of what they were suspected of."""
SEED = 11
NEVER_S = 3600.0
LEASE_S, IDLE_EVERY_S = 1.0, 0.1
"""Of those who hang, and of those who do not."""

Death = Literal["its process ends", "a step raises", "it hangs"]


class Hospital:
    """Two workers, each of which is started again when it has died of the poison."""

    def __init__(self, made: Scene, how: Death, processes: ExitStack) -> None:
        self.made, self.how = made, how
        self._processes = processes
        self.workers: dict[str, Mortal] = {}
        self.deaths: list[set[tuple[int, ...]]] = []
        """For each, the prompts in the step that was its last."""
        self.survivors: list[Mortal] = []
        """For each, the other worker."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, name: str) -> None:
        process = self._processes.enter_context(_process())
        self.workers[name] = worker = Mortal(self, name, process)
        await worker.hello()
        await worker.expect(WorkerWelcome)
        self._begin(worker.live())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def died(self, worker: Mortal, prompts: set[tuple[int, ...]]) -> None:
        self.deaths.append(prompts)
        self.survivors += [other for other in self.workers.values() if other is not worker]
        self._begin(self._restart(worker))

    async def _restart(self, worker: Mortal) -> None:
        match self.how:
            case "its process ends":
                worker.process.kill()
            case "a step raises":
                await worker.send(Goodbye(reason="RuntimeError: in a step", failed=True))
        await self.start(worker.greeting.name)

    async def all_there(self) -> None:
        for worker in list(self.workers.values()):
            await worker.expect(WorkerWelcome)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


class Mortal(ScriptedWorker):
    """Dies instead of computing the poison, and does nothing from then on."""

    def __init__(self, hospital: Hospital, name: str, process: subprocess.Popen[bytes]) -> None:
        """Only if its process is to be what ends does it name it."""
        made, named = hospital.made, hospital.how == "its process ends"
        watched: dict[str, Any] = {"pid": process.pid, "started": started_at(process.pid)} if named else {}
        endpoint = Address(made.worker_address).endpoint("workers")
        super().__init__(made.context, endpoint, instance=process.pid, name=name, files=(), **watched)
        made.peers.append(self)
        self.process = process
        self.is_dead = False
        self._hospital = hospital
        self._next_step = 0

    async def live(self) -> None:
        """Says that it has nothing to do, until it dies: it computes at once what it gets."""
        while not self.is_dead:
            assert self.welcome is not None
            registration, epoch = self.welcome.registration, self.welcome.epoch
            await self.send(Idle(epoch=epoch, registration=registration, step=self._next_step))
            await asyncio.sleep(IDLE_EVERY_S)

    def on_message(self, message: Any) -> None:
        if not self.is_dead:
            super().on_message(message)

    def compute(self) -> None:
        step, tokens = self.simulated.compute()
        self._next_step = step + 1
        prompts = {tuple(row[: 3 if row[:3] == POISON else 2]) for row in self.simulated.touched}
        if tuple(POISON) in prompts:
            self.is_dead = True
            self._hospital.died(self, prompts)
        else:
            self.socket.send([encode(self.result(step, tokens))])


@contextmanager
def _process() -> Iterator[subprocess.Popen[bytes]]:
    """Some process of this user's."""
    with subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"]) as made:
        try:
            yield made
        finally:
            made.kill()


@pytest.mark.parametrize(
    ("how", "lease_s"),
    [("its process ends", NEVER_S), ("a step raises", NEVER_S), ("it hangs", LEASE_S)],
)
def test_what_no_worker_survives_fails_and_harms_nobody(how: Death, lease_s: float) -> None:
    """Two workers that run others too die of it, then one that runs nothing else; no more."""

    async def script() -> None:
        with ExitStack() as processes:
            async with scene(worker_lease=lease_s) as made, asyncio.timeout(DEADLINE_S):
                hospital = Hospital(made, how, processes)
                try:
                    await asyncio.gather(*(hospital.start(name) for name in ("left", "right")))
                    async with AsyncClient(made.address) as client:
                        await run(hospital, client)
                finally:
                    hospital.close()

    asyncio.run(script())


async def run(hospital: Hospital, client: AsyncClient) -> None:
    *innocent, poisoned = await asyncio.gather(
        *(answer(client, prompt) for prompt in [*INNOCENT, POISON]), return_exceptions=True
    )
    assert isinstance(poisoned, RequestFailed)
    assert "a worker died while it ran this request and nothing else" in str(poisoned)
    assert innocent == [undisturbed(prompt) for prompt in INNOCENT]
    assert await answer(client, [7, 7]) == undisturbed([7, 7])
    await hospital.all_there()
    assert len(hospital.deaths) == 3
    assert hospital.deaths[-1] == {tuple(POISON)}
    survivor = hospital.survivors[-1]
    assert survivor is hospital.workers[survivor.greeting.name]
    stats = await client.stats()
    assert (stats.running, stats.waiting, len(stats.workers)) == (0, 0, 2)


async def answer(client: AsyncClient, prompt: list[int]) -> list[int]:
    sampling: dict[str, Any] = {"temperature": 0.0, "seed": SEED, "max_tokens": TOKENS, "ignore_eos": True}
    return list((await client.generate(prompt, **sampling)).token_ids)


def undisturbed(prompt: list[int]) -> list[int]:
    return continuation(prompt, len(prompt) + TOKENS, frozenset(), VOCAB, sample_seed(SEED, 0))[0]
