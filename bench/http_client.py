"""Completions over HTTP as a client of OpenAI's API takes them: one POST each, server-sent events back.

Connections are asyncio protocols over httptools' parser, and of an ordinary event only the kind is looked at: what is
measured is the gateway, and client libraries need longer for an event than it does.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from ..protocol.errors import ConfigurationError
from .metrics import HttpFailed, Outcome

DONE = b"data: [DONE]"
DATA = b"data: "
CHOICE = b'"choices":[{'
ROLE = b'"role":"assistant"'
"""In the event that begins a message, before any of its text. Text cannot hold it: its quotes are escaped."""
MOST_ERROR_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    head: bytes
    """Of every request, between its path and its body's length."""
    path: str
    """What comes before /v1."""

    @classmethod
    def at(cls, url: str, api_key: str) -> Server:
        """Raises ConfigurationError if that is no http:// or https:// address."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigurationError(f"--base-url {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigurationError(f"--base-url: expected http://host:port, not {url!r}")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Content-Type: application/json"]
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        head = "".join(f"{line}\r\n" for line in lines).encode()
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), tls, head, path)

    def request(self, path: str, body: bytes) -> bytes:
        """A whole POST."""
        begin = f"POST {self.path}{path} HTTP/1.1\r\n".encode()
        return b"".join([begin, self.head, f"Content-Length: {len(body)}\r\n\r\n".encode(), body])


@dataclass
class Answer:
    """What has come of one answer."""

    outcome: Outcome
    start: float
    """Monotonic time from which the outcome's times count."""
    ended: asyncio.Future[None]
    done: bool = False
    """The stream said that it was whole."""
    error: HttpFailed | None = None
    unread: bytes = b""
    body: list[bytes] = field(default_factory=list)
    """Of an answer that is no stream."""
    body_bytes: int = 0

    def on_body(self, data: bytes, at: float) -> None:
        """Takes a piece of a stream, which came at `at`."""
        *events, self.unread = (self.unread + data).split(b"\n\n") if self.unread else data.split(b"\n\n")
        for event in events:
            if CHOICE in event:
                if ROLE not in event:
                    self.outcome.times.append(at - self.start)
            elif event == DONE:
                self.done = True
            else:
                self._on_rare(event)

    def _on_rare(self, event: bytes) -> None:
        try:
            found = json.loads(event.removeprefix(DATA))
            error, usage = found.get("error"), found.get("usage")
        except (ValueError, AttributeError):
            self.error = self.error or HttpFailed("NoEvent", f"no event of OpenAI's API: {event[:200]!r}")
            return
        if error is not None:
            self.error = self.error or _told(error, "Error")
        if usage is not None:
            outcome = self.outcome
            outcome.output_tokens, outcome.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


class Connection(asyncio.Protocol):
    """One connection, and the answer that is awaited on it. What the parser calls is named by it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._parser: Any = None
        self._status = 0
        self._at = 0.0
        self.is_lost = False

    async def exchange(self, request: bytes, answer: Answer) -> bool:
        """Sends a request and takes its answer; returns whether the connection can take another. Raises HttpFailed."""
        assert self._transport is not None
        self._answer, self._status = answer, 0
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        await answer.ended
        if answer.error is not None:
            raise answer.error
        if not answer.done:
            raise HttpFailed("Incomplete", "the stream ended without [DONE]")
        if answer.outcome.output_tokens is None:
            raise HttpFailed("NoUsage", "the stream did not tell how many tokens it had (stream_options.include_usage)")
        return not self.is_lost

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- asyncio ---------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        self._at = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(HttpFailed("NoHttp", f"the answer is no HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        self._fail(HttpFailed("Disconnected", f"the connection ended before the answer: {error or 'closed'}"))

    # --- the parser ------------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        if self._status == 200:
            answer.on_body(data, self._at)
        elif answer.body_bytes < MOST_ERROR_BYTES:
            answer.body.append(data)
            answer.body_bytes += len(data)

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is not None and self._status != 200:
            answer.error = _refused(self._status, b"".join(answer.body))
        if not self._parser.should_keep_alive():
            self.is_lost = True
            self.close()
        self._fail(None)

    def _fail(self, error: HttpFailed | None) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.error = answer.error or error
            if not answer.ended.done():
                answer.ended.set_result(None)


class HttpClient:
    """Sends requests to one server, each on a connection that is idle or new."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._idle: list[Connection] = []

    def request(self, path: str, body: dict[str, Any]) -> bytes:
        """What `stream` is to send; made before a run, so that making it costs the run nothing."""
        return self._server.request(path, json.dumps(body, separators=(",", ":")).encode())

    async def stream(self, request: bytes, outcome: Outcome, start: float) -> None:
        """Sends a request and takes its whole answer. Raises HttpFailed."""
        loop = asyncio.get_running_loop()
        connection = self._take_idle()
        try:
            if connection is None:
                server = self._server
                _, connection = await loop.create_connection(Connection, server.host, server.port, ssl=server.tls)
        except OSError as error:
            raise HttpFailed("NotConnected", f"{self._server.host} port {self._server.port}: {error}") from error
        is_reusable = False
        try:
            is_reusable = await connection.exchange(request, Answer(outcome, start, loop.create_future()))
        finally:
            if is_reusable:
                self._idle.append(connection)
            else:
                connection.close()

    def close_idle(self) -> None:
        """Before a run: a server ends what is idle for long, and may do so just when a request is sent."""
        while self._idle:
            self._idle.pop().close()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_lost:
                return connection
        return None


def _refused(status: int, body: bytes) -> HttpFailed:
    try:
        return _told(json.loads(body)["error"], f"HTTP {status}")
    except (ValueError, KeyError, TypeError):
        return HttpFailed(f"HTTP {status}", body[:200].decode(errors="replace"))


def _told(error: Any, kind: str) -> HttpFailed:
    if isinstance(error, dict):
        return HttpFailed(kind, str(error.get("message", error)))
    return HttpFailed(kind, str(error))
