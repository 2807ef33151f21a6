"""One system, many kinds of requests: borders, refusals, cancelling, large messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tandem import AsyncClient, InvalidRequest, RequestCancelled

from support.observe import Observer, settled
from support.systems import embedded
from support.tiny_models import VOCAB, save_tiny

MAX_MODEL_LEN = 900


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    options = {
        "model": str(folder),
        "device": "cpu",
        "threads": 1,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 32_768,
        "lookahead": 2,
    }
    with embedded(options) as system:
        yield system.address


def everything_is_free(address: str) -> None:
    with contextlib.closing(Observer(address)) as observer:
        observer.wait_until(settled)


@pytest.mark.parametrize("length", [1, MAX_MODEL_LEN - 2, MAX_MODEL_LEN - 1])
def test_prompts_at_the_border_of_the_context_are_taken(address: str, length: int) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            done = await client.generate([5] * length, temperature=0.0, max_tokens=2, ignore_eos=True)
            assert len(done.token_ids) == min(2, MAX_MODEL_LEN - length)
            assert done.finish_reason == "length"
            assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (length, len(done.token_ids))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], {}, "prompt"),
        ([5] * MAX_MODEL_LEN, {}, "prompt"),
        ([5] * (MAX_MODEL_LEN + 1), {}, "prompt"),
        ([5, VOCAB], {}, "prompt"),
        ([5, -1], {}, "prompt"),
        ([5], {"temperature": -0.1}, "temperature"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p"),
        ([5], {"top_p": 1.1}, "top_p"),
        ([5], {"top_k": -2}, "top_k"),
        ([5], {"max_tokens": 0}, "max_tokens"),
        ([5], {"seed": -1}, "seed"),
        ([5], {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ([5], {"stop_token_ids": list(range(129))}, "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused_by_name_and_disturb_nobody(
    address: str, prompt: list[int], sampling: dict[str, Any], field: str
) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            good = asyncio.create_task(client.generate([7, 8], temperature=0.0, max_tokens=20, ignore_eos=True))
            with pytest.raises(InvalidRequest) as caught:
                await client.generate(prompt, **sampling)
            assert caught.value.field.startswith(field)
            assert len((await good).token_ids) == 20

    asyncio.run(run())
    everything_is_free(address)


def test_an_unknown_sampling_parameter_is_refused_by_name(address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            with pytest.raises((InvalidRequest, TypeError), match="temprature"):
                await client.generate([5], temprature=0.5)

    asyncio.run(run())


def test_cancelling_with_steps_in_flight_frees_everything_and_the_same_prompt_runs_again(address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            prompt = list(range(10, 30))
            whole = (await client.generate(prompt, temperature=0.0, max_tokens=40, ignore_eos=True)).token_ids
            for taken in (1, 2, 5):
                stream = client.stream(prompt, temperature=0.0, max_tokens=800, ignore_eos=True)
                seen: list[int] = []
                while len(seen) < taken:
                    seen += (await anext(stream)).token_ids
                client.cancel(stream)
                with pytest.raises(RequestCancelled):
                    await stream.result()
                assert seen[:40] == list(whole[: len(seen[:40])])
                again = await client.generate(prompt, temperature=0.0, max_tokens=40, ignore_eos=True)
                assert again.token_ids == whole

    asyncio.run(run())
    everything_is_free(address)


def test_a_client_that_vanishes_frees_its_requests(address: str) -> None:
    async def run() -> None:
        client = AsyncClient(address)
        await client.connect()
        streams = [client.stream([20 + i], temperature=0.0, max_tokens=800, ignore_eos=True) for i in range(8)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        await client.close()

    asyncio.run(run())
    everything_is_free(address)


def test_messages_over_64_kib_arrive_whole(address: str) -> None:
    """24 long prompts sent at once join in plans of over 64 KiB, from which size on pyzmq may send without copying."""

    async def run() -> None:
        async with AsyncClient(address) as client:
            prompts = [[4 + (i * 31 + j) % (VOCAB - 4) for j in range(800)] for i in range(24)]
            alone = [await client.generate(p, temperature=0.0, max_tokens=4, ignore_eos=True) for p in prompts[:6]]
            crowd = await client.generate(prompts, temperature=0.0, max_tokens=4, ignore_eos=True)
            assert [one.token_ids for one in crowd[:6]] == [one.token_ids for one in alone]
            assert all(len(one.token_ids) == 4 for one in crowd)

    asyncio.run(run())
    everything_is_free(address)
