"""Server-sent events, and answers that end when their reader does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from json.encoder import encode_basestring
from typing import Any, TypeVar
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import as_api_error
from .guard import ClientGone, log

_T = TypeVar("_T")

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the pieces back
]
DONE = b"data: [DONE]\n\n"


def event(content: Any, name: str | None = None) -> bytes:
    """One event; `name` for those APIs that name theirs."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"


PLACE = uuid4().hex
"""Stands for a text that changes (see text_event); nobody can know it."""


def text_event(content: Any) -> Callable[[str], bytes]:
    """The function that gives, byte for byte, `event(content)` with a text in PLACE, which `content` holds once as a
    value: what surrounds the text is serialised once."""
    before, after = event(content).split(f'"{PLACE}"'.encode())

    def written(text: str) -> bytes:
        return before + encode_basestring(text).encode("utf-8", "backslashreplace") + after

    return written


class EventStream(Response):
    """Streams `events`; if they raise, `on_error` gives the last event. A client that leaves cancels them."""

    def __init__(self, events: AsyncIterator[bytes], on_error: Callable[[dict[str, Any]], bytes]) -> None:
        super().__init__()
        self._events = events
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await unless_gone(receive, self._send_all(scope, send))

    async def _send_all(self, scope: Scope, send: Send) -> None:
        try:
            # Not through every layer of middleware: they only look at how an answer begins.
            send_body = scope["tandem.send_body"]
            async for piece in self._events:
                await send_body(piece)
        except ClientGone:
            raise
        except Exception as error:  # noqa: BLE001  (the status is out: the error is told within the stream)
            answer = as_api_error(error)
            if answer.status == 500:
                log.error("request %s: %s", scope["state"]["request_id"], error, exc_info=error)
            last = self._on_error(answer.body["error"])
            await send({"type": "http.response.body", "body": last, "more_body": True})
        finally:
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Awaitable[_T]) -> _T:
    """What `work` returns. Raises ClientGone if the client leaves before, and cancels `work` then."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def answered(request: Request, work: Awaitable[_T]) -> _T:
    """The same for an answer that comes whole, after the body has been read."""
    return await unless_gone(request.receive, work)
