"""A service with HTTP as `tandem serve` starts it, gateways beside it, and raw connections to them."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from support.asking import ask_until
from support.commands import Command, tandem
from support.deadlines import DEADLINE_S, LONG_LEASE_S

MODEL = "tandem-builtin"
LONG_LEASES = [f"--{whose}-lease={LONG_LEASE_S}" for whose in ("scheduler", "worker", "client")]
PATIENT = [f"--reconnect-timeout={DEADLINE_S}"]


@dataclass
class Served:
    """Where a service is, and its HTTP."""

    url: str
    address: str
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def api(self) -> str:
        """What OpenAI's clients call base_url."""
        return f"{self.url}/v1"

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """One request on a connection of its own; `content` instead of a body sends bytes as they are."""
        if body is not None:
            options["json"] = body
        elif "content" in options:
            options["headers"] = {"content-type": "application/json", **options.get("headers", {})}
        return httpx.post(self.url + path, timeout=DEADLINE_S, verify=False, **options)  # no need to read certificates

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=DEADLINE_S, verify=False, **options)

    def chat(self, text: str, **more: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more})

    def require_healthy(self) -> None:
        """Whatever happened before, the next request is answered."""
        answer = self.chat("What is 2 + 3?")
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "2 + 3 = 5"

    def connect(self, timeout: float = DEADLINE_S) -> socket.socket:
        """A connection on which nothing has been said."""
        where = urlsplit(self.url)
        assert where.hostname
        assert where.port
        return socket.create_connection((where.hostname, where.port), timeout)


@contextmanager
def service(*more: str) -> Iterator[Served]:
    """`tandem serve` with the built-in model, and leases that nobody loses."""
    runtime = tempfile.mkdtemp(prefix="td-")
    environment = {"XDG_RUNTIME_DIR": runtime, "TANDEM_API_KEY": ""}
    flags = ["--port", "0", "--device", "cpu", "--threads", "1", "--log-level", "warning", *LONG_LEASES, *more]
    try:
        with tandem("serve", *flags, environment=environment) as command:
            command.wait_for("Ctrl-C ends it.")
            yield Served(_url(command), f"ipc://{runtime}/tandem/default")
            command.send(signal.SIGTERM)
            assert command.finish() == 0, command.output
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


@contextmanager
def gateway(address: str, *more: str, keys: str = "") -> Iterator[tuple[Served, Command]]:
    """`tandem gateway` beside a running service."""
    environment = {"TANDEM_API_KEY": keys}
    with tandem("gateway", "--scheduler", address, "--port", "0", *PATIENT, *more, environment=environment) as command:
        command.wait_for("HTTP at ")
        served = Served(_url(command, "HTTP at "), address)
        wait_until_ready(served)
        yield served, command


def wait_until_ready(served: Served) -> None:
    """Until it is healthy."""
    ask_until(lambda: served.get("/health").status_code == 200)


def _url(command: Command, mark: str = "HTTP      ") -> str:
    line = next(line for line in command.wait_for(mark).splitlines() if mark in line)
    while not line.endswith("\n") and "http" not in line.partition(mark)[2]:
        line = next(one for one in command.wait_for_more().splitlines() if mark in one)
    return line.partition(mark)[2].strip().removesuffix("/v1")


def events(answer: httpx.Response) -> list[Any]:
    """The data of a stream's events; "[DONE]" is itself."""
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    pieces = answer.text.split("\n\n")
    assert pieces[-1] == ""
    found = [piece.split("data: ", 1)[1] for piece in pieces[:-1]]
    return [one if one == "[DONE]" else json.loads(one) for one in found]
