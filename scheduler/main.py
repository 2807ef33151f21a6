"""`python -m tandem.scheduler.main --config-json '{…}'`: the scheduler process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys

import uvloop
import zmq
from pydantic import ValidationError

from ..protocol.errors import ConfigurationError
from ..protocol.logs import configure
from ..protocol.process import allow_files
from ..protocol.status import StatusPipe
from ..protocol.tracing import Tracer
from .config import SchedulerConfig
from .connections import OPEN_FILES
from .service import Service

ALIVE_EVERY_S = 1.0
"""How often the loop tells the launcher that it turns."""


def run(config: SchedulerConfig, status: StatusPipe | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code: 0, or 2 for options that cannot work."""
    status = status or StatusPipe(None)
    allow_files(OPEN_FILES)
    log_writer = configure("scheduler", config.log_level, config.log_format)
    try:
        tracer = Tracer("scheduler", config.trace_dir)
        try:
            return uvloop.run(_serve(config, status, tracer))
        finally:
            tracer.write()
    except ConfigurationError as error:
        status.error(str(error))
        sys.stderr.write(f"tandem scheduler: {error}\n")
        return 2
    finally:
        log_writer.close()


async def _serve(config: SchedulerConfig, status: StatusPipe, tracer: Tracer) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        service = Service(config, context, tracer)
        calm_collector()
        status.ready(address=config.address, worker_address=config.worker_address or config.address)
        beating = loop.create_task(_tell_alive(service, status))
        await stopping.wait()
        beating.cancel()
        service.close()
    except BaseException:
        context.destroy(0)  # what failed may have left a socket, for whose end `term` would wait for ever
        raise
    context.term()
    return 0


async def _tell_alive(service: Service, status: StatusPipe) -> None:
    """From the loop that does the scheduler's work: when that hangs, this does."""
    while True:
        status.alive(workers=service.workers.pids())
        await asyncio.sleep(ALIVE_EVERY_S)


def calm_collector() -> None:
    """Makes the cycle collector look at what the program began with no more, and at the rest more rarely.

    Requests and blocks are freed by their reference counts; to look at a hundred thousand of them makes steps late.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tandem scheduler")
    parser.add_argument("--config-json", required=True, help="the fields of SchedulerConfig as a JSON object")
    parser.add_argument("--status-fd", type=int, default=None, help="file descriptor that takes status lines (JSON)")
    arguments = parser.parse_args(argv)
    status = StatusPipe(arguments.status_fd)
    try:
        config = SchedulerConfig.model_validate_json(arguments.config_json)
    except ValidationError as error:
        status.error(str(error))
        sys.stderr.write(f"tandem scheduler: {error}\n")
        return 2
    return run(config, status)


if __name__ == "__main__":
    sys.exit(main())
