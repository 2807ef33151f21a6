"""Scheduler, workers, gateways and clients as real processes that are started again whenever they end. Between them
and the scheduler are proxies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from support.deadlines import DEADLINE_S
from support.proxy import Proxy

WORKER_LEASE_S = 6.0
CLIENT_LEASE_S = 6.0


class Kept:
    """A process that is started again when it ends, until `stop`."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self._command = command
        self._log = log
        self._lock = threading.Lock()
        self._stopping = False
        self.started = 0
        self.killed = 0
        """How often it was sent SIGKILL."""
        self._start()
        self._thread = threading.Thread(target=self._keep, name=f"keeps {name}")
        self._thread.start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.started += 1

    def _keep(self) -> None:
        while True:
            self.process.wait()
            with self._lock:
                if self._stopping:
                    return
                self._start()

    def send(self, number: signal.Signals) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            self.killed += number == signal.SIGKILL
            self.process.send_signal(number)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            if self.process.poll() is None:
                self.process.kill()
        self._thread.join()

    def status(self) -> str:
        """Of the process, as the system calls it: running, sleeping, stopped …"""
        try:
            return psutil.Process(self.process.pid).status()
        except psutil.NoSuchProcess:
            return "gone"

    def descriptors(self) -> int:
        return psutil.Process(self.process.pid).num_fds()

    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@dataclass
class ChaosService:
    """One scheduler, some workers and some gateways. Clients connect to `address` with the options in `access`."""

    address: str
    direct: str
    """The scheduler itself, for somebody who only watches."""
    access: dict[str, Any]
    """`keys`, or that there are none."""
    scheduler: Kept
    workers: list[Kept]
    clients_proxy: Proxy
    worker_proxies: list[Proxy]
    gateways: list[Kept]
    gateway_urls: list[str]
    folder: Path
    victims: list[Kept] = field(default_factory=list)

    def add_victim(self, requests: int) -> None:
        """A client process of its own, with so many streams, that is to be killed."""
        script = str(Path(__file__).with_name("victim.py"))
        command = [sys.executable, "-P", script, self.address, json.dumps(self.access), str(requests)]
        self.victims.append(Kept(f"victim {len(self.victims)}", command, self.folder / "victims.log"))

    def stop_victims(self) -> None:
        while self.victims:
            self.victims.pop().stop()

    def logs(self) -> str:
        """The end of what each process wrote."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-40:]))
        return "\n".join(parts)


@contextlib.contextmanager
def chaos_service(
    folder: Path, model: dict[str, Any], workers: int, gateways: int = 0, keys: Path | None = None
) -> Iterator[ChaosService]:
    """Starts everything; ends everything. Nothing is ready yet: clients wait for a model by themselves. `keys`: a
    directory of keys, without which none are used."""
    clients_port, workers_port = free_port(), free_port()
    access: dict[str, Any] = {"insecure": True} if keys is None else {"keys": str(keys)}
    with contextlib.ExitStack() as stack:

        def keep(process: str, module: str, **options: Any) -> Kept:
            kept = Kept(process, _command(module, {**access, **options}), folder / f"{process}.log")
            stack.callback(kept.stop)
            return kept

        clients_proxy = stack.enter_context(Proxy(clients_port))
        worker_proxies = [stack.enter_context(Proxy(workers_port)) for _ in range(workers)]
        address = f"tcp://127.0.0.1:{clients_proxy.port}"
        scheduler = keep(
            "scheduler",
            "scheduler",
            address=f"tcp://127.0.0.1:{clients_port}",
            worker_address=f"tcp://127.0.0.1:{workers_port}",
            client_lease=CLIENT_LEASE_S,
            worker_lease=WORKER_LEASE_S,
        )
        own = {"device": "cpu", "threads": 1, "batch_invariant": True, **model}
        kept_workers = [
            keep(f"worker-{i}", "worker", scheduler=f"tcp://127.0.0.1:{proxy.port}", name=f"worker-{i}", **own)
            for i, proxy in enumerate(worker_proxies)
        ]
        ports = [free_port() for _ in range(gateways)]
        kept_gateways = [
            keep(f"gateway-{i}", "gateway", scheduler=address, port=port, reconnect_timeout=DEADLINE_S)
            for i, port in enumerate(ports)
        ]
        made = ChaosService(
            address=address,
            direct=f"tcp://127.0.0.1:{clients_port}",
            access=access,
            scheduler=scheduler,
            workers=kept_workers,
            clients_proxy=clients_proxy,
            worker_proxies=worker_proxies,
            gateways=kept_gateways,
            gateway_urls=[f"http://127.0.0.1:{port}" for port in ports],
            folder=folder,
        )
        stack.callback(made.stop_victims)
        yield made


def _command(module: str, options: dict[str, Any]) -> list[str]:
    return [sys.executable, "-P", "-m", f"tandem.{module}.main", "--config-json", json.dumps(options)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def own_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
