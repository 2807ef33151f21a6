"""The prefix cache through real processes with the built-in model: what is not computed twice, and that nobody can tell
by the answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from tandem import AsyncClient

from support.observe import Observer, settled
from support.systems import embedded

BLOCK = 16
TURNS = 10
OPTIONS = {"device": "cpu", "batch_invariant": True, "max_model_len": 1_024, "max_num_seqs": 64}


@pytest.fixture(scope="module")
def cached() -> Iterator[str]:
    with embedded(OPTIONS) as system:
        yield system.address


@pytest.fixture(scope="module")
def uncached() -> Iterator[str]:
    with embedded(OPTIONS, {"enable_prefix_caching": False}) as system:
        yield system.address


async def chat(address: str) -> tuple[list[tuple[int, ...]], list[int]]:
    """The answers of a chat whose history is passed as token ids, and for each turn how many tokens were computed
    beyond the new ones."""
    answers, beyond = [], []
    async with AsyncClient(address) as client:
        history: list[int] = []
        for turn in range(TURNS):
            new = [20 + (turn * 7 + i) % 50 for i in range(5 + 3 * turn)]
            done = await client.generate(history + new, temperature=0.0, max_tokens=20, ignore_eos=True)
            answers.append(tuple(done.token_ids))
            beyond.append(done.usage.prompt_tokens - done.usage.cached_tokens - len(new))
            history += [*new, *done.token_ids]
    return answers, beyond


@pytest.mark.thorough
def test_each_turn_of_a_chat_computes_its_new_tokens_and_at_most_a_block(cached: str, uncached: str) -> None:
    answers, beyond = asyncio.run(chat(cached))
    assert all(tokens <= BLOCK for tokens in beyond)
    plain, recomputed = asyncio.run(chat(uncached))
    assert answers == plain
    assert recomputed[-1] > 300


def test_a_prefix_that_64_requests_share_is_computed_once(cached: str) -> None:
    prefix = [20 + i % 61 for i in range(512)]
    own = 5

    async def run() -> None:
        async with AsyncClient(cached) as client:
            prompts = [[*prefix, *(20 + (i * 3 + j) % 60 for j in range(own))] for i in range(64)]
            done = await client.generate(prompts, temperature=0.0, max_tokens=2, ignore_eos=True)
            assert sorted(one.usage.cached_tokens for one in done)[:2] == [0, 512]

    with contextlib.closing(Observer(cached)) as observer:
        before = observer.wait_until(settled)
        asyncio.run(run())
        after = observer.wait_until(settled)
    looked_up = after.looked_up_tokens - before.looked_up_tokens
    assert looked_up == 64 * (512 + own)
    assert looked_up - (after.cached_tokens - before.cached_tokens) == 512 + 64 * own
