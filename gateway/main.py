"""`python -m tandem.gateway.main --config-json '{…}'`: a gateway process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys

import uvloop
from pydantic import ValidationError

from ..protocol.errors import ConfigurationError, TandemError
from ..protocol.logs import configure
from ..protocol.status import StatusPipe
from .app import make_app
from .backend import Backend
from .config import GatewayConfig, keys_in_environment
from .cors import with_cors
from .guard import Guard, Keys
from .listening import BACKLOG, listen, url_of
from .metrics import GatewayMetrics
from .server import Server, make_server

log = logging.getLogger(__name__)


def run(config: GatewayConfig, status: StatusPipe | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code: 0, or 2 for options that cannot work."""
    status = status or StatusPipe(None)
    log_writer = configure("gateway", config.log_level, config.log_format)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        return uvloop.run(_serve(config, status))
    except TandemError as error:
        status.error(str(error))
        sys.stderr.write(f"tandem gateway: {error}\n")
        return 2
    finally:
        log_writer.close()


async def _serve(config: GatewayConfig, status: StatusPipe) -> int:
    loop = asyncio.get_running_loop()
    backend, metrics = Backend(config), GatewayMetrics()
    keys = keys_in_environment()
    guard = Guard(
        make_app(config, backend, metrics),
        keys=Keys(keys),
        metrics=metrics,
        read_timeout_s=config.read_timeout_s,
        write_timeout_s=config.write_timeout_s,
    )
    listener = listen(config)
    try:
        server = make_server(config, with_cors(guard, config))
    except ConfigurationError:
        listener.close()
        raise
    if not keys and _is_public(listener.getsockname()[0]):
        log.warning("anyone who reaches %s may use the service: no API key is set", url_of(config, listener))
    if not keys and config.allowed_origins:
        log.warning("pages from %s may use the service: no API key is set", ", ".join(config.allowed_origins))
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    url = url_of(config, listener)
    watching = asyncio.create_task(backend.run())
    serving = asyncio.create_task(_serve_http(config, backend, stopping, server, listener))
    ready = asyncio.create_task(_say_ready(backend, status, url))
    ending = asyncio.create_task(stopping.wait())
    gc.collect()
    gc.freeze()
    try:
        await asyncio.wait({watching, serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        # What is open may end; then the client goes, and whatever is still open ends with an error that says so.
        backend.draining = True
        server.should_exit = True
        stopping.set()
        await asyncio.wait({serving}, timeout=config.shutdown_timeout)
        await backend.close()
        await serving
        if watching.done() and not watching.cancelled():
            watching.result()
    finally:
        for task in (ready, ending, watching):
            task.cancel()
        await asyncio.gather(ready, ending, watching, return_exceptions=True)
        await backend.close()
    return 0


async def _serve_http(
    config: GatewayConfig, backend: Backend, stopping: asyncio.Event, server: Server, listener: socket.socket
) -> None:
    """At a port of its own from now on, so that whoever asks is told what is missing. At one that it shares not before
    it has a model: until then, the others answer."""
    if config.reuse_port:
        events = [asyncio.create_task(event.wait()) for event in (backend.connected, stopping)]
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        for event in events:
            event.cancel()
        if stopping.is_set():
            listener.close()
            return
        listener.listen(BACKLOG)
    log.info("HTTP at %s", url_of(config, listener))
    await server.serve([listener])


async def _say_ready(backend: Backend, status: StatusPipe, url: str) -> None:
    await backend.connected.wait()
    status.ready(url=url, pid=os.getpid())


def _is_public(host: str) -> bool:
    return not ipaddress.ip_address(host.partition("%")[0]).is_loopback


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tandem gateway")
    parser.add_argument("--config-json", required=True, help="the fields of GatewayConfig as a JSON object")
    parser.add_argument("--status-fd", type=int, default=None, help="file descriptor that takes status lines (JSON)")
    arguments = parser.parse_args(argv)
    status = StatusPipe(arguments.status_fd)
    try:
        config = GatewayConfig.model_validate_json(arguments.config_json)
    except ValidationError as error:
        status.error(str(error))
        sys.stderr.write(f"tandem gateway: {error}\n")
        return 2
    return run(config, status)


if __name__ == "__main__":
    sys.exit(main())
