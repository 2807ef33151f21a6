"""Which service a command talks to: the one that was named, the user's running one, or one of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..protocol.errors import ConfigurationError, ServiceUnavailable, TandemError
from ..protocol.keys import peer_keys
from ..protocol.transport import Address, default_address
from .config import Options
from .embedded import EmbeddedSystem
from .progress import StartDisplay, note
from .signals import interrupt_main_thread, uninterrupted
from .supervisor import ChildDied

NEUTRAL = ("keys", "insecure", "log_level", "log_format")
"""Options that do not by themselves ask for a system of one's own."""


TCP_ANSWER_S = 10.0
"""How long a host may take to accept a connection."""


@dataclass(frozen=True)
class Service:
    """A service to connect to."""

    address: str
    keys: str | None
    """Key file or directory, if one was named."""
    insecure: bool
    embedded: EmbeddedSystem | None
    """The system behind it, if it is our own."""

    @property
    def is_over(self) -> bool:
        """Whether it was our own and has died: an interrupt then means that, and not Ctrl-C."""
        return self.embedded is not None and self.embedded.death is not None


@contextmanager
def service(
    connect: str | None,
    worker_options: Options,
    *,
    embed: bool = False,
    scheduler_options: Options = {},  # noqa: B006  (a Mapping: nobody changes it)
    data_parallel_size: int = 1,
) -> Iterator[Service]:
    """The service that `connect` names; else, without options for a worker and unless `embed`, the one at
    $TANDEM_ADDRESS or this user's running one; else an embedded system that lives as long as the block, with these
    options for its scheduler and so many workers.

    Call it in the main thread, within ending_interrupts(): if a process of the embedded system dies, the block is
    interrupted and ChildDied raised. Raises ConfigurationError if the options contradict each other.
    """
    keys, insecure = worker_options.get("keys"), bool(worker_options.get("insecure"))
    asked = [name for name in worker_options if name not in NEUTRAL]
    if connect is not None:
        if asked:
            raise ConfigurationError(
                f"--connect names a running service, and --{asked[0].replace('_', '-')} is for starting one; "
                "give one of the two"
            )
        yield _running(connect, keys, insecure)
        return
    if not asked and not embed:
        address = default_address()
        if os.environ.get("TANDEM_ADDRESS") or answers(address):
            note(f"Using the service at {address.url}.")
            yield _running(address.url, keys, insecure)
            return
    yield from _embedded(worker_options, scheduler_options, data_parallel_size)


def running(connect: str | None, keys: str | None, insecure: bool) -> Service:
    """The service that `connect` names, or the one at $TANDEM_ADDRESS, or this user's. Raises ServiceUnavailable at
    once if nobody can be there."""
    return _running(connect or default_address().url, keys, insecure)


def _running(url: str, keys: str | None, insecure: bool) -> Service:
    """A service that was named. Raises ServiceUnavailable at once if nobody can be there."""
    address = Address(url)
    peer_keys(address, "clients", keys, insecure)  # the client reads them itself, but what is wrong comes first
    if not answers(address):
        flags = " --insecure" if insecure else ""
        raise ServiceUnavailable(
            f"nobody serves at {url}; start a service there with: tandem serve --address {url}{flags}"
        )
    return Service(url, keys, insecure, None)


def _embedded(worker_options: Options, scheduler_options: Options, data_parallel_size: int) -> Iterator[Service]:
    armed = False

    def on_death(_death: ChildDied) -> None:
        if armed:
            interrupt_main_thread()

    display = StartDisplay(as_json=worker_options.get("log_format") == "json")
    shared = {name: worker_options[name] for name in ("log_level", "log_format") if name in worker_options}
    scheduler_options = {**scheduler_options, **shared}
    system = EmbeddedSystem(
        worker_options,
        scheduler_options,
        data_parallel_size=data_parallel_size,
        listener=display,
        on_death=on_death,
    )
    try:
        with display:
            system.start()
        armed = True
        if system.death is None:
            yield Service(system.address, keys=None, insecure=False, embedded=system)
    except (KeyboardInterrupt, TandemError):
        if system.death is None:
            raise
    finally:
        armed = False
        with uninterrupted(redeliver=False):
            system.stop()
    if system.death is not None:
        raise system.death


def answers(address: Address) -> bool:
    """Whether somebody listens there."""
    if not address.is_ipc:
        host, _, port = address.url.removeprefix("tcp://").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), TCP_ANSWER_S).close()
        except OSError:
            return False
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.endpoint("clients").removeprefix("ipc://"))
        except OSError:
            return False
    return True
