"""64 streams while processes are killed and stopped, connections cut and held: every token as if nothing had happened.

`make chaos` runs it with 200 faults or more; TANDEM_CHAOS_FAULTS and TANDEM_CHAOS_SEED choose others.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from chaos.load import Load, specs, undisturbed
from chaos.nemesis import Nemesis
from chaos.service import CLIENT_LEASE_S, ChaosService, chaos_service, own_descriptors
from chaos.watch import watch
from chaos.web import WebLoad

from tandem import AsyncClient
from tandem.launch.builtin import MODEL_DIR
from tandem.launch.keys import ROLES, KeyDirectory
from tandem.protocol.messages import Stats

from support.deadlines import DEADLINE_S
from support.tiny_models import VOCAB, save_tiny

FAULTS = int(os.environ.get("TANDEM_CHAOS_FAULTS", "72"))
SEED = int(os.environ.get("TANDEM_CHAOS_SEED", "1"))
STREAMS = 64
CLIENTS = 4
GATEWAYS = 2
WEB_STREAMS = 8
MORE_MEMORY = 128 * 1024 * 1024
"""Bytes that a process may have grown by, for what it keeps on purpose: logs, caches, arenas."""

LIMITS: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 48,
    "max_num_batched_tokens": 512,
    "num_gpu_blocks_override": 512,
}


def tiny(folder: Path) -> tuple[dict[str, Any], int]:
    save_tiny("llama", folder)
    return {"model": str(folder), "dtype": "float32", **LIMITS}, VOCAB


def builtin(_: Path) -> tuple[dict[str, Any], int]:
    return {"model": str(MODEL_DIR), **LIMITS}, 500


VARIANTS = {"tiny": (tiny, 2, False), "curve": (tiny, 2, True), "builtin": (builtin, 3, False)}
"""The model, how many workers, and whether keys are used."""


def make_keys(folder: Path) -> Path:
    directory = KeyDirectory(folder, make=True)
    directory.create_server()
    for port in ROLES.values():
        directory.create(port, "default")
    return folder


@pytest.mark.timeout(900 + 60 * FAULTS)
@pytest.mark.parametrize(
    "name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("curve", "builtin"))]
)
def test_every_stream_is_what_it_would_have_been(name: str, tmp_path: Path) -> None:
    make, workers, with_keys = VARIANTS[name]
    model, vocab = make(tmp_path / "model")
    keys = make_keys(tmp_path / "keys") if with_keys else None
    logs = tmp_path / "logs"
    logs.mkdir()
    with chaos_service(logs, model, workers, GATEWAYS, keys) as service:
        try:
            asyncio.run(storm(service, vocab))
        except BaseException:
            print(service.logs())
            raise


async def storm(service: ChaosService, vocab: int) -> None:
    wanted = specs(SEED, STREAMS, vocab)
    expected = await undisturbed(service.direct, wanted, **service.access)
    assert len({tuple(completion.token_ids) for completion in expected}) == len(expected)
    assert any(completion.logprobs for completion in expected)
    load = Load(service.address, wanted, expected, CLIENTS, STREAMS, service.access)
    web = WebLoad(load, service.gateways, service.gateway_urls, WEB_STREAMS)
    await web.ready()
    await settled(service)
    before = own_descriptors(), service.scheduler.descriptors(), service.scheduler.memory()

    for _ in range(2):
        service.add_victim(4)
    running = asyncio.gather(load.run(), web.run())
    nemesis = Nemesis(service, load, SEED)
    watching = asyncio.create_task(watch(service, load, nemesis.log))
    await nemesis.run(FAULTS)
    await load.progress(10 * STREAMS)  # nobody hangs at the end either
    load.stopping = True
    await running
    watching.cancel()
    service.stop_victims()

    print(
        f"{sum(nemesis.done.values())} faults: {dict(nemesis.done)}; {load.finished} requests, {load.tokens} tokens; "
        f"longest pause of a stream {load.longest_pause_s:.1f} s; over HTTP {web.finished} requests, and "
        f"{web.killed} whose gateway was killed"
    )
    print("\n".join(load.reports))
    assert not load.wrong, "\n".join([*load.wrong[:20], *load.reports[:20], *nemesis.log])
    assert load.finished >= STREAMS
    assert web.finished >= WEB_STREAMS
    assert all(gateway.started <= gateway.killed + 1 for gateway in service.gateways)
    found = await settled(service)
    assert len(found.workers) == len(service.workers)
    assert found.poisoned == 0
    async with asyncio.timeout(DEADLINE_S):
        while True:  # they may still have to notice who has just gone; the proxies are in this process
            if own_descriptors() <= before[0] and service.scheduler.descriptors() <= before[1]:
                break
            await asyncio.sleep(0.1)
    assert service.scheduler.memory() <= before[2] + MORE_MEMORY


async def settled(service: ChaosService) -> Stats:
    """Waits until nothing runs or waits, every worker is there, and every block is free: requests of clients that were
    killed are over a lease later. Connections that ended take the time of a heartbeat to be noticed."""
    async with AsyncClient(service.direct, connect_timeout=DEADLINE_S, **service.access) as client:
        async with asyncio.timeout(DEADLINE_S + 2 * CLIENT_LEASE_S):
            while True:
                found = await client.stats()
                free = all(worker.free_blocks == worker.num_blocks for worker in found.workers)
                if free and not found.running + found.waiting and len(found.workers) == len(service.workers):
                    return found
                await asyncio.sleep(0.1)
