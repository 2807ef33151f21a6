"""A whole system as child processes: one scheduler, its workers, and what must be cleared away when they are gone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..protocol.errors import ConfigurationError
from ..protocol.keys import keys_path, server_keys
from ..protocol.transport import Address, ServiceDirectory
from ..scheduler.config import SchedulerConfig
from ..worker.config import WorkerConfig
from .builtin import MODEL_DIR
from .child import ChildSpec
from .config import Options, build
from .directory import PrivateDirectory
from .gateways import GATEWAY_NAME, GATEWAY_READY_S, Gateways
from .relay import Listener
from .restarts import RestartPolicy, SupervisionConfig
from .status import Ready
from .supervisor import GRACE_S, ChildDied, Supervisor

BUILTIN_NAME = "tandem-builtin"
SCHEDULER = "scheduler"
SCHEDULER_READY_S = 60.0
SCHEDULER_FIRST_DELAY_S = 0.01
"""Every stream waits for a scheduler that is started again; nothing of the one before is to be waited for."""


@dataclass(frozen=True)
class WorkerPlace:
    """A worker's configuration, and what its environment adds: which GPU it sees."""

    config: WorkerConfig
    environment: dict[str, str] = field(default_factory=dict)


class System:
    """Scheduler and workers. `start()` returns when all are ready; `stop()` ends all, and is idempotent.

    A process that has been ready and ends unasked, or hangs, is started again. `on_death` is called by another thread
    when one is not, since it ended too often (--max-restarts) or before it was ever ready; by then the others are being
    ended too.
    """

    def __init__(
        self,
        scheduler: Options,
        worker: Options,
        *,
        data_parallel_size: int = 1,
        gateway: Options | None = None,
        api_server_count: int = 1,
        api_keys: Sequence[str] = (),
        listener: Listener,
        on_death: Callable[[ChildDied], None] | None = None,
    ) -> None:
        """Checks the options, and starts nothing. `scheduler` must hold an address, and may hold the options of
        SupervisionConfig; without `gateway` there is no HTTP, with it are
        `api_server_count` processes for it. Raises ConfigurationError."""
        self._workers_directory: PrivateDirectory | None = None
        self._supervisor: Supervisor | None = None
        self._listener = listener
        self._on_death = on_death
        self._scheduler_options = scheduler
        self._worker_options = worker
        self.scheduler = build(SchedulerConfig, scheduler)
        self.supervision = build(SupervisionConfig, scheduler)
        _require_keys(self.scheduler)
        self._gateways: Gateways | None = None
        if gateway is not None:
            self._gateways = Gateways(gateway, Address(self.address).reachable.url, api_server_count, api_keys)
        first = place_workers(worker, data_parallel_size, self.address)[0].config
        self.model_name = first.served_model_name or first.model
        """What the workers serve, as clients call it."""
        self.workers = data_parallel_size

    @property
    def address(self) -> str:
        """Where clients connect."""
        return self.scheduler.address

    @property
    def http_url(self) -> str | None:
        """Where HTTP is served; None before `start`, or without a gateway."""
        if self._supervisor is None or self._gateways is None:
            return None
        ready = filter(None, map(self._supervisor.ready.get, self._gateways.names))
        return next((str(one.details.get("url")) for one in ready), None)

    @property
    def death(self) -> ChildDied | None:
        """The first process that ended unasked and was not started again."""
        return None if self._supervisor is None else self._supervisor.death

    def start(self) -> list[Ready]:
        """Starts the scheduler and then the workers; returns what each worker said when it was ready.

        Raises ChildDied if a process ends instead. Whatever is raised, `stop()` is still to be called.
        """
        if self._supervisor is not None:
            raise RuntimeError("this system has been started before")
        if not Address(self.address).is_ipc and self.scheduler.worker_address is None:
            # Workers are on this machine, whatever the clients use: they get a private way in.
            self._workers_directory = PrivateDirectory()
            address = f"ipc://{self._workers_directory.path}"
            self.scheduler = self.scheduler.model_copy(update={"worker_address": address})
        self._supervisor = supervisor = Supervisor(self._listener, self._on_death)
        restart = RestartPolicy(max_restarts=self.supervision.max_restarts)
        supervisor.start(
            ChildSpec(
                SCHEDULER,
                "tandem.scheduler.main",
                _arguments(self.scheduler),
                last=True,
                restart=replace(restart, first_delay_s=SCHEDULER_FIRST_DELAY_S),
                ready_within_s=SCHEDULER_READY_S,
                silence_s=self.supervision.scheduler_lease,
            )
        )
        if self._gateways is not None:  # before the workers: a port that is taken must show before a model is loaded
            for spec in self._gateways.open(restart):
                supervisor.start(spec)
        # Workers connect only once they have loaded a model, long after the scheduler listens.
        where = self.scheduler.worker_address or self.scheduler.address
        where = Address(where).reachable.url
        options = self._worker_options
        if Address(where).is_ipc and "keys" in options:  # these are for the clients' port then
            options = {**options, "keys": None}
        places = place_workers(options, self.workers, where)
        for place in places:
            supervisor.start(
                ChildSpec(
                    place.config.name,
                    "tandem.worker.main",
                    _arguments(place.config),
                    place.environment,
                    restart=restart,
                    known_to=SCHEDULER,
                )
            )
        supervisor.wait_ready(SCHEDULER, SCHEDULER_READY_S)
        ready = [supervisor.wait_ready(place.config.name) for place in places]
        for name in () if self._gateways is None else self._gateways.names:
            supervisor.wait_ready(name, GATEWAY_READY_S)
        return ready

    def wait_for_death(self, timeout_s: float | None = None) -> ChildDied | None:
        """Blocks until a process ends unasked and is not started again, or for `timeout_s`."""
        if self._supervisor is None:
            raise RuntimeError("this system has not been started")
        return self._supervisor.wait_for_death(timeout_s)

    def tell(self, line: str) -> None:
        """Passes a line of ours to the listener, without waiting for it. Nothing happens before `start`."""
        if self._supervisor is not None:
            self._supervisor.tell(line)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Ends all processes and removes their sockets; kills what has not ended within `grace_s` seconds."""
        if self._supervisor is not None:
            self._supervisor.stop(grace_s)
            _clear(self.scheduler.address)
        if self._gateways is not None:
            self._gateways.close()
        if self._workers_directory is not None:
            self._workers_directory.close()


def place_workers(options: Options, count: int, address: str) -> list[WorkerPlace]:
    """One validated configuration for each of `count` workers that connect to `address`.

    On GPUs each worker gets one of its own, of those that are visible; raises ConfigurationError if there are fewer.
    """
    if count < 1:
        raise ConfigurationError(f"--data-parallel-size: must be at least 1, not {count}")
    name = options.get("name") or "worker"
    given = dict(options)
    if given.get("model") is None:
        given["model"] = str(MODEL_DIR)
        if given.get("served_model_name") is None:
            given["served_model_name"] = BUILTIN_NAME
    names = [name] if count == 1 else [f"{name}-{index}" for index in range(count)]
    for taken in names:
        if taken == SCHEDULER or GATEWAY_NAME.fullmatch(taken):
            raise ConfigurationError(f"--name: {taken!r} names the {taken.partition('-')[0]} already")
    configs = [build(WorkerConfig, {**given, "name": one, "scheduler": address}) for one in names]
    gpus = [] if count == 1 or configs[0].device == "cpu" else visible_gpus()
    if not gpus:
        return [WorkerPlace(config) for config in configs]
    if len(gpus) < count:
        raise ConfigurationError(
            f"--data-parallel-size {count}: each worker needs a GPU of its own, and {len(gpus)} "
            f"{'is' if len(gpus) == 1 else 'are'} visible"
        )
    return [WorkerPlace(config, {"CUDA_VISIBLE_DEVICES": gpu}) for config, gpu in zip(configs, gpus, strict=False)]


def visible_gpus(devices: Path = Path("/dev")) -> Sequence[str]:
    """The NVIDIA GPUs that a worker could use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip()]
    numbers = sorted(
        int(path.name.removeprefix("nvidia"))
        for path in devices.glob("nvidia[0-9]*")
        if path.name.removeprefix("nvidia").isdecimal()
    )
    # Device files keep their numbers in a container that sees some of them; CUDA counts what it sees from 0.
    return [str(index) for index in range(len(numbers))]


def _require_keys(config: SchedulerConfig) -> None:
    """Raises ConfigurationError if a tcp address needs keys that are not there, or keys are given and nothing needs
    them."""
    addresses = [Address(url) for url in (config.address, config.worker_address) if url is not None]
    for one in [address for address in addresses if not address.is_ipc] or addresses:
        if one.needs_keys(config.insecure, config.keys):
            server_keys(keys_path(config.keys))


def _arguments(config: SchedulerConfig | WorkerConfig) -> list[str]:
    return ["--config-json", config.model_dump_json()]


def _clear(address: str) -> None:
    """Removes the sockets that a killed scheduler left; those of another, live scheduler stay."""
    where = Address(address)
    if where.is_ipc and where.directory.exists():
        try:
            ServiceDirectory(where.directory).close()
        except ConfigurationError:
            return  # another scheduler serves there
