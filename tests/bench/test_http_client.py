"""The benchmark's HTTP client against a server that answers with given bytes, cut anywhere."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence

import pytest

from tandem.bench.http_client import HttpClient, Server
from tandem.bench.metrics import HttpFailed, Outcome
from tandem.protocol.errors import ConfigurationError

STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def whole(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def text(content: str) -> bytes:
    return event({"choices": [{"index": 0, "text": content, "finish_reason": None}], "usage": None})


END = event({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n"


def ask(answers: Sequence[bytes], *, cut: int = 1 << 20, close: bool = False) -> tuple[list[Outcome], list[bytes], int]:
    """Sends one request for each answer, one after the other; returns outcomes, requests and how many connections
    there were. The server sends `cut` bytes at a time."""
    requests: list[bytes] = []
    connections = 0
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while left:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            requests.append(head + await reader.readexactly(length))
            answer = left.pop(0)
            for begin in range(0, len(answer), cut):
                writer.write(answer[begin : begin + cut])
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                break
        writer.close()

    async def main() -> list[Outcome]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            client = HttpClient(Server.at(f"http://127.0.0.1:{port}/v1", "secret"))
            outcomes = []
            for number in range(len(answers)):
                outcome = Outcome()
                try:
                    await client.stream(
                        client.request("/v1/completions", {"number": number}), outcome, time.monotonic() - 1.0
                    )
                except HttpFailed as error:
                    outcome.failure, outcome.message = error.kind, str(error)
                outcomes.append(outcome)
            client.close_idle()
        return outcomes

    return asyncio.run(main()), requests, connections


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_each_event_with_a_choice_is_a_delivery(cut: int) -> None:
    pieces = [text("a"), text('"choices":[{ [DONE] \u2028 \U0001f600'), text("")]
    answer = STREAM + chunked(pieces[0], pieces[1] + pieces[2], END)
    outcomes, requests, connections = ask([answer, answer], cut=cut)
    assert connections == 1
    for number, (outcome, request) in enumerate(zip(outcomes, requests, strict=True)):
        assert outcome.failure == "", outcome.message
        assert (len(outcome.times), outcome.tokens) == (3, 5)
        assert (outcome.prompt_tokens, outcome.cached_tokens) == (7, 4)
        assert 1.0 <= outcome.times[0] <= outcome.times[-1]
        assert request.startswith(b"POST /v1/completions HTTP/1.1\r\n")
        assert b"\r\nAuthorization: Bearer secret\r\n" in request
        assert json.loads(request.partition(b"\r\n\r\n")[2]) == {"number": number}


def test_the_event_that_begins_a_message_is_no_delivery() -> None:
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    said = event({"choices": [{"index": 0, "delta": {"content": '"role":"assistant"'}}]})
    (outcome,), _, _ = ask([STREAM + chunked(role, said, END)])
    assert outcome.failure == ""
    assert len(outcome.times) == 1


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (whole("429 Too Many Requests", b'{"error":{"message":"full"}}'), "HTTP 429", "full"),
        (whole("502 Bad Gateway", b"oops!"), "HTTP 502", "oops!"),
        (
            STREAM + chunked(text("a"), event({"error": {"message": "it broke"}}) + b"data: [DONE]\n\n"),
            "Error",
            "it broke",
        ),
        (STREAM + chunked(text("a")), "Incomplete", "without [DONE]"),
        (STREAM + chunked(text("a"), b"data: [DONE]\n\n"), "NoUsage", "include_usage"),
        (STREAM + chunked(b"data: <html>\n\n"), "NoEvent", "<html>"),
        (STREAM + chunked(text("a"), END)[:-5], "Disconnected", "ended before"),
        (b"SSH-2.0-OpenSSH\r\n", "NoHttp", "no HTTP"),
    ],
)
def test_what_fails_is_told_by_kind(answer: bytes, kind: str, message: str) -> None:
    (outcome,), _, _ = ask([answer], close=True)
    assert outcome.failure == kind, outcome.message
    assert message in outcome.message
    assert "{" not in outcome.message  # an error object's message, not the object


def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    answer = STREAM.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunked(text("a"), END)
    outcomes, _, connections = ask([answer, answer], close=True)
    assert [outcome.failure for outcome in outcomes] == ["", ""]
    assert connections == 2


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://x/?a=1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigurationError, match="--base-url"):
        Server.at(url, "")
