"""Many calls as one: some at a time, in order, waiting out an overloaded service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..protocol.errors import Overloaded

_T = TypeVar("_T")

SHORTEST_RETRY_S = 0.05
LONGEST_RETRY_S = 5.0


async def in_order(count: int, limit: int, call: Callable[[int], Awaitable[_T]]) -> list[_T]:
    """What `call(0)` to `call(count - 1)` return, with at most `limit` of them running. The first failure, or a
    cancel, cancels the others, waits for them and is raised."""
    done: dict[int, _T] = {}
    todo = iter(range(count))

    async def work() -> None:
        for i in todo:  # shared: each worker takes the next one
            done[i] = await call(i)

    workers = [asyncio.create_task(work()) for _ in range(min(limit, count))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [done[i] for i in range(count)]


async def patiently(attempt: Callable[[float | None], Awaitable[_T]], time_limit: float | None) -> _T:
    """Tries again while the service says Overloaded, for `time_limit` seconds in all. `attempt` is told how many are
    left."""
    loop = asyncio.get_running_loop()
    deadline = None if time_limit is None else loop.time() + time_limit
    while True:
        left = None if deadline is None else max(0.0, deadline - loop.time())
        try:
            return await attempt(left)
        except Overloaded as error:
            pause = min(max(error.retry_after, SHORTEST_RETRY_S), LONGEST_RETRY_S)
            if left is not None and pause > left:
                raise
            await asyncio.sleep(pause)
