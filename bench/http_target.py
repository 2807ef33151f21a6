"""The HTTP of a service that is measured: gateways of the benchmark's own, or an address that was given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..launch.connect import Service
from ..launch.gateways import GATEWAY_READY_S, Gateways
from ..launch.serve import require_http_packages
from ..launch.supervisor import PassThrough, Supervisor

API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key for --base-url, as vLLM's benchmark and OpenAI's client have it."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class HttpTarget:
    """Where HTTP is, and the processes that serve it, if they are ours."""

    base_url: str
    api_key: str = ""
    pids: tuple[int, ...] = ()

    def cpu_seconds(self) -> list[float]:
        """Processor time that each process has used, to a hundredth of a second; 0 if it has ended."""
        return [_cpu_seconds(pid) for pid in self.pids]


def given(base_url: str) -> HttpTarget:
    """The gateways at an address."""
    return HttpTarget(base_url, os.environ.get(API_KEY_VARIABLE, ""))


@contextmanager
def gateways(service: Service, count: int) -> Iterator[HttpTarget]:
    """So many gateway processes on a port of this machine, without keys, as long as the block runs. Raises
    ConfigurationError if the packages are missing, ChildDied if one does not start."""
    require_http_packages()
    options = {"port": 0, "log_level": "warning", "keys": service.keys, "insecure": service.insecure}
    processes = Gateways(options, service.address, count)
    supervisor = Supervisor(PassThrough())
    try:
        for spec in processes.open(restart=None):
            supervisor.start(spec)
        ready = [supervisor.wait_ready(name, GATEWAY_READY_S).details for name in processes.names]
        yield HttpTarget(ready[0]["url"], "", tuple(one["pid"] for one in ready))
        if supervisor.death is not None:
            raise supervisor.death
    finally:
        supervisor.stop()
        processes.close()


def _cpu_seconds(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(words[11]) + int(words[12])) / _TICKS
