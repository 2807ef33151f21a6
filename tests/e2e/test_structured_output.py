"""Structured output through a whole system: exactly what a plain loop gives, whatever happens to the batch; and
hostile grammars, which harm nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from tandem import AsyncClient, InvalidRequest, RequestFailed, StructuredOutputsParams
from tandem.protocol.messages import Submit, Tokens, Welcome
from tandem.protocol.sampling import SamplingParams

from support.grids import one_of
from support.hostile_grammars import HOSTILE
from support.observe import Observer, run_until_preempted, settled
from support.peers import ScriptedClient
from support.structured import GRAMMARS, Constrained, constrained_requests, reference
from support.systems import embedded
from support.tiny_models import VOCAB, save_tiny
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


@pytest.mark.parametrize("lookahead", one_of([0, 1, 2], 2))
def test_a_crowd_gets_what_a_plain_loop_gives_with_preemptions(case: Case, lookahead: int) -> None:
    async def run(address: str) -> list[list[int]]:
        async with AsyncClient(address) as client:
            return await send_staggered(client, case.requests)

    with embedded(options(case, lookahead=lookahead, num_gpu_blocks_override=24)) as system:

        def attempt() -> None:
            assert asyncio.run(run(system.address)) == case.expected

        run_until_preempted(system.address, attempt)
    assert {len(tokens) < wanted.max_tokens for tokens, wanted in zip(case.expected, case.requests, strict=True)} == {
        True,
        False,
    }


@pytest.fixture(scope="module")
def address(case: Case) -> Iterator[str]:
    with embedded(options(case)) as system:
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


def sampled_requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Those that follow a grammar beside those that do not, with parameters that take tokens away as well."""
    rng = random.Random(8)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "min_tokens": 12},
        {"temperature": 1.3, "top_k": 20, "frequency_penalty": 0.5},
        {"temperature": 1.0, "allowed_token_ids": [*range(20, 60)], "logprobs": 2},
    ]
    structured = list(GRAMMARS.values())
    return [
        (
            [rng.randrange(4, VOCAB) for _ in range(rng.randint(17, 30))],
            {**kinds[i % 4], "structured_outputs": structured[i % 7], "seed": 70 + i, "max_tokens": 20},
        )
        for i in range(8)
    ]


@pytest.mark.thorough
def test_sampled_tokens_do_not_depend_on_the_batch(case: Case) -> None:
    async def run(address: str, at_once: int) -> list[list[int]]:
        turn = asyncio.Semaphore(at_once)

        async def one(client: AsyncClient, prompt: list[int], sampling: dict[str, Any]) -> list[int]:
            async with turn:
                return list((await client.generate(prompt, **sampling)).token_ids)

        async with AsyncClient(address) as client:
            return await asyncio.gather(*(one(client, *request) for request in sampled_requests()))

    with embedded(options(case, batch_invariant=True, lookahead=0)) as system:
        expected = asyncio.run(run(system.address, at_once=1))
    with embedded(options(case, batch_invariant=True, lookahead=2, num_gpu_blocks_override=16)) as system:

        def attempt() -> None:
            assert asyncio.run(run(system.address, at_once=8)) == expected

        run_until_preempted(system.address, attempt)


@pytest.mark.thorough
def test_hostile_grammars_harm_nobody_else(address: str, case: Case) -> None:
    """Eight streams, over and over, beside a client that sends every grammar of the list: each stream gets exactly its
    tokens, and each hostile request an answer."""
    over = asyncio.Event()

    async def stream(client: AsyncClient, index: int) -> int:
        rounds = 0
        while not over.is_set():
            wanted = case.requests[index]
            done = await client.generate(list(wanted.prompt), **wanted.sampling())
            assert done.token_ids == case.expected[index]
            rounds += 1
        return rounds

    async def attack(client: AsyncClient, wanted: StructuredOutputsParams) -> str:
        try:
            await client.generate([5, 6, 7], structured_outputs=wanted, max_tokens=6, temperature=0.0)
        except InvalidRequest as error:
            return "refused" if error.field.startswith("structured_outputs.") else f"refused for {error.field}"
        except RequestFailed as error:
            return "failed" if str(error).startswith("structured_outputs: ") else str(error)
        return "answered"

    async def run() -> list[str]:
        async with AsyncClient(address) as client, AsyncClient(address, name="hostile") as hostile:
            streams = [asyncio.create_task(stream(client, index)) for index in range(8)]
            answers = await asyncio.gather(*(attack(hostile, wanted) for wanted, _ in HOSTILE.values()))
            over.set()
            assert min(await asyncio.gather(*streams)) >= 1
        return answers

    answers = dict(zip(HOSTILE, asyncio.run(run()), strict=True))
    assert {name for name, (_, story) in HOSTILE.items() if story and answers[name] != "refused"} == set()
    assert set(answers.values()) <= {"refused", "failed", "answered"}
    with contextlib.closing(Observer(address)) as observer:
        observer.wait_until(settled)


def test_a_grammar_that_meets_a_limit_later_fails_its_own_request(address: str, case: Case) -> None:
    """It passes the trial, which follows it for some tokens only."""
    doubling = "\n".join(f"t{i}: t{i + 1} t{i + 1}" for i in range(40))
    late = f'start: /[qr]{{40}}/ t0\n{doubling}\nt40: "a"'

    async def run() -> None:
        async with AsyncClient(address) as client:
            others = [
                asyncio.create_task(client.generate(list(wanted.prompt), **wanted.sampling()))
                for wanted in case.requests[:4]
            ]
            with pytest.raises(RequestFailed, match="the grammar cannot be followed any further: .*items"):
                await client.generate([5], structured_outputs={"grammar": late}, max_tokens=60, temperature=0.0)
            assert [(await other).token_ids for other in others] == case.expected[:4]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"structured_outputs": {}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 65_537}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["ab" * 20_000, "cd" * 20_000]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs.disable_any"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(address: str, sampling: dict[str, Any], field: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(InvalidRequest) as caught:
                await client.generate([5], temperature=0.0, **sampling)
            assert caught.value.field.startswith(field)

    asyncio.run(run())
