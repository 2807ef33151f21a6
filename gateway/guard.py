"""What every request passes: its id, the key, and the time that its two ends may take.

A pure ASGI middleware, so that a streamed answer is not touched piece by piece.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Collection
from typing import Any
from uuid import uuid4

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error
from .metrics import GatewayMetrics

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})
"""What needs no key: probes and scrapes."""
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
"""What metrics tell apart."""
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class ClientGone(Exception):
    """The client left, or reads no more; nobody hears the answer."""


class Keys:
    """API keys, compared in constant time, as UTF-8. None means that everybody may."""

    def __init__(self, keys: Collection[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def admit(self, scope: Scope) -> None:
        """Raises ApiError 401 unless the request brings one of the keys."""
        if not self._digests or scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer":
            key = _header(scope, b"x-api-key")
        digest = hashlib.sha256(key.strip()).digest()
        found = False
        for known in self._digests:  # all of them, so that the time does not tell which
            found |= hmac.compare_digest(known, digest)
        if not found:
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


class Guard:
    """Wraps the application."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, metrics: GatewayMetrics, read_timeout_s: float, write_timeout_s: float
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._read_timeout_s = read_timeout_s
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path.endswith("/") and path != "/":  # taken without it, as a redirect would have it
            scope["path"] = path.rstrip("/") or "/"
        exchange = _Exchange(scope, receive, send, self._read_timeout_s, self._write_timeout_s)
        began = time.perf_counter()
        self._metrics.begun()
        try:
            self._keys.admit(scope)
            await self._app(scope, exchange.receive, exchange.send)
        except (ClientGone, ClientDisconnect):
            exchange.leave()
        except asyncio.CancelledError:
            exchange.abort()
            raise
        except Exception as error:  # noqa: BLE001  (whatever it is, the client gets an answer, and the log the story)
            # starlette wraps what is raised after an answer has begun.
            if isinstance(error.__cause__, ClientGone | ClientDisconnect):
                exchange.leave()
            else:
                await exchange.fail(error)
        finally:
            exchange.over()
            handler = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.ended(handler, method, exchange.status, time.perf_counter() - began)


class _Exchange:
    """One request and its answer, with their limits of time."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, read_timeout_s: float, write_timeout_s: float
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._write_timeout_s = write_timeout_s
        self._read_by = asyncio.get_running_loop().time() + read_timeout_s
        self._body_is_read = False
        self.status = 0
        """Of the answer, once it has begun."""
        self._complete = False
        given = _header(scope, b"x-request-id").decode("latin-1")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.request_id
        scope["tandem.send_body"] = self.send_body
        self._write: Callable[[bytes], bool] = scope.get("tandem.write", _nothing)

    async def receive(self) -> Message:
        if self._body_is_read:  # what is left to hear is that the client has gone
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._read_by):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "the request's body did not come in time", code="timeout", headers={"connection": "close"}
            ) from None
        self._body_is_read = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        else:
            self._complete = not message.get("more_body", False)
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send(message)
        except TimeoutError:
            raise ClientGone from None

    async def send_body(self, data: bytes) -> None:
        """A piece of a body that goes on, once the answer has begun; as `send`, with less ado."""
        if not self._write(data):
            await self.send({"type": "http.response.body", "body": data, "more_body": True})

    def over(self) -> None:
        """Nothing is sent any more. The request is freed at once, not when the garbage collector finds it."""
        for name in ("tandem.send_body", "tandem.write"):
            self._scope.pop(name, None)

    async def fail(self, error: Exception) -> None:
        """Answers with the error, unless that was done, or cuts off an answer that has begun."""
        answer = as_api_error(error)
        if answer.status >= 500 and not isinstance(error, ApiError):
            log.error("request %s: %s", self.request_id, error, exc_info=error)
        if self._complete:
            return
        if self.status:
            self.abort()
            return
        try:
            await answer.response()(self._scope, self.receive, self.send)
        except ClientGone:
            self.abort()

    def leave(self) -> None:
        """The client is gone: there is nobody to answer, and nothing to tell the log."""
        self.status = self.status or CLIENT_CLOSED_REQUEST
        self.abort()

    def abort(self) -> None:
        """Closes the connection, read or not."""
        abort: Any = self._scope.get("tandem.abort")
        if abort is not None:
            abort()


def _nothing(_data: bytes) -> bool:
    return False


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
