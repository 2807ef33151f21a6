"""Scheduler, workers and clients as real processes that are started again whenever they end, each reached through a
proxy of its own."""

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
    """One scheduler and some workers. Clients connect to `address`."""

    address: str
    direct: str
    """The scheduler itself, for somebody who only watches."""
    scheduler: Kept
    workers: list[Kept]
    clients_proxy: Proxy
    worker_proxies: list[Proxy]
    folder: Path
    model: dict[str, Any]
    victims: list[Kept] = field(default_factory=list)

    def add_victim(self, requests: int) -> None:
        """A client process of its own, with so many streams, that is to be killed."""
        command = [sys.executable, "-P", str(Path(__file__).with_name("victim.py")), self.address, str(requests)]
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
def chaos_service(folder: Path, model: dict[str, Any], workers: int) -> Iterator[ChaosService]:
    """Starts everything; ends everything. Nothing is ready yet: clients wait for a model by themselves."""
    clients_port, workers_port = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        clients_proxy = stack.enter_context(Proxy(clients_port))
        worker_proxies = [stack.enter_context(Proxy(workers_port)) for _ in range(workers)]
        scheduler = Kept(
            "scheduler",
            _command(
                "scheduler",
                {
                    "address": f"tcp://127.0.0.1:{clients_port}",
                    "worker_address": f"tcp://127.0.0.1:{workers_port}",
                    "insecure": True,
                    "client_lease": CLIENT_LEASE_S,
                    "worker_lease": WORKER_LEASE_S,
                },
            ),
            folder / "scheduler.log",
        )
        stack.callback(scheduler.stop)
        kept = []
        for i, proxy in enumerate(worker_proxies):
            options = {
                "scheduler": f"tcp://127.0.0.1:{proxy.port}",
                "insecure": True,
                "name": f"worker-{i}",
                "device": "cpu",
                "threads": 1,
                "batch_invariant": True,
                **model,
            }
            kept.append(Kept(f"worker-{i}", _command("worker", options), folder / f"worker-{i}.log"))
            stack.callback(kept[-1].stop)
        made = ChaosService(
            address=f"tcp://127.0.0.1:{clients_proxy.port}",
            direct=f"tcp://127.0.0.1:{clients_port}",
            scheduler=scheduler,
            workers=kept,
            clients_proxy=clients_proxy,
            worker_proxies=worker_proxies,
            folder=folder,
            model=model,
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
