"""Two real workers under streams: one is killed, then the other stops. Every token is that of the undisturbed run."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from chaos.load import Load, specs, undisturbed
from chaos.service import ChaosService, chaos_service

from tandem import AsyncClient

from support.asking import asked_until
from support.tiny_models import VOCAB, save_tiny

STREAMS = 12


# The chaos test, which always runs, does the same to two workers, and more.
@pytest.mark.slow
def test_streams_outlive_a_worker_that_is_killed_and_one_that_stops(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    logs = tmp_path / "logs"
    logs.mkdir()
    model = {
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 512,
    }
    with chaos_service(logs, model, 2) as service:
        asyncio.run(disturb(service))


async def disturb(service: ChaosService) -> None:
    wanted = specs(11, STREAMS, VOCAB)
    expected = await undisturbed(service.direct, wanted, **service.access)
    async with AsyncClient(service.direct, insecure=True) as observer:

        async def all_are_there() -> bool:
            return len((await observer.stats()).workers) == 2

        async def one_is_back() -> bool:
            assert not load.wrong
            return (await observer.stats()).restarted_workers == 1

        async def one_is_given_up() -> bool:
            assert not load.wrong
            return stopped.name not in {worker.name for worker in (await observer.stats()).workers}

        await asked_until(all_are_there)
        load = Load(service.address, wanted, expected, 1, STREAMS)
        running = asyncio.create_task(load.run())
        killed, stopped = service.workers
        await load.progress(10 * STREAMS)
        killed.send(signal.SIGKILL)
        await asked_until(one_is_back)
        await load.progress(10 * STREAMS)
        stopped.send(signal.SIGSTOP)
        await asked_until(one_is_given_up)
        load.stopping = True
        await running  # on what is left
        assert load.wrong == []
        found = await observer.stats()
        assert found.lost_workers == 2
        assert found.moved > 0
        assert found.poisoned == 0
        assert [worker.name for worker in found.workers] == [killed.name]
