"""Events whose surroundings are serialised once, and streams that share a connection."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.logprobs import finite
from tandem.gateway.sse import PLACE, event, text_event

from support.gateway import Served

TEXTS = st.text(st.characters(blacklist_categories=())) | st.sampled_from(
    ['"', "\\", "\n\n", "\ud83d", "\x00\x7f", "é😀"]
)


@given(TEXTS, TEXTS)
def test_a_text_event_is_the_event_with_that_text(name: str, text: str) -> None:
    def content(text: str) -> dict[str, object]:
        return {"model": name, "choices": [{"index": 0, "text": text, "logprobs": None}], "usage": None}

    written = text_event(content(PLACE))
    assert written(text) == event(content(text))
    assert written(text).count(b"\n\n") == 1


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf"), -1e30])
def test_what_json_has_no_number_for_is_the_least_logprob(logprob: float) -> None:
    assert event(finite(logprob)) == b"data: -9999.0\n\n"
    assert finite(-2.5) == -2.5


def test_streams_that_are_asked_for_at_once_come_one_after_the_other(served: Served) -> None:
    """The second request's head has been read while the first one's answer is still being written."""
    bodies = [
        json.dumps(
            {"prompt": [[5 + i]] * 2, "max_tokens": 40 - i, "ignore_eos": True, "temperature": 0, "stream": True}
        )
        for i in range(3)
    ]
    requests = [
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{last}"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
        for body, last in zip(bodies, ("", "", "Connection: close\r\n"), strict=True)
    ]
    with served.connect() as connection:
        connection.sendall("".join(requests).encode())
        received = b""
        while data := connection.recv(65_536):
            received += data
    answers = received.split(b"HTTP/1.1 200 OK\r\n")
    assert answers[0] == b""
    assert len(answers) == 4
    alone = [served.post("/v1/completions", json.loads(body)).text for body in bodies]
    for answer, reference in zip(answers[1:], alone, strict=True):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert text_of(unchunked(body).decode()) == text_of(reference)


def unchunked(body: bytes) -> bytes:
    pieces: list[bytes] = []
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            assert body == b"\r\n"
            return b"".join(pieces)
        pieces.append(body[:length])
        assert body[length : length + 2] == b"\r\n"
        body = body[length + 2 :]


def text_of(stream: str) -> list[str]:
    texts = ["", ""]
    *events, done = stream.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    for one in events:
        (choice,) = json.loads(one.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    return texts
