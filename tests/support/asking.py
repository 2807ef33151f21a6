"""Waiting for what another process tells only when it is asked: with a pause between two questions, so that asking does
not take the processor from whoever is waited for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from support.deadlines import DEADLINE_S

PAUSE_S = 0.05

_T = TypeVar("_T")


def ask_until(ask: Callable[[], _T | None]) -> _T:
    """The first answer that is true. TimeoutError after DEADLINE_S, with the last one."""
    end = time.monotonic() + DEADLINE_S
    never = threading.Event()
    while not (answer := ask()):
        if time.monotonic() > end:
            raise TimeoutError(f"after {DEADLINE_S:g} s the answer is still {answer!r}")
        never.wait(PAUSE_S)
    return answer


async def asked_until(ask: Callable[[], Awaitable[_T | None]]) -> _T:
    """The same on a loop."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if answer := await ask():
                return answer
            await asyncio.sleep(PAUSE_S)
