"""What strangers send by malice or mistake: each gets an answer or is cut off, and the next request is served."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tandem import Client

from support.asking import ask_until
from support.deadlines import DEADLINE_S
from support.gateway import Served, gateway
from support.observe import settled

pytestmark = pytest.mark.thorough

LIMIT = 50_000
VALUES = 22_000
SAMPLES = 64


@pytest.fixture(scope="module")
def strict(served: Served) -> Iterator[Served]:
    """A gateway that loses patience quickly."""
    flags = ["--max-request-bytes", str(LIMIT), "--read-timeout-s", "3", "--write-timeout-s", "1"]
    flags += ["--max-request-values", str(VALUES), "--max-request-samples", str(SAMPLES)]
    with gateway(served.address, *flags, "--max-connections", "40", "--log-level", "info") as (found, command):
        yield found
        command.process.terminate()
        assert command.finish() == 0, command.output


@pytest.fixture(autouse=True)
def healthy_afterwards(strict: Served) -> Iterator[None]:
    yield
    strict.require_healthy()


def chat(content: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": ' + content + b"}]}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"\x00",
        b"{" * 10_000,
        b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        chat(b'"\xff\xfe"'),
        chat(rb'"\ud800"'),
        chat(b'"x", "content": ["y"]'),
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": -Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5_000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "top_k": 1.5}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": "2"}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e3}',
        b'{"messages": [{"role": "user", "content": "x"}], "x": "' + b"y" * 40_000 + b'"}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop": {"a": 1}}',
        b'{"messages": [{"role": "user", "content": "x"}], '
        b'"tools": [{"type": "function", "function": {"name": "a b"}}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", '
        b'"json_schema": {"name": "a", "schema": {"type": 7}}}}',
    ],
    ids=lambda body: body[:60].decode("latin-1"),
)
def test_bodies_that_make_no_sense(strict: Served, body: bytes) -> None:
    answer = strict.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400, answer.text[:500]
    error = answer.json()["error"]
    assert error["message"]
    assert len(answer.content) < 2_000  # what was sent is not sent back


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT, LIMIT + 1, 10 * LIMIT])
@pytest.mark.parametrize("declared", [True, False])
def test_bodies_at_the_limit(strict: Served, size: int, declared: bool) -> None:
    prefix = b'{"prompt": [1], "max_tokens": 1, "user": "x"'
    body = prefix + b" " * (size - len(prefix) - 1) + b"}"
    if declared:
        answer = strict.post("/v1/completions", content=body)
    else:
        pieces = (body[i : i + 4_096] for i in range(0, len(body), 4_096))  # chunked: the length is not known
        answer = strict.post("/v1/completions", content=pieces)
    assert answer.status_code == (200 if size <= LIMIT else 413), answer.text
    if size > LIMIT:
        assert str(LIMIT) in answer.json()["error"]["message"]


@pytest.mark.parametrize("count", [VALUES - 1, VALUES, VALUES + 1])
@pytest.mark.parametrize("declared", [True, False])
def test_bodies_of_many_values(strict: Served, count: int, declared: bool) -> None:
    many = ",".join(["5"] * (count - 8))  # beside three objects, two lists, two texts and a number
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "chat_template_kwargs": {"a": [%s]}}'
    body %= many.encode()
    content = body if declared else (body[i : i + 1_000] for i in range(0, len(body), 1_000))
    answer = strict.post("/v1/chat/completions", content=content)
    assert answer.status_code == (200 if count <= VALUES else 413), answer.text
    if count > VALUES:
        error = answer.json()["error"]
        assert error["code"] == "request_too_large"
        assert f"more than {VALUES} " in error["message"]
        assert "--max-request-values" in error["message"]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("piece", [b"1,", b" " * 64])
def test_who_sends_megabytes_in_vain_sees_why(served: Served, piece: bytes, declared: bool) -> None:
    """More than the buffers between the two hold, over each of the limits."""
    body = b'{"prompt": [' + piece * ((20 << 20) // len(piece)) + b"1]}"
    content = body if declared else (body[i : i + 65_536] for i in range(0, len(body), 65_536))
    answer = served.post("/v1/completions", content=content)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_commas_of_a_text_are_no_values(strict: Served) -> None:
    text = '\\"' + ",[{" * (VALUES // 2)
    answer = strict.post("/v1/completions", {"prompt": text, "max_tokens": 1})
    assert "maximum context length" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("prompts", "n"),
    [(SAMPLES, 1), (SAMPLES // 2, 2), (1, SAMPLES), (SAMPLES + 1, 1), (SAMPLES // 2 + 1, 2), (2, SAMPLES)],
)
def test_samples_of_all_prompts_together(strict: Served, prompts: int, n: int) -> None:
    answer = strict.post("/v1/completions", {"prompt": [[5]] * prompts, "n": n, "max_tokens": 1})
    if prompts * n <= SAMPLES:
        assert answer.status_code == 200, answer.text
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(prompts * n))
        return
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == ("n" if n > 1 else "prompt")
    assert f"{prompts * n} samples, over the limit of {SAMPLES}" in error["message"]


def test_samples_of_a_chat(strict: Served) -> None:
    answer = strict.chat("Hello", n=SAMPLES + 1, max_tokens=1)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"
    assert strict.chat("Hello", n=SAMPLES, max_tokens=1).status_code == 200


@pytest.mark.parametrize(("size", "over"), [(LIMIT // 50, False), (LIMIT // 50 + 1, True)])
@pytest.mark.parametrize("told", [{"n": 50, "echo": True}, {"n": 25, "echo": True, "logprobs": 1}])
def test_prompts_told_again_with_each_sample(strict: Served, told: dict[str, object], size: int, over: bool) -> None:
    answer = strict.post("/v1/completions", {"prompt": "x" * size, "max_tokens": 1, **told})
    assert answer.status_code == (400 if over else 200), answer.text
    if over:
        error = answer.json()["error"]
        assert error["param"] == "echo"
        assert f"make {50 * size}; the limit is {LIMIT}" in error["message"]


def test_others_are_served_while_the_largest_request_is(served: Served) -> None:
    """As many samples as one request may have, without the flags of `strict`."""
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": ["Once upon a time"] * 2_048, "n": 2, "max_tokens": 1}
        largest = pool.submit(served.post, "/v1/completions", body)
        answered = 0
        while not largest.done():
            assert served.get("/health").status_code == 200
            answered += 1
    answer = largest.result()
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 4_096
    assert answered > 1


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65_536):
            data += piece
    except ConnectionResetError:
        pass  # it was cut off, with something of ours unread
    return data


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / NONSENSE\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),  # TLS
        (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 12_000, b"431"),
        (b"GET /" + b"x" * 70_000, b"431"),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 66_000 + b"\r\n\r\n", b"431"),  # whole, perhaps in one piece
        (b"GET /" + b"x" * 66_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n{}", b"400"),
        (b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", b"404"),
        (b"GET /%ff%00 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", b"404"),
    ],
    ids=lambda value: value[:30].decode("latin-1"),
)
def test_raw_connections(strict: Served, sent: bytes, status: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(sent)
        require_error(read_all(connection), status)


def require_error(answer: bytes, status: bytes) -> None:
    assert answer.split(b" ", 2)[1] == status, answer
    assert b'{"error":' in answer


def test_who_sends_no_more_is_not_waited_for(strict: Served) -> None:
    """All at once, since each takes as long as the gateway waits."""
    begun = (
        b"",
        b"GET /health HTTP/1.1\r\nhost: x\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{",
    )
    with ExitStack() as open_ones:
        connections = [open_ones.enter_context(strict.connect()) for _ in begun]
        for connection, sent in zip(connections, begun, strict=True):
            connection.sendall(sent)
        for connection in connections:
            require_error(read_all(connection), b"408")


def test_a_head_that_comes_byte_by_byte(strict: Served) -> None:
    """Each byte comes in time, the whole does not."""
    with strict.connect() as connection:
        for byte in b"GET /health HTTP/1.1\r\nx: " + b"y" * 200:
            if select.select([connection], [], [], 0.02)[0]:
                break
            connection.sendall(bytes([byte]))
        assert b" 408 " in read_all(connection)


def test_connections_over_the_limit_are_turned_away(strict: Served) -> None:
    open_ones = [strict.connect() for _ in range(60)]
    try:
        answers = [read_all(connection) for connection in open_ones]  # the others are timed out
    finally:
        for connection in open_ones:
            connection.close()
    turned_away = [answer for answer in answers if b" 503 " in answer]
    assert 20 <= len(turned_away) < 60
    assert all(b"retry-after" in answer for answer in turned_away)


def request_of(body: object) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


LONG = {"prompt": [5], "max_tokens": 4_000, "ignore_eos": True, "temperature": 0}


def running(strict: Served) -> int:
    with Client(strict.address) as client:
        stats = client.stats()
        return stats.running + stats.waiting


def wait_until_free(strict: Served) -> None:
    with Client(strict.address) as client:
        ask_until(lambda: settled(client.stats()))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_request_along(strict: Served, stream: bool) -> None:
    with strict.connect() as connection:
        connection.sendall(request_of({**LONG, "stream": stream, "n": 1}))
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            ask_until(lambda: running(strict))
    wait_until_free(strict)


def test_a_client_that_never_reads_is_cut_off(strict: Served) -> None:
    """What it does not read fills the buffers, then its time is up, and its requests end."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.settimeout(DEADLINE_S)
        host, port = strict.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        body = {**LONG, "prompt": [[5]] * 24, "stream": True, "return_token_ids": True, "logprobs": 20}
        connection.sendall(request_of(body))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until_free(strict)


def test_a_flood_on_one_connection_is_answered_in_turn(strict: Served) -> None:
    one = request_of({"prompt": [5, 6], "max_tokens": 2, "temperature": 0})
    answer = b""
    with strict.connect() as connection:
        connection.sendall(one * 50)
        while answer.count(b"HTTP/1.1 200 OK") < 50 or answer.count(b"prompt_token_ids") < 50:
            piece = connection.recv(65_536)
            assert piece, answer[-300:]
            answer += piece
