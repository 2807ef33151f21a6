"""Waiting for news, without a task or a lock of one's own."""

from __future__ import annotations

import asyncio


class News:
    """Wakes the one task that waits. Apart from what it tells of, which nobody may hold but its reader."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def tell(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """For what is told from now on."""
        if self._waiter is not None:
            raise RuntimeError("this stream is being read by another task already")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
