"""Samples, deadlines and prefixes through real processes: who shares what, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from tandem import AsyncClient, Completion, InvalidRequest, RequestTimeout
from tandem.protocol.messages import Stats
from tandem.protocol.sampling import sample_seed

from support.observe import Observer, settled
from support.systems import embedded
from support.tiny_models import VOCAB, save_tiny

BLOCK = 8
PROMPT = [7 + index % 50 for index in range(4 * BLOCK + 3)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    options = {
        "model": str(folder),
        "device": "cpu",
        "batch_invariant": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 512,
    }
    with embedded(options) as system:
        yield system.address


@pytest.fixture
def observer(address: str) -> Iterator[Observer]:
    with contextlib.closing(Observer(address)) as watching:
        yield watching


def all_blocks_are_back(stats: Stats) -> bool:
    return settled(stats) and all(worker.free_blocks == worker.num_blocks for worker in stats.workers)


def test_samples_are_what_each_would_be_alone_and_share_the_prompt(address: str, observer: Observer) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            before = observer.stats()
            done = await client.generate(PROMPT, n=5, seed=11, temperature=1.0, max_tokens=12, ignore_eos=True)
            after = observer.stats()
            assert len({tuple(choice.token_ids) for choice in done.choices}) == 5
            # All but the prompt's last block is there for every sample that comes after the first.
            assert after.cached_tokens - before.cached_tokens >= 4 * (4 * BLOCK)
            again = await client.generate(PROMPT, n=2, seed=11, temperature=1.0, max_tokens=12, ignore_eos=True)
            assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in done.choices[:2]]
            for choice in done.choices:
                alone = await client.generate(
                    PROMPT, seed=sample_seed(11, choice.index), temperature=1.0, max_tokens=12, ignore_eos=True
                )
                assert alone.token_ids == choice.token_ids

    asyncio.run(run())
    observer.wait_until(all_blocks_are_back)


def test_a_salt_keeps_prefixes_apart(address: str) -> None:
    async def run() -> None:
        prompt = [60 + index % 40 for index in range(5 * BLOCK)]
        async with AsyncClient(address) as client:
            first = await client.generate(prompt, temperature=0.0, max_tokens=3, cache_salt="a")
            same = await client.generate(prompt, temperature=0.0, max_tokens=3, cache_salt="a")
            other = await client.generate(prompt, temperature=0.0, max_tokens=3, cache_salt="b")
            assert first.usage.cached_tokens == other.usage.cached_tokens == 0
            assert same.usage.cached_tokens == 4 * BLOCK  # never all of a prompt
            assert first.token_ids == same.token_ids == other.token_ids

    asyncio.run(run())


def test_a_deadline_ends_running_and_waiting_requests_with_what_they_have(address: str, observer: Observer) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            # More than fit at once, each far longer than its time: the first one in which this machine makes a token.
            timeout, partial = 0.3, list[Completion]()
            while not any(one.token_ids for one in partial):
                timeout *= 2
                calls = [
                    client.generate([5 + index], temperature=0.0, max_tokens=1_000, ignore_eos=True, timeout=timeout)
                    for index in range(12)
                ]
                ends = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(end, RequestTimeout) for end in ends)
                partial = [end.completion for end in ends if isinstance(end, RequestTimeout) and end.completion]
            assert [one.finish_reason for one in partial] == ["timeout"] * len(calls)
            some = next(one for one in partial if one.token_ids)
            alone = await client.generate(
                some.prompt_token_ids, temperature=0.0, max_tokens=len(some.token_ids), ignore_eos=True
            )
            assert alone.token_ids == some.token_ids

    asyncio.run(run())
    observer.wait_until(all_blocks_are_back)


def test_letting_go_of_samples_frees_them_all(address: str, observer: Observer) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            async with client.stream(PROMPT, n=6, temperature=1.0, max_tokens=1_000, ignore_eos=True) as stream:
                for _ in range(9):
                    chunk = await anext(stream)
                    assert 0 <= chunk.index < 6
            observer.wait_until(all_blocks_are_back)

    asyncio.run(run())


def test_more_samples_than_the_service_allows_are_refused(address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(InvalidRequest, match="n is 200, over the limit of 128") as caught:
                await client.generate([1, 2], n=200, temperature=1.0)
            assert (caught.value.field, caught.value.limit, caught.value.value) == ("n", 128, 200)
            assert (await client.generate([VOCAB - 1], temperature=0.0, max_tokens=1, priority=-5)).token_ids

    asyncio.run(run())
