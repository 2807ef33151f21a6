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

from tandem import AsyncClient
from tandem.launch.builtin import MODEL_DIR
from tandem.protocol.messages import Stats

from support.tiny_models import VOCAB, save_tiny

FAULTS = int(os.environ.get("TANDEM_CHAOS_FAULTS", "12"))
SEED = int(os.environ.get("TANDEM_CHAOS_SEED", "1"))
STREAMS = 64
CLIENTS = 4
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


MODELS = {"tiny": (tiny, 2), "builtin": (builtin, 3)}


@pytest.mark.timeout(180 + 15 * FAULTS)
@pytest.mark.parametrize("name", ["tiny", pytest.param("builtin", marks=pytest.mark.slow)])
def test_every_stream_is_what_it_would_have_been(name: str, tmp_path: Path) -> None:
    make, workers = MODELS[name]
    model, vocab = make(tmp_path / "model")
    logs = tmp_path / "logs"
    logs.mkdir()
    with chaos_service(logs, model, workers) as service:
        try:
            asyncio.run(storm(service, vocab))
        except BaseException:
            print(service.logs())
            raise


async def storm(service: ChaosService, vocab: int) -> None:
    wanted = specs(SEED, STREAMS, vocab)
    expected = await undisturbed(service.direct, wanted)  # a proxy with nobody behind it is no service
    assert len({tuple(completion.token_ids) for completion in expected}) == len(expected)
    assert any(completion.logprobs for completion in expected)
    await settled(service)
    before = own_descriptors(), service.scheduler.descriptors(), service.scheduler.memory()

    for _ in range(2):
        service.add_victim(4)
    load = Load(service.address, wanted, expected, CLIENTS, STREAMS)
    running = asyncio.create_task(load.run())
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
        f"longest pause of a stream {load.longest_pause_s:.1f} s"
    )
    print("\n".join(load.reports))
    assert not load.wrong, "\n".join([*load.wrong[:20], *load.reports[:20], *nemesis.log])
    assert load.finished >= STREAMS
    found = await settled(service)
    assert len(found.workers) == len(service.workers)
    assert found.poisoned == 0
    assert own_descriptors() <= before[0]
    async with asyncio.timeout(30):
        while True:  # it may still have to notice who has just gone
            if service.scheduler.descriptors() <= before[1]:
                break
            await asyncio.sleep(0.1)
    assert service.scheduler.memory() <= before[2] + MORE_MEMORY


async def settled(service: ChaosService) -> Stats:
    """Waits until nothing runs or waits, every worker is there, and every block is free: requests of clients that were
    killed are over a lease later. Connections that ended take the time of a heartbeat to be noticed."""
    async with AsyncClient(service.direct, insecure=True, connect_timeout=60) as client:
        async with asyncio.timeout(60 + 2 * CLIENT_LEASE_S):
            while True:
                found = await client.stats()
                free = all(worker.free_blocks == worker.num_blocks for worker in found.workers)
                if free and not found.running + found.waiting and len(found.workers) == len(service.workers):
                    return found
                await asyncio.sleep(0.1)
