"""Several times the load that a real system carries: who is refused is told so, who is accepted is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem import AsyncClient, Overloaded
from tandem.bench import overload
from tandem.client.results import Completion

from support.observe import Observer, settled
from support.systems import embedded
from support.tiny_models import save_tiny

pytestmark = pytest.mark.thorough

SLOTS = 4
WAITING = 6
ROUNDS = 5
TOKENS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    return str(folder)


@pytest.fixture(scope="module")
def address(model: str) -> Iterator[str]:
    options = {"model": model, "device": "cpu", "threads": 1, "max_model_len": 256, "max_num_seqs": SLOTS}
    with embedded(options, {"max_waiting_requests": WAITING}) as system:
        yield system.address


def test_refusals_are_typed_and_every_accepted_request_completes(address: str) -> None:
    """Bursts of four times what the system holds, from two clients. The next comes as soon as a request of the last has
    ended, so that places come free while others are refused."""
    with contextlib.closing(Observer(address)) as observer:
        check_refusals(address, observer)


def check_refusals(address: str, observer: Observer) -> None:
    before = observer.wait_until(settled)
    burst = 4 * (SLOTS + WAITING)

    async def run() -> list[Completion | BaseException]:
        async with AsyncClient(address) as one, AsyncClient(address) as two:

            async def ask(number: int) -> Completion:
                client = (one, two)[number % 2]
                return await client.generate([5 + number % 50, 6], temperature=0.0, max_tokens=TOKENS, ignore_eos=True)

            tasks: list[asyncio.Task[Completion]] = []
            for i in range(ROUNDS):
                new = [asyncio.create_task(ask(i * burst + j)) for j in range(burst)]
                tasks += new
                open_now = set(tasks)
                while not any(task.done() and task.exception() is None for task in new):
                    _, open_now = await asyncio.wait(open_now, return_when=asyncio.FIRST_COMPLETED)
                    if not open_now:
                        break
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    refusals = [one for one in answers if isinstance(one, BaseException)]
    completed = [one for one in answers if not isinstance(one, BaseException)]
    assert all(isinstance(one, Overloaded) and one.retry_after > 0 for one in refusals), refusals
    assert all(len(one.token_ids) == TOKENS and one.finish_reason == "length" for one in completed)
    assert len(refusals) >= burst - SLOTS - WAITING
    assert len(completed) >= SLOTS + WAITING

    after = observer.wait_until(settled)
    assert after.refused - before.refused == len(refusals)
    assert after.finished.get("length", 0) - before.finished.get("length", 0) == len(completed)


def test_a_list_of_prompts_waits_out_the_overload(address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            prompts = [[5 + i, 7] for i in range(3 * (SLOTS + WAITING))]
            done = await client.generate(prompts, temperature=0.0, max_tokens=4, ignore_eos=True)
            assert [len(one.token_ids) for one in done] == [4] * len(prompts)

    asyncio.run(run())


def test_the_benchmark_counts_what_the_scheduler_counts(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    sizes = ["--max-num-seqs", "4", "--max-waiting-requests", "4", "--output-tokens", "8", "--prompt-tokens", "8"]
    times = ["--seconds", "3", "--capacity-seconds", "1", "--factor", "6"]
    assert overload.main(["--model", model, *sizes, *times, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["refused"] == found["scheduler"]["refused"] > 0
    assert found["completed"] == found["accepted"] == found["scheduler"]["finished"] > 0
    assert {name.split()[0] for name in found["memory"]} >= {"client", "scheduler", "worker"}
    assert json.loads(capsys.readouterr().out)["refused"] == found["refused"]
