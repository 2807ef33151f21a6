"""Several gateways on one port, as `tandem serve --api-server-count` starts them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from tandem.gateway.config import GatewayConfig
from tandem.gateway.listening import listen, reserve
from tandem.launch.gateways import Gateways
from tandem.protocol.errors import ConfigurationError

from support.asking import ask_until
from support.commands import tandem
from support.deadlines import DEADLINE_S
from support.gateway import Served, gateway, service

pytestmark = pytest.mark.thorough


def processes(served: Served) -> dict[int, GatewayConfig]:
    """The service's gateways by process id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        words = process.cmdline()
        if "tandem.gateway.main" in words:
            config = GatewayConfig.model_validate_json(words[words.index("--config-json") + 1])
            if config.scheduler == served.address:
                found[process.pid] = config
    return found


def await_count(served: Served, requests: int) -> str:
    """Asks until so many requests are counted and none but the question is open: an answer is counted after it was
    sent. Returns the page."""
    wanted = (
        f'http_requests_total{{handler="/version",method="GET",status="200"}} {requests}.0',
        "http_requests_in_progress 1.0",
    )

    def page() -> str | None:
        found = served.get("/metrics").text
        return found if all(f"{line}\n" in found for line in wanted) else None

    return ask_until(page)


def test_several_share_a_port_count_together_and_replace_each_other(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("api-server-count: 3\nreconnect-timeout: 4.5\n")
    with service("--config", str(config)) as several:
        port = several.url.rpartition(":")[2]
        configs = processes(several)
        assert [(one.port, one.reconnect_timeout) for one in configs.values()] == [(int(port), 4.5)] * 3
        for _ in range(50):  # each on a connection of its own
            assert several.get("/version").status_code == 200
        for _ in range(5):  # whichever is asked
            assert await_count(several, 50).count("tandem:scheduler_up 1.0") == 1

        victim = psutil.Process(next(iter(configs)))
        victim.send_signal(signal.SIGKILL)
        victim.wait(DEADLINE_S)
        ask_until(lambda: len(processes(several)) == 3)  # the launcher sees to that
        for _ in range(50):
            assert several.get("/version").status_code == 200
        several.require_healthy()
        await_count(several, 100)
        refuse_to_share(several, "--api-server-count", "2")


def refuse_to_share(served: Served, *more: str) -> None:
    """Another service does not get into the port."""
    port = served.url.rpartition(":")[2]
    with tandem("serve", "--address", f"{served.address}-2", "--port", port, *more, environment={}) as command:
        assert command.finish() == 2, command.output
    assert f"port {port} of 127.0.0.1 is taken by another process; --port names another" in command.output
    assert "Traceback" not in command.output


def test_a_port_that_is_taken_is_not_shared(served: Served) -> None:
    refuse_to_share(served, "--api-server-count", "2")


def test_gateways_that_others_start_can_share_a_port(served: Served) -> None:
    with reserve(GatewayConfig(scheduler=served.address, port=0)) as reserved:
        flags = ["--port", str(reserved.getsockname()[1]), "--reuse-port"]
        with gateway(served.address, *flags) as (one, _), gateway(served.address, *flags) as (two, _):
            assert one.url == two.url
            one.require_healthy()


def test_a_reserved_port_is_for_those_who_share() -> None:
    config = GatewayConfig(scheduler="ipc:///unused", port=0)
    with reserve(config) as reserved:
        port = reserved.getsockname()[1]
        with (
            listen(config.model_copy(update={"port": port, "reuse_port": True})) as one,
            listen(config.model_copy(update={"port": port, "reuse_port": True})) as two,
        ):
            one.listen()
            two.listen()
            for take in (listen, reserve):
                with pytest.raises(ConfigurationError, match=f"port {port} of 127.0.0.1 is taken"):
                    take(config.model_copy(update={"port": port}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--api-server-count", "0"], "--api-server-count: must be from 1 to 256, not 0"),
        (["serve", "--no-http", "--api-server-count", "2"], "--no-http leaves --api-server-count nothing to be about"),
        (["serve", "--name", "gateway-1"], "--name: 'gateway-1' names the gateway already"),
        (["gateway", "--reuse-port", "--port", "0"], "--reuse-port: needs a --port"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    with tandem(*arguments, environment={}) as command:
        assert command.finish() == 2
    assert message in command.output


def test_a_file_says_how_many(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(json.dumps({"api-server-count": "two"}))
    with tandem("serve", "--config", str(config), environment={}) as command:
        assert command.finish() == 2
    assert "--api-server-count: must be a whole number, not 'two'" in command.output


def test_what_is_opened_is_given_back() -> None:
    gateways = Gateways({"port": 0}, "ipc:///unused", 2)
    specs = gateways.open(None)
    shared = Path(specs[0].environment["PROMETHEUS_MULTIPROC_DIR"])
    assert shared.is_dir()
    gateways.close()
    gateways.close()
    assert not shared.exists()
