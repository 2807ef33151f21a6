"""CORS: off unless origins are named, and no way around keys."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from pydantic import ValidationError

from tandem.gateway.config import GatewayConfig

from support.commands import tandem
from support.deadlines import DEADLINE_S
from support.gateway import Served, gateway

PAGE = "https://chat.example"
ASKING = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def preflight(served: Served, origin: str = PAGE, **more: str) -> httpx.Response:
    headers = {"origin": origin, **ASKING, **more}
    return httpx.options(f"{served.url}/v1/chat/completions", headers=headers, timeout=DEADLINE_S)


def allowed(answer: httpx.Response) -> dict[str, str]:
    """What the answer lets a browser do."""
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@pytest.fixture(scope="module")
def crossing(served: Served) -> Iterator[Served]:
    """A gateway with a key that one origin's pages may use."""
    origins = json.dumps([PAGE, "http://localhost:5173"])
    options = ("--allowed-origins", origins, "--allowed-headers", '["authorization"]', "--allow-credentials")
    with gateway(served.address, *options, keys="secret") as (found, _):
        yield found


def test_off_by_default(served: Served) -> None:
    answer = preflight(served)
    assert answer.status_code == 405
    assert not allowed(answer)
    answer = served.get("/v1/models", headers={"origin": PAGE})
    assert answer.status_code == 200
    assert not allowed(answer)


def test_a_preflight_needs_no_key(crossing: Served) -> None:
    answer = preflight(crossing)
    assert answer.status_code == 200
    found = allowed(answer)
    assert found["access-control-allow-origin"] == PAGE
    assert found["access-control-allow-credentials"] == "true"
    assert "POST" in found["access-control-allow-methods"]
    assert "authorization" in found["access-control-allow-headers"]


def test_others_are_not_let_in(crossing: Served) -> None:
    for answer in (
        preflight(crossing, "https://evil.example"),
        preflight(crossing, f"{PAGE}.evil.example"),
        preflight(crossing, "null"),
    ):
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in allowed(answer)
    assert preflight(crossing, **{"access-control-request-headers": "x-other"}).status_code == 400
    key = {"authorization": "Bearer secret"}
    answer = crossing.get("/v1/models", headers={"origin": "https://evil.example", **key})
    assert "access-control-allow-origin" not in allowed(answer)


def test_keys_are_needed_all_the_same(crossing: Served) -> None:
    key = {"authorization": "Bearer secret"}
    for path in ("/v1/models", "/v1/chat/completions"):
        for method in ("GET", "POST", "OPTIONS"):  # an OPTIONS that is no preflight is like any other request
            answer = httpx.request(method, crossing.url + path, headers={"origin": PAGE}, timeout=DEADLINE_S)
            assert answer.status_code == 401
            assert allowed(answer)["access-control-allow-origin"] == PAGE  # so that the page can read why
    answer = crossing.get("/v1/models", headers={"origin": PAGE, **key})
    assert answer.status_code == 200
    assert allowed(answer)["access-control-allow-origin"] == PAGE
    assert "x-request-id" in allowed(answer)["access-control-expose-headers"]
    body = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "stream": True}
    streamed = crossing.post("/v1/chat/completions", body, headers={"origin": PAGE, **key})
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert allowed(streamed)["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allowed_origins": "https://chat.example/"}, "no origin"),
        ({"allowed_origins": "chat.example"}, "no origin"),
        ({"allowed_origins": '["https://*.example"]'}, "no origin"),
        ({"allowed_origins": "[1"}, "JSON list"),
        ({"allowed_origins": "[1]"}, "string"),
        ({"allowed_origins": '["*"]', "allow_credentials": True}, "--allow-credentials: not with all origins"),
        ({"allow_credentials": True}, "needs --allowed-origins"),
        ({"allowed_methods": '["POST"]'}, "needs --allowed-origins"),
        ({"allowed_headers": ["x"]}, "needs --allowed-origins"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words.replace("*", r"\*")):
        GatewayConfig.model_validate({"scheduler": "ipc:///x", **options})


def test_a_configuration_travels_as_json() -> None:
    config = GatewayConfig.model_validate({"scheduler": "ipc:///x", "allowed_origins": f'["{PAGE}", "*"]'})
    assert config.allowed_origins == (PAGE, "*")
    assert GatewayConfig.model_validate_json(config.model_dump_json()) == config


def test_the_command_line_names_the_flag(served: Served) -> None:
    flags = ("--scheduler", served.address, "--port", "0", "--allowed-origins", "chat.example")
    with tandem("gateway", *flags, environment={}) as command:
        assert command.finish() == 2
        assert "--allowed-origins" in command.output
