"""Structured output through a whole system: exactly what a plain loop gives, whatever happens to the batch; and
hostile grammars, which harm nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from tandem import AsyncClient
from tandem.launch.embedded import EmbeddedSystem
from tandem.protocol.messages import Submit, Tokens, Welcome
from tandem.protocol.sampling import SamplingParams

from support.observe import Observer, settled
from support.peers import ScriptedClient
from support.structured import Constrained, constrained_requests, reference
from support.tiny_models import save_tiny
from support.workload import send_staggered

MAX_MODEL_LEN = 128


@dataclass(frozen=True)
class Case:
    folder: Path
    requests: list[Constrained]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("llama")
    model = save_tiny("llama", folder)
    requests = constrained_requests(21, seed=3, longest=60, most=40)
    return Case(folder, requests, [reference(model, folder, wanted) for wanted in requests])


def options(case: Case, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(case.folder),
        "device": "cpu",
        "threads": 1,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 48,
        "block_size": 8,
        **changes,
    }


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_crowd_gets_what_a_plain_loop_gives_with_preemptions(case: Case, lookahead: int) -> None:
    async def run(address: str) -> list[list[int]]:
        async with AsyncClient(address) as client:
            return await send_staggered(client, case.requests)

    with EmbeddedSystem(options(case, lookahead=lookahead, num_gpu_blocks_override=24)) as system:
        got = asyncio.run(run(system.address))
        observer = Observer(system.address)
        stats = observer.wait_until(settled)
        observer.close()
    assert got == case.expected
    assert stats.preemptions > 0
    assert {len(tokens) < wanted.max_tokens for tokens, wanted in zip(got, case.requests, strict=True)} == {True, False}


@pytest.fixture(scope="module")
def address(case: Case) -> Iterator[str]:
    with EmbeddedSystem(options(case)) as system:
        yield system.address


def test_a_resumption_goes_on_where_the_grammar_stands(address: str, case: Case) -> None:
    """Cut in the midst, by a client that holds what has come."""

    async def run() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        client = ScriptedClient(context, f"{address}/clients")
        try:
            await client.hello()
            await client.wait(lambda: next((m for m in client.got if isinstance(m, Welcome) and m.model), None))
            cuts = [(w, e, cut) for w, e in zip(case.requests, case.expected, strict=True) for cut in {1, len(e) // 2}]
            for ticket, (wanted, expected, cut) in enumerate(cuts):
                await client.send(
                    Submit(
                        ticket=ticket,
                        prompt=np.array(wanted.prompt, np.int32),
                        generated=np.array(expected[:cut], np.int32),
                        sampling=SamplingParams(**wanted.sampling()),
                    )
                )
                await client.wait(partial(client.ended, ticket))
                assert tokens_of(client, ticket) == expected[cut:]
        finally:
            client.close()
            context.term()

    asyncio.run(run())


def tokens_of(client: ScriptedClient, ticket: int) -> list[int]:
    """All that have come for a ticket."""
    found: list[int] = []
    for message in client.got:
        if isinstance(message, Tokens):
            pieces = np.split(message.token, np.cumsum(message.count)[:-1]) if len(message.count) else []
            for owner, piece in zip(message.ticket.tolist(), pieces, strict=True):
                found += piece.tolist() if owner == ticket else []
    return found
