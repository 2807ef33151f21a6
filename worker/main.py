"""`python -m tandem.worker.main --config-json '{…}'`: a worker process.

Little is imported here, so that signals and a bad address are answered at once: torch and transformers take seconds.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from ..protocol.errors import ConfigurationError, TandemError
from ..protocol.status import StatusPipe
from .stopping import StopSignals

if TYPE_CHECKING:
    from .config import WorkerConfig


def run(config: WorkerConfig, status: StatusPipe | None = None) -> int:
    """Loads the model and serves until SIGTERM or SIGINT, which it takes over for good (see StopSignals).

    Returns the exit code: 0 if it was asked to end; 1 if a step failed or the scheduler refused the worker; 2 if the
    model or the options cannot work.
    """
    return _run(config, status or StatusPipe(None), StopSignals(_interrupt))


def _run(config: WorkerConfig, status: StatusPipe, stopping: StopSignals) -> int:
    try:
        _serve(config, status, stopping)
    except BaseException as error:  # noqa: BLE001 - told, all of it
        if stopping.asked:
            return 0  # whatever an import or a download makes of being interrupted
        return _explain(error, status)
    return 0


def _serve(config: WorkerConfig, status: StatusPipe, stopping: StopSignals) -> None:
    from ..protocol.keys import peer_keys
    from ..protocol.logs import configure
    from ..protocol.tracing import Tracer
    from ..protocol.transport import Address
    from .link import Link
    from .sources import ModelSource, folder_here

    if sys.flags.optimize > 1:
        raise ConfigurationError(
            "python -OO and PYTHONOPTIMIZE=2 take docstrings away, without which transformers loads no model; use -O"
        )
    folder_here(ModelSource(config.model, config.revision))  # a name that is mistyped is told at once
    log_writer = configure(config.name or "worker", config.log_level, config.log_format)
    try:
        address = Address(config.scheduler)
        tracer = Tracer(config.name or "worker", config.trace_dir)
        track = tracer.track("link", "receive plan", "send result")
        link = Link(address, peer_keys(address, "workers", config.keys, config.insecure), track)
        try:
            status.progress("importing torch and transformers", 0.0)
            with _collector_at_rest():
                from .process import serve

            serve(config, status, link, stopping, tracer)
        finally:
            link.close()
            tracer.write()
    finally:
        log_writer.close()


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """The cycle collector does not run, and looks at what was made meanwhile no more: three thousand modules, of which
    nothing becomes garbage. It took a third of the time that importing them takes."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _explain(error: BaseException, status: StatusPipe) -> int:
    """Says why the worker ends; returns the exit code. What nobody foresaw comes with its traceback."""
    if isinstance(error, ConfigurationError):
        return _fail(status, str(error), 2)
    if isinstance(error, TandemError):
        return _fail(status, str(error), 1)
    traceback.print_exception(error)
    first_line = (str(error).splitlines() or [""])[0]
    return _fail(status, f"{type(error).__name__}: {first_line}", 1)


def _fail(status: StatusPipe, message: str, code: int) -> int:
    status.error(message)
    sys.stderr.write(f"tandem worker: {message}\n")
    return code


def _interrupt() -> None:
    raise KeyboardInterrupt


def _leave(code: int) -> NoReturn:
    """Ends the process without taking the interpreter apart, which may wait for a device that hangs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    # In a process of its own nothing is lost by leaving on the spot until the scheduler knows of the worker. An
    # exception would surface anywhere, in a destructor in the midst of an import for example.
    stopping = StopSignals(lambda: _leave(0))
    parser = argparse.ArgumentParser(prog="tandem worker")
    parser.add_argument("--config-json", required=True, help="the fields of WorkerConfig as a JSON object")
    parser.add_argument("--status-fd", type=int, default=None, help="file descriptor that takes status lines (JSON)")
    arguments = parser.parse_args(argv)
    status = StatusPipe(arguments.status_fd)

    from pydantic import ValidationError

    from .config import WorkerConfig

    try:
        config = WorkerConfig.model_validate_json(arguments.config_json)
    except ValidationError as error:
        return _fail(status, str(error), 2)
    return _run(config, status, stopping)


if __name__ == "__main__":
    _leave(main())
