"""Long work in pieces: others have their turn, and what is short waits for nothing that is long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tandem.gateway import turns
from tandem.gateway.turns import Turns

EVERY_STEP = -1.0
"""As PIECE_S: a piece is one step."""


def steps(name: str, count: int, done: list[str]) -> Iterator[None]:
    for i in range(count):
        done.append(f"{name}{i}")
        yield


def test_others_have_their_turn_between_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PIECE_S", EVERY_STEP)
    done: list[str] = []

    async def other() -> None:
        for i in range(4):
            done.append(f"other{i}")
            await asyncio.sleep(0)

    async def run() -> None:
        await asyncio.gather(Turns().take(steps("a", 4, done)), other())

    asyncio.run(run())
    assert done == ["a0", "a1", "other0", "a2", "other1", "a3", "other2", "other3"]


def test_long_work_is_done_in_the_order_in_which_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PIECE_S", EVERY_STEP)
    done: list[str] = []

    async def run() -> None:
        shared = Turns()
        await asyncio.gather(*(shared.take(steps(name, 4, done)) for name in "abc"))

    asyncio.run(run())
    later = [step for step in done if step[1] != "0"]  # the first piece of each comes at once: it may be all
    assert later == [f"{name}{i}" for name in "abc" for i in range(1, 4)]


def test_what_is_short_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        shared, done = Turns(), list[str]()
        monkeypatch.setattr(turns, "PIECE_S", EVERY_STEP)
        long = asyncio.create_task(shared.take(steps("long", 10, done)))
        await asyncio.sleep(0)
        assert 0 < len(done) < 10
        monkeypatch.setattr(turns, "PIECE_S", float("inf"))
        with pytest.raises(StopIteration):  # at its end, without having waited once
            shared.take(steps("short", 10, done)).send(None)
        assert done[-1] == "short9"
        assert not long.done()
        await long

    asyncio.run(run())


def test_a_step_that_fails_lets_the_next_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PIECE_S", EVERY_STEP)

    def fail() -> Iterator[None]:
        yield
        yield
        raise ValueError("a mishap")

    async def run() -> None:
        shared, done = Turns(), list[str]()
        failed, _ = await asyncio.gather(shared.take(fail()), shared.take(steps("a", 3, done)), return_exceptions=True)
        assert isinstance(failed, ValueError)
        assert done == ["a0", "a1", "a2"]

    asyncio.run(run())
