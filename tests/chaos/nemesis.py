"""Who does harm, and how: drawn from a seed, one after the other, each after the streams have got on again."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable

from chaos.load import Load
from chaos.service import ChaosService, Kept

from tandem import AsyncClient, TandemError

BETWEEN_TOKENS = 150
"""Of all streams together, that come between two faults."""


class Nemesis:
    """Does harm to one service."""

    def __init__(self, service: ChaosService, load: Load, seed: int) -> None:
        self._service = service
        self._load = load
        self._rng = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.log: list[str] = []

    async def run(self, faults: int) -> None:
        kinds: list[tuple[float, Callable[[], Awaitable[str]]]] = [
            (1.0, self._kill_worker),
            (1.0, self._stop_worker),
            (1.0, self._kill_scheduler),
            (1.0, self._stop_scheduler),
            (1.5, self._cut_clients),
            (1.5, self._cut_worker),
            (1.0, self._hold_clients),
            (1.0, self._hold_worker),
            (1.0, self._kill_client),
            (0.5, self._stop_client),
            (1.0, self._kill_gateway),
            (0.5, self._stop_gateway),
        ]
        while self.done.total() < faults and not self._load.wrong:
            await self._load.progress(self._rng.randint(1, BETWEEN_TOKENS))
            (fault,) = self._rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
            what = await fault()
            if what:
                self.done[fault.__name__.removeprefix("_")] += 1
                self.log.append(what)

    # --- processes ---------------------------------------------------------------------------------------------------

    async def _kill_worker(self) -> str:
        index = await self._spared()
        if index is None:
            return ""
        worker = self._service.workers[index]
        worker.send(signal.SIGKILL)
        return f"SIGKILL {worker.name}"

    async def _stop_worker(self) -> str:
        index = await self._spared()
        return "" if index is None else await self._pause(self._service.workers[index], 0.1, 8.0)

    async def _kill_scheduler(self) -> str:
        self._service.scheduler.send(signal.SIGKILL)
        return "SIGKILL scheduler"

    async def _stop_scheduler(self) -> str:
        return await self._pause(self._service.scheduler, 0.1, 8.0)

    async def _kill_client(self) -> str:
        if not self._service.victims:
            return ""
        victim = self._rng.choice(self._service.victims)
        victim.send(signal.SIGKILL)
        return f"SIGKILL {victim.name}"

    async def _stop_client(self) -> str:
        if not self._service.victims:
            return ""
        return await self._pause(self._rng.choice(self._service.victims), 0.5, 8.0)

    async def _kill_gateway(self) -> str:
        gateway = self._rng.choice(self._service.gateways)
        gateway.send(signal.SIGKILL)
        return f"SIGKILL {gateway.name}"

    async def _stop_gateway(self) -> str:
        return await self._pause(self._rng.choice(self._service.gateways), 0.5, 8.0)

    async def _pause(self, process: Kept, shortest: float, longest: float) -> str:
        seconds = self._rng.uniform(shortest, longest)
        process.send(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        process.send(signal.SIGCONT)
        return f"SIGSTOP {process.name} for {seconds:.1f} s"

    async def _spared(self) -> int | None:
        """The index of a worker that runs no suspect of another's death; None if there is none, if a request is to run
        alone, or if nobody can tell."""
        try:
            async with AsyncClient(self._service.direct, connect_timeout=5, **self._service.access) as client:
                found = await client.stats(timeout=5)
        except TandemError:
            return None
        suspected = {one.name for one in found.workers if one.suspects}
        spared = [i for i, worker in enumerate(self._service.workers) if worker.name not in suspected]
        return self._rng.choice(spared) if spared and not found.suspects else None

    # --- the network -------------------------------------------------------------------------------------------------

    async def _cut_clients(self) -> str:
        self._service.clients_proxy.cut()
        return "cut all clients"

    async def _cut_worker(self) -> str:
        index = await self._spared()
        if index is None:
            return ""
        self._service.worker_proxies[index].cut()
        return f"cut worker-{index}"

    async def _hold_clients(self) -> str:
        seconds = self._rng.uniform(0.1, 8.0)
        self._service.clients_proxy.hold()
        await asyncio.sleep(seconds)
        self._service.clients_proxy.release()
        return f"held all clients for {seconds:.1f} s"

    async def _hold_worker(self) -> str:
        index = await self._spared()
        if index is None:
            return ""
        seconds = self._rng.uniform(0.1, 8.0)
        self._service.worker_proxies[index].hold()
        await asyncio.sleep(seconds)
        self._service.worker_proxies[index].release()
        return f"held worker-{index} for {seconds:.1f} s"
