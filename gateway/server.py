"""uvicorn, held to limits that it does not have: heads that are too long or too slow, too many connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ..protocol.errors import ConfigurationError
from ..protocol.process import allow_files
from .config import GatewayConfig
from .errors import ApiError, unavailable
from .listening import BACKLOG

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers together."""
SPARE_FILES = 256


class Server(uvicorn.Server):
    """Leaves signals to the process, which knows what to end first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(config: GatewayConfig, app: ASGIApp) -> Server:
    """Raises ConfigurationError if the certificate cannot be used."""
    settings = uvicorn.Config(
        app,
        http=_protocol(config),
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=int(config.shutdown_timeout) + 5,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
    try:
        settings.load()
    except OSError as error:
        raise ConfigurationError(f"--ssl-certfile, --ssl-keyfile: cannot be used: {error}") from error
    allow_files(config.max_connections + SPARE_FILES)
    return Server(settings)


def _protocol(config: GatewayConfig) -> type[HttpToolsProtocol]:
    class Protocol(_GuardedProtocol):
        max_connections = config.max_connections
        head_timeout_s = config.read_timeout_s

    return Protocol


class _GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    max_connections: int
    head_timeout_s: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = True
        self._head_is_long = False
        self._head_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.max_connections:
            self._refuse(unavailable(f"over the limit of {self.max_connections} connections"))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._await_head()
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["tandem.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def _write_chunk(self, cycle: RequestResponseCycle, data: bytes) -> bool:
        """Writes a piece of a streamed body, if that needs no waiting and nothing has to be looked at; else the caller
        is to send it as a message."""
        if self.flow.write_paused or cycle.disconnected or cycle.response_complete or not data:
            return False
        if not cycle.response_started or not cycle.chunked_encoding or cycle.scope["method"] == "HEAD":
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._cancel_head_timer()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._head_is_long = True
            raise ValueError("head too large")  # what the parser makes of it ends at send_400_response
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            cycle: Any = self.cycle
            cycle.send = partial(_send_unchunked, cycle, cycle.send)
        # Of this request: `self.cycle` is another's as soon as the client sends one more before the answer's end.
        self.scope["tandem.write"] = partial(self._write_chunk, self.cycle)  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def send_400_response(self, msg: str) -> None:
        no_http = ApiError(400, "this is no HTTP request", code="invalid_http")
        self._refuse(_head_too_large() if self._head_is_long else no_http)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(ApiError(408, "the request's head did not come in time", code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answers outside the application, and closes."""
        self._cancel_head_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # in the midst of another answer
            return
        answer = error.response()
        head = f"HTTP/1.1 {error.status} {_PHRASES.get(error.status, '')}\r\n"
        fields: list[tuple[bytes, bytes]] = [*answer.raw_headers, (b"connection", b"close")]
        lines: list[Any] = [head.encode(), *(name + b": " + value + b"\r\n" for name, value in fields)]
        self.transport.write(b"".join(lines) + b"\r\n" + bytes(answer.body))
        self.transport.close()


async def _send_unchunked(cycle: RequestResponseCycle, send: Send, message: Any) -> None:
    """`cycle.send` for HTTP/1.0, whose clients know no chunks: an answer of unknown length ends with its connection,
    which uvicorn closes."""
    if message["type"] == "http.response.start":
        if all(name.lower() != b"content-length" for name, _ in message["headers"]):
            cycle.chunked_encoding = False
    elif cycle.expected_content_length == 0:
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


def _head_too_large() -> ApiError:
    return ApiError(431, f"the request's head is over the limit of {MAX_HEAD_BYTES} bytes", code="head_too_large")


_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
