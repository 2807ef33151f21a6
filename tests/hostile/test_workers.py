"""Workers that lie, with a key that is admitted: they lose their registration, and nobody else loses anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tandem.protocol.codec import encode
from tandem.protocol.messages import (
    MAX_BLOCKS,
    MAX_CONTEXT,
    MAX_SLOTS,
    FileChunk,
    FileInfo,
    Goodbye,
    Idle,
    StepResult,
    UnknownPeer,
    WorkerWelcome,
)

from support.peers import MODEL, VOCAB, ScriptedWorker
from support.siege import Siege

INT_MAX = 2**31 - 1


async def with_a_plan(siege: Siege) -> tuple[ScriptedWorker, Any]:
    """A liar that has been given a step of a request; and its honest result."""
    liar = siege.liar()
    await liar.hello()
    await liar.expect(WorkerWelcome)
    victim = siege.client()
    await victim.hello()
    for ticket in range(12):
        await victim.submit(ticket, [7, ticket], max_tokens=8)
    await liar.wait(lambda: liar.simulated.plans)
    step, tokens = liar.simulated.compute()
    return liar, liar.result(step, tokens)


def tokens(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


EXPELLED: dict[str, Callable[[StepResult], StepResult]] = {
    "of a later step": lambda honest: replace(honest, step=honest.step + 1),
    "of a step in 2^62": lambda honest: replace(honest, step=2**62),
    "a token too many": lambda honest: replace(honest, token=np.append(honest.token, tokens(1))),
    "a token too few": lambda honest: replace(honest, token=honest.token[:-1]),
    "no tokens": lambda honest: replace(honest, token=tokens()),
    "a million tokens": lambda honest: replace(honest, token=np.zeros(1_000_000, np.int32)),
    "a token beyond the vocabulary": lambda honest: replace(honest, token=np.full_like(honest.token, VOCAB)),
    "a negative token": lambda honest: replace(honest, token=np.full_like(honest.token, -1)),
    "the largest token": lambda honest: replace(honest, token=np.full_like(honest.token, INT_MAX)),
}


@pytest.mark.parametrize("lie", EXPELLED)
def test_a_lie_about_a_step_ends_the_registration(siege: Siege, lie: str) -> None:
    async def attack(siege: Siege) -> None:
        liar, honest = await with_a_plan(siege)
        await liar.send(EXPELLED[lie](honest))
        assert (await liar.expect(Goodbye)).final
        await liar.send(honest)  # too late: nobody of that name is known
        await liar.expect(UnknownPeer)

    siege.run(siege.endure(attack))


DROPPED: dict[str, Callable[[StepResult], Any]] = {
    "another scheduler's epoch": lambda honest: replace(honest, epoch=1),
    "an epoch of the future": lambda honest: replace(honest, epoch=2**63 - 1),
    "another's registration": lambda honest: replace(honest, registration=1),
    "a registration that never was": lambda honest: replace(honest, registration=10**9),
    "idle in another's name": lambda honest: Idle(epoch=honest.epoch, registration=1, step=0),
    "a file that nobody asked for": lambda honest: FileChunk(name="tokenizer.json", offset=0, data=b"evil"),
    "absurd times": lambda honest: replace(honest, busy_us=INT_MAX, gap_us=INT_MAX),
}


@pytest.mark.parametrize("lie", DROPPED)
def test_what_is_said_in_anothers_name_is_not_heard(siege: Siege, lie: str) -> None:
    """The registration itself goes on: its honest result counts."""

    async def attack(siege: Siege) -> None:
        liar, honest = await with_a_plan(siege)
        message = DROPPED[lie](honest)
        await liar.send(message)
        if not (isinstance(message, StepResult) and message.busy_us):
            await liar.send(honest)
        await liar.wait(lambda: len(liar.simulated.plans) > 1)
        await liar.send(Goodbye(reason="tired"))

    siege.run(siege.endure(attack))


def test_a_result_that_is_sent_twice_ends_the_registration(siege: Siege) -> None:
    async def attack(siege: Siege) -> None:
        liar, honest = await with_a_plan(siege)
        await liar.send(honest)
        await liar.send(honest)
        assert (await liar.expect(Goodbye)).final

    siege.run(siege.endure(attack))


def test_a_result_before_any_plan_ends_the_registration(siege: Siege) -> None:
    async def attack(siege: Siege) -> None:
        liar = siege.liar()
        await liar.hello()
        welcome = await liar.expect(WorkerWelcome)
        await liar.send(StepResult(epoch=welcome.epoch, registration=welcome.registration, step=5, token=tokens(1)))
        assert (await liar.expect(Goodbye)).final

    siege.run(siege.endure(attack))


def test_an_expelled_worker_does_not_come_back(siege: Siege) -> None:
    """Or its requests would be taken away from it until they are given up."""

    async def attack(siege: Siege) -> None:
        liar, honest = await with_a_plan(siege)
        await liar.send(replace(honest, step=99))
        await liar.expect(Goodbye)
        await liar.hello()
        assert "expelled" in (await liar.expect(Goodbye, 2)).reason
        assert sum(isinstance(one, WorkerWelcome) for one in liar.got) == 1

    siege.run(siege.endure(attack))


def many_files(count: int) -> tuple[FileInfo, ...]:
    return tuple(FileInfo(name=f"f{i}", size=1, sha256="0") for i in range(count))


HELLOS: dict[str, dict[str, Any]] = {
    "another model": {"model": replace(MODEL, name="other")},
    "another vocabulary": {"model": replace(MODEL, vocab_size=VOCAB + 1)},
    "other weights": {"model": replace(MODEL, weights="other")},
    "no vocabulary": {"model": replace(MODEL, vocab_size=0)},
    "no context": {"model": replace(MODEL, max_model_len=0)},
    "a context of 2^31": {"model": replace(MODEL, max_model_len=INT_MAX)},
    "a context over the limit": {"model": replace(MODEL, max_model_len=MAX_CONTEXT + 1), "num_blocks": MAX_BLOCKS},
    "no blocks": {"num_blocks": 0},
    "too few blocks": {"num_blocks": 15},
    "blocks over the limit": {"num_blocks": MAX_BLOCKS + 1},
    "2^31 blocks": {"num_blocks": INT_MAX},
    "blocks of nothing": {"block_size": 0},
    "no slots": {"max_num_seqs": 0},
    "slots over the limit": {"max_num_seqs": MAX_SLOTS + 1, "max_num_batched_tokens": INT_MAX},
    "2^31 slots": {"max_num_seqs": INT_MAX, "max_num_batched_tokens": INT_MAX},
    "fewer tokens than slots": {"max_num_batched_tokens": 7},
    "lookahead over the limit": {"lookahead": 65},
    "2^31 lookahead": {"lookahead": INT_MAX},
    "steps of a year": {"longest_step_s": 3e7},
    "many files": {"files": many_files(65)},
    "many end tokens": {"model": replace(MODEL, eos_token_ids=tuple(range(2_000)))},
}


@pytest.mark.parametrize("hello", HELLOS)
def test_a_worker_that_cannot_be_is_refused(siege: Siege, hello: str) -> None:
    async def attack(siege: Siege) -> None:
        liar = siege.liar(**HELLOS[hello])
        await liar.hello()
        goodbye = await liar.expect(Goodbye)
        assert goodbye.final
        assert not any(isinstance(one, WorkerWelcome) for one in liar.got)

    siege.run(siege.endure(attack))


def test_the_number_of_another_worker_is_no_key_to_its_registration(siege: Siege) -> None:
    """The honest worker has instance 1 and another key."""

    async def attack(siege: Siege) -> None:
        liar = siege.liar()
        liar.greeting = replace(liar.greeting, instance=1, name=siege.worker.greeting.name)
        await liar.hello()
        await liar.expect(WorkerWelcome)
        await liar.send(Goodbye(reason="enough"))

    siege.run(siege.endure(attack))


FLOODS: dict[str, Callable[[ScriptedWorker], bytes]] = {
    "hellos": lambda liar: encode(liar.greeting),
    "results of nobody": lambda liar: encode(StepResult(epoch=1, registration=1, step=1)),
    "idle": lambda liar: encode(Idle(epoch=1, registration=1, step=1)),
    "chunks": lambda liar: encode(FileChunk(name="x", offset=0, data=bytes(100_000))),
}


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("registered", [True, False], ids=["registered", "stranger"])
def test_floods(siege: Siege, flood: str, registered: bool) -> None:
    async def attack(siege: Siege) -> None:
        liar = siege.liar()
        if registered:
            await liar.hello()
            await liar.expect(WorkerWelcome)
        data = FLOODS[flood](liar)
        for _ in range(500):
            await liar.send(data)
        await liar.send(Goodbye(reason="enough"))

    siege.run(siege.endure(attack))


def test_after_everything_the_scheduler_has_not_grown(siege: Siege) -> None:
    """Of the attacks that this process made; the last test of the last file."""

    async def attack(siege: Siege) -> None:
        siege.assert_no_growth()

    siege.run(siege.endure(attack))
