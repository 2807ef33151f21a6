"""A gateway's beginning and end, its keys, and its health when the service is not well."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tandem.launch.embedded import EmbeddedSystem

from support.asking import ask_until
from support.commands import tandem
from support.deadlines import DEADLINE_S
from support.gateway import Served, events, gateway, wait_until_ready
from support.systems import embedded

pytestmark = pytest.mark.thorough

LONG = {"prompt": [5], "max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}


@contextlib.contextmanager
def streaming(served: Served, body: object) -> Iterator[httpx.Response]:
    with httpx.stream("POST", served.api + "/completions", json=body, timeout=DEADLINE_S, verify=False) as answer:
        yield answer


def test_open_streams_end_before_the_gateway_does(served: Served) -> None:
    with (
        gateway(served.address, "--shutdown-timeout", str(DEADLINE_S)) as (found, command),
        streaming(found, LONG) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        command.send(signal.SIGTERM)
        rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-4]
        assert command.finish() == 0, command.output
        with pytest.raises(httpx.ConnectError):
            found.get("/health")


def test_what_takes_too_long_is_ended_with_an_error(served: Served) -> None:
    body = {**LONG, "prompt": [[5 + i] for i in range(16)], "max_tokens": 4_000}
    with gateway(served.address, "--shutdown-timeout", "0.2") as (found, command), streaming(found, body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        command.send(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"error":{' in rest[-2]
        assert command.finish() == 0, command.output
    served.require_healthy()


def test_two_gateways_side_by_side(served: Served) -> None:
    with gateway(served.address) as (one, _), gateway(served.address) as (two, _):
        assert one.url != two.url
        one.require_healthy()
        two.require_healthy()


def test_keys(served: Served) -> None:
    with gateway(served.address, keys="first, sécond") as (found, _):
        assert found.get("/health").status_code == 200
        for path in ("/v1/models", "/openapi.json", "/nothing"):
            answer = found.get(path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for header, status in [
            (b"Bearer first", 200),
            (b"bearer first", 200),
            ("Bearer sécond".encode(), 200),
            ("Bearer sécond".encode("latin-1"), 401),  # headers are bytes: a key outside ASCII goes as UTF-8
            (b"Bearer first, second", 401),
            (b"Bearer", 401),
            (b"Basic first", 401),
            (b"Bearer \xff\xfe", 401),
        ]:
            assert found.get("/v1/models", headers={b"authorization": header}).status_code == status, header
        assert found.get("/v1/models", headers={"x-api-key": "first"}).status_code == 200
        assert found.post("/v1/completions", {"prompt": [5]}).status_code == 401
    with tandem("gateway", "--api-key", "a,b", environment={}) as command:
        assert command.finish() == 2
    assert "must not hold a comma" in command.output


def test_a_port_that_is_taken(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with tandem("gateway", "--scheduler", served.address, "--port", port, environment={}) as command:
            assert command.finish() == 2
        assert f"port {port} of 127.0.0.1 is taken by another process; --port names another" in command.output
        assert "Traceback" not in command.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "65536"], "--port"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--ssl-certfile", "/nonexistent", "--ssl-keyfile", "/nonexistent"], "--ssl-certfile"),
        (["--scheduler", "http://x"], "expected ipc:///directory or tcp://host:port"),
        (["--tool-call-parser", "mistral"], "--tool-call-parser"),
    ],
)
def test_options_that_cannot_work(flags: list[str], words: str) -> None:
    with tandem("gateway", "--port", "0", *flags, environment={}) as command:
        assert command.finish() == 2, command.output
    assert words in command.output
    assert "Traceback" not in command.output


def test_health_when_the_worker_or_the_scheduler_is_frozen() -> None:
    with (
        embedded({"device": "cpu", "threads": 1}) as system,
        gateway(system.address, "--health-stall-s", "0.5") as (found, _),
    ):
        with streaming(found, {**LONG, "max_tokens": 4_000}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            check_health_while_frozen(found, child_of(system, "worker"), "no worker has finished a step")
        check_health_while_frozen(found, child_of(system, "scheduler"), "the scheduler does not answer")


def child_of(system: EmbeddedSystem, part: str) -> psutil.Process:
    children = [(one, one.cmdline()) for one in psutil.Process().children(recursive=True)]
    (found,) = [
        one
        for one, words in children
        if f"tandem.{part}.main" in words and any(system.address in word for word in words)
    ]
    return found


def check_health_while_frozen(found: Served, process: psutil.Process, words: str) -> None:
    """It is told while nothing moves, and over once that goes on."""

    def complaint() -> httpx.Response | None:
        answer = found.get("/health")
        return None if answer.status_code == 200 else answer

    process.suspend()
    try:
        sick = ask_until(complaint)
        assert sick.status_code == 503
        assert words in sick.json()["error"]["message"]
        assert sick.headers["retry-after"]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # the launcher may have put another in its place by now
            process.resume()
    wait_until_ready(found)


def test_open_streams_wait_for_the_service_as_long_as_was_said() -> None:
    with (
        embedded({"device": "cpu", "threads": 1}) as system,
        gateway(system.address, "--reconnect-timeout", "0.5") as (found, _),
        streaming(found, {**LONG, "max_tokens": 4_000}) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        scheduler = child_of(system, "scheduler")
        scheduler.suspend()
        try:
            assert "there was no service for 0.5 s" in "\n".join(lines)
        finally:
            scheduler.resume()


def test_health_when_nobody_serves() -> None:
    folder = Path(tempfile.mkdtemp(prefix="td-"))
    flags = ["--scheduler", f"ipc://{folder}/none", "--port", "0"]
    try:
        with tandem("gateway", *flags, environment={"TANDEM_API_KEY": ""}) as command:
            command.wait_for("HTTP at ")
            alone = Served(command.output.partition("HTTP at ")[2].split()[0], "")
            for answer in (alone.get("/health"), alone.get("/v1/models"), alone.chat("hi")):
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "service_unavailable"
            assert "tandem:scheduler_up 0.0" in alone.get("/metrics").text
            command.send(signal.SIGTERM)
            assert command.finish() == 0, command.output
    finally:
        shutil.rmtree(folder)


def test_usage_of_a_stream_that_a_stop_string_ended(served: Served) -> None:
    body = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 200, "stop": ".", "stream": True}
    *chunks, end, done = events(
        served.post("/v1/completions", {**body, "stream_options": {"include_usage": True}, "return_token_ids": True})
    )
    assert done == "[DONE]"
    tokens = sum(len(choice["token_ids"]) for chunk in chunks for choice in chunk["choices"])
    assert end["usage"]["completion_tokens"] == tokens < 200
    assert "." not in "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
