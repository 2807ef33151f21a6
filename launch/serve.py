"""`tandem serve`, `tandem scheduler` and `tandem worker`: processes that run until somebody ends them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec

from ..gateway.config import KEY_VARIABLE, GatewayConfig
from ..protocol.errors import ConfigurationError
from ..protocol.keys import peer_keys
from ..protocol.status import StatusPipe
from ..protocol.transport import Address, default_address
from ..scheduler.config import SchedulerConfig
from .config import Options, build
from .progress import StartDisplay, note
from .signals import ending_interrupts, uninterrupted
from .status import Ready, StatusLines
from .system import System, place_workers


def serve(
    options: Options,
    data_parallel_size: int,
    *,
    http: bool | None,
    api_server_count: int | None,
    api_keys: Sequence[str],
) -> None:
    """Runs a scheduler, its workers and its gateways (one by default) until Ctrl-C, SIGTERM or SIGHUP, and then returns
    with nothing left behind. `http` None: HTTP if its packages are installed.

    Raises ConfigurationError for options that cannot work, and ChildDied if a process ends unasked.
    """
    options = {"address": default_address().url, **options}
    has_http = _has_http(options, http, api_server_count, api_keys)
    # The scheduler's options and the workers' share a configuration file and flags; each takes its own.
    display = StartDisplay(as_json=options.get("log_format") == "json")
    system = System(
        options,
        options,
        data_parallel_size=data_parallel_size,
        gateway=options if has_http else None,
        api_server_count=1 if api_server_count is None else api_server_count,
        api_keys=api_keys,
        listener=display,
    )
    with ending_interrupts(once=True) as ending:
        began = time.monotonic()
        try:
            with display:
                system.start()
            _print_ready(system, time.monotonic() - began)
            death = system.wait_for_death()
            if death is not None:
                raise death
        except KeyboardInterrupt:
            ending.is_last = True
        finally:
            with uninterrupted(redeliver=False):  # a process that died is no reason to stop half-way either
                if ending.is_last:
                    system.tell("Stopping.")
                system.stop()


def _has_http(options: Options, http: bool | None, count: int | None, api_keys: Sequence[str]) -> bool:
    """Whether there is to be a gateway. Raises ConfigurationError if it was asked for and cannot be."""
    asked = [name for name in GatewayConfig.model_fields if name in options and name not in SHARED]
    asked += [] if count is None else ["api_server_count"]
    if http is False:
        if asked:
            raise ConfigurationError(f"--no-http leaves --{asked[0].replace('_', '-')} nothing to be about")
        return False
    missing = missing_http_packages()
    if not missing:
        return True
    if http or asked or api_keys:
        raise ConfigurationError(_no_http(missing))
    note(f"{_no_http(missing)} Serving without HTTP.")
    return False


SHARED = ("scheduler", "keys", "insecure", "log_level", "log_format")
"""Options of a gateway that do not by themselves ask for one."""


def missing_http_packages() -> list[str]:
    """Packages of the extra `http` that are not installed."""
    return [name for name in ("fastapi", "uvicorn", "httptools", "prometheus_client") if find_spec(name) is None]


def require_http_packages() -> None:
    """Raises ConfigurationError if one is missing."""
    missing = missing_http_packages()
    if missing:
        raise ConfigurationError(_no_http(missing))


def _no_http(missing: Sequence[str]) -> str:
    return f"HTTP needs packages that are not installed ({', '.join(missing)}): pip install 'tandem-serve[http]'."


def run_gateway(options: Options, api_keys: Sequence[str]) -> int:
    """Runs a gateway in this process until SIGTERM or SIGINT; returns its exit code."""
    require_http_packages()
    config = build(GatewayConfig, {"scheduler": default_address().url, **options})
    peer_keys(Address(config.scheduler), "clients", config.keys, config.insecure)  # what is wrong comes first
    if api_keys:
        os.environ[KEY_VARIABLE] = ",".join(api_keys)
    from ..gateway.main import run

    return run(config)


def run_scheduler(options: Options) -> int:
    """Runs the scheduler in this process until SIGTERM or SIGINT; returns its exit code."""
    from ..scheduler.main import run

    return run(build(SchedulerConfig, {"address": default_address().url, **options}))


def run_worker(options: Options) -> int:
    """Runs a worker in this process until SIGTERM or SIGINT, showing how its start proceeds; returns its exit code."""
    (place,) = place_workers(options, 1, options.get("scheduler") or default_address().url)
    from ..worker.main import run  # imports torch: not before the options are known to be good

    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    name = place.config.name
    display = StartDisplay()

    def show() -> None:
        with display:
            lines = StatusLines()
            while data := os.read(read_end, 65_536):
                for status in lines.feed(data):
                    display.status(name, status)
                    if isinstance(status, Ready):
                        return

    reader = threading.Thread(target=show, name="tandem-start-display", daemon=True)
    reader.start()
    try:
        return run(place.config, StatusPipe(write_end))
    finally:
        os.close(write_end)
        reader.join()
        os.close(read_end)


def _print_ready(system: System, seconds: float) -> None:
    address = Address(system.address).reachable.url
    where = "" if address == default_address().url else f" --connect {address}"
    python = f'"{address}"'
    if system.scheduler.insecure and not Address(address).is_ipc:
        where, python = f"{where} --insecure", f"{python}, insecure=True"
    elif system.scheduler.keys is not None:
        where, python = f"{where} --keys {system.scheduler.keys}", f'{python}, keys="{system.scheduler.keys}"'
    count = f"{system.workers} workers" if system.workers > 1 else "1 worker"
    print(
        f"Serving {system.model_name} at {system.address} ({count}, ready in {seconds:.1f} s). Ctrl-C ends it.\n"
        f"  chat      tandem chat{where}\n"
        f'  a prompt  tandem generate{where} "What is 17 + 25?"\n'
        f"  Python    tandem.Client({python})"
        + ("" if system.http_url is None else f"\n  HTTP      {system.http_url}/v1"),
        flush=True,
    )
