"""Sockets and a clock around the core.

Messages are turned into events; events that arrive together are handled together; instructions are turned into
messages. All of it happens in callbacks of one asyncio loop, none of which ever waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack

import zmq

from ..protocol.errors import ConfigurationError
from ..protocol.transport import Address, LoopSocket, ServiceDirectory, open_router
from .client_port import ClientPort
from .config import SchedulerConfig
from .core import Core
from .events import Accept, Deliver, Event, Expel, Reject, SendPlan
from .worker_port import WorkerPort

STOPPING = "the scheduler is stopping"


class Service:
    """One life of the scheduler. Create it on a running loop; `close` ends it."""

    def __init__(self, config: SchedulerConfig, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Binds the sockets. Raises ConfigurationError if the addresses are unsafe, taken or do not fit together."""
        address = Address(config.address)
        worker_address = Address(config.worker_address or config.address)
        if not address.is_ipc and worker_address.url == address.url:
            raise ConfigurationError("with a tcp address, workers need an address of their own: give --worker-address")
        self.epoch = time.time_ns()
        self._loop = asyncio.get_running_loop()
        self._core = Core(
            self.epoch,
            max_waiting_requests=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
            watermark=config.watermark,
        )
        self._events: list[Event] = []
        self._flushing: asyncio.Handle | None = None
        self.clients = ClientPort(
            self.epoch, config.client_lease, self._post, self._loop.time, self._core, self._loop.call_later
        )
        self.workers = WorkerPort(
            self.epoch, config.worker_lease, self._post, self._loop.time, self._core, self.clients.serve_model
        )
        self.clients.worker_stats = self.workers.stats
        with ExitStack() as opened:
            for one in dict.fromkeys((address, worker_address)):
                one.require_safe(config.insecure)
                if one.is_ipc:
                    opened.callback(ServiceDirectory(one.directory).close)
            self.clients.attach(self._open(context, address.endpoint("clients"), self.clients.on_message))
            opened.callback(self.clients.close, STOPPING)
            self.workers.attach(self._open(context, worker_address.endpoint("workers"), self.workers.on_message))
            opened.callback(self.workers.close, STOPPING)
            self._opened = opened.pop_all()
        self._housekeeping = self._loop.create_task(self._keep_house(min(config.client_lease, config.worker_lease) / 4))

    def _open(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, on_message: Callable[[list[bytes]], None]
    ) -> LoopSocket:
        return LoopSocket(open_router(context, endpoint), on_message, self._loop)

    def close(self) -> None:
        """Tells everybody, closes the sockets and removes them from the file system."""
        self._housekeeping.cancel()
        self._opened.close()

    def _post(self, event: Event) -> None:
        """Hands an event to the core with whatever else arrives in this turn of the loop."""
        self._events.append(event)
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        events, self._events = self._events, []
        for instruction in self._core.handle(events, self._loop.time()):
            match instruction:
                case SendPlan():
                    self.workers.send_plan(instruction)
                case Deliver():
                    self.clients.deliver(instruction)
                case Accept():
                    self.clients.accept(instruction)
                case Reject():
                    self.clients.reject(instruction)
                case Expel():
                    self.workers.expel(instruction)

    async def _keep_house(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            now = self._loop.time()
            self.clients.expire(now)
            self.workers.expire(now)
