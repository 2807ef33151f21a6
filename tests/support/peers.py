"""Clients and workers that speak the real protocol to a real scheduler service, and do exactly what a test says."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zmq

from tandem.launch.keys import ROLES, KeyDirectory
from tandem.protocol import messages
from tandem.protocol.codec import decode, encode
from tandem.protocol.keys import PeerFile, PeerKeys, read_key_file
from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    FetchFile,
    FileChunk,
    FileInfo,
    ModelDescription,
    StepPlan,
    StepResult,
    Submit,
    WorkerHello,
    WorkerWelcome,
)
from tandem.protocol.sampling import SamplingParams
from tandem.protocol.transport import Address, LoopSocket, Port, Sent, open_dealer
from tandem.protocol.wires import HANDSHAKE_EVENTS, monitor, read_event
from tandem.scheduler.config import SchedulerConfig
from tandem.scheduler.service import Service

from support.deadlines import DEADLINE_S, LONG_LEASE_S
from support.simulated_worker import SimulatedWorker

VOCAB = 50
FILES = {"tokenizer.json": bytes(range(256)) * 1_000, "tokenizer_config.json": b"{}"}
MODEL = ModelDescription(
    name="simulated", architecture="none", dtype="none", vocab_size=VOCAB, max_model_len=64, eos_token_ids=(3,)
)
EVERYTHING = tuple(
    cls for cls in vars(messages).values() if isinstance(cls, type) and cls.__module__ == messages.__name__
)

_T = TypeVar("_T")


async def until(condition: Callable[[], bool]) -> None:
    """Tries again with every turn of the loop; the caller sets the deadline."""
    for _ in itertools.count():
        if condition():
            return
        await asyncio.sleep(0)


class Peer:
    """A DEALER whose messages pile up in `got`."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: PeerKeys | None = None) -> None:
        self.handshakes: list[int] = []
        """What became of attempts to connect, over TCP: zmq.EVENT_HANDSHAKE_…, zmq.EVENT_DISCONNECTED."""
        self.monitor: LoopSocket | None = None
        self.got: list[Any] = []
        self.arrived = asyncio.Event()
        watch = self._watch if endpoint.startswith("tcp://") else None
        self.socket = LoopSocket(open_dealer(context, endpoint, keys, watch), self._on_frames)

    def _watch(self, dealer: zmq.Socket[bytes]) -> None:
        events = HANDSHAKE_EVENTS | int(zmq.EVENT_DISCONNECTED)
        self.monitor = LoopSocket(monitor(dealer, events), self._on_monitor)

    def _on_monitor(self, frames: list[bytes]) -> None:
        self.handshakes.append(read_event(frames).event)
        self.arrived.set()

    def _on_frames(self, frames: list[bytes]) -> None:
        message = decode(frames[0], *EVERYTHING)
        self.got.append(message)
        self.on_message(message)
        self.arrived.set()

    def on_message(self, message: Any) -> None:
        """For workers."""

    async def send(self, message: Any) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: self.socket.send([data]) is Sent.QUEUED)

    async def wait(self, condition: Callable[[], _T | None]) -> _T:
        """The condition's value once it is true; it is looked at whenever a message has arrived."""
        async with asyncio.timeout(DEADLINE_S):
            while not (value := condition()):
                self.arrived.clear()
                await self.arrived.wait()
            return value

    async def expect(self, cls: type[_T], count: int = 1) -> _T:
        """The `count`th message of a class."""

        def found() -> _T | None:
            matching = [one for one in self.got if isinstance(one, cls)]
            return matching[count - 1] if len(matching) >= count else None

        value = await self.wait(found)
        assert value is not None
        return value

    def close(self) -> None:
        self.socket.close(0)
        if self.monitor is not None:
            self.monitor.close(0)


class ScriptedClient(Peer):
    async def hello(self) -> None:
        await self.send(ClientHello(version=PROTOCOL_VERSION, name="scripted"))

    async def submit(self, ticket: int, prompt: list[int], max_tokens: int = 5, timeout_s: float | None = None) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        column = np.array(prompt, np.int32)
        await self.send(Submit(ticket=ticket, prompt=column, sampling=sampling, timeout_s=timeout_s))

    async def stats(self) -> messages.Stats:
        """Asks, and waits for the answer."""
        count = len([one for one in self.got if isinstance(one, messages.Stats)])
        await self.send(messages.AskStats())
        return await self.expect(messages.Stats, count + 1)

    def tokens(self, ticket: int) -> list[int]:
        """Received so far, offsets checked."""
        found: list[int] = []
        for message in self.got:
            if isinstance(message, messages.Tokens):
                ends = np.cumsum(message.count)
                columns = (message.ticket, message.offset, ends - message.count, ends)
                for owner, offset, start, end in zip(*(column.tolist() for column in columns), strict=True):
                    if owner == ticket:
                        assert offset == len(found)
                        found += message.token[start:end].tolist()
        return found

    def ended(self, ticket: int) -> messages.Ended | None:
        ends = [
            end for one in self.got if isinstance(one, messages.Tokens) for end in one.ended if end.ticket == ticket
        ]
        assert len(ends) <= 1
        return ends[0] if ends else None


class ScriptedWorker(Peer):
    """Answers questions for files and, unless `manual`, computes every plan at once."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        instance: int = 1,
        manual: bool = False,
        keys: PeerKeys | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(context, endpoint, keys)
        self.manual = manual
        self.greeting = WorkerHello(
            **{
                "version": PROTOCOL_VERSION,
                "name": f"worker-{instance}",
                "pid": 1,
                "instance": instance,
                "model": MODEL,
                "files": tuple(
                    FileInfo(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
                    for name, data in FILES.items()
                ),
                "num_blocks": 64,
                "block_size": 4,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 64,
                "lookahead": 1,
                **changes,
            }
        )
        self.welcome: WorkerWelcome | None = None
        self.answers_files = True
        self.simulated = SimulatedWorker(64, 4, 8, 64, VOCAB)

    async def hello(self) -> None:
        await self.send(self.greeting)

    def on_message(self, message: Any) -> None:
        match message:
            case FetchFile() if self.answers_files:
                data = FILES[message.name][message.offset : message.offset + 50_000]
                self.socket.send([encode(FileChunk(name=message.name, offset=message.offset, data=data))])
            case WorkerWelcome():
                self.welcome = message
                self.simulated = SimulatedWorker(64, 4, 8, 64, VOCAB)
            case StepPlan():
                assert self.welcome is not None
                if message.registration == self.welcome.registration:
                    self.simulated.plans.append(message)
                    if not self.manual:
                        self.compute()

    def compute(self) -> None:
        """Executes the oldest plan and sends its result."""
        assert self.welcome is not None
        step, tokens = self.simulated.compute()
        self.socket.send([encode(self.result(step, tokens))])

    def result(self, step: int, tokens: list[int]) -> StepResult:
        assert self.welcome is not None
        return StepResult(
            epoch=self.welcome.epoch,
            registration=self.welcome.registration,
            step=step,
            token=np.array(tokens, np.int32),
        )


@dataclass
class Scene:
    """A service and the peers that a test opens; all are closed with it."""

    service: Service
    address: str
    worker_address: str
    context: zmq.Context[zmq.Socket[bytes]]
    folder: Path
    """For what the test writes; the scheduler's sockets are in `run` below it."""
    peers: list[Peer] = field(default_factory=list)

    def client(self, keys: PeerKeys | None = None) -> ScriptedClient:
        made = ScriptedClient(self.context, Address(self.address).endpoint("clients"), keys)
        self.peers.append(made)
        return made

    def worker(
        self, instance: int = 1, manual: bool = False, keys: PeerKeys | None = None, **changes: Any
    ) -> ScriptedWorker:
        endpoint = Address(self.worker_address).endpoint("workers")
        made = ScriptedWorker(self.context, endpoint, instance, manual, keys, **changes)
        self.peers.append(made)
        return made

    @property
    def keys(self) -> Path:
        """The key directory of a keyed_scene."""
        return self.folder / "keys"

    def peer_keys(self, port: Port, name: str = "default") -> PeerKeys:
        """Those of a keyed_scene that have that name."""
        file = read_key_file(self.keys / port / f"{name}.key", PeerFile)
        return PeerKeys(file.public, file.secret, file.server)


@asynccontextmanager
async def scene(**options: Any) -> AsyncIterator[Scene]:
    """A scheduler service of its own on the running loop. Leases are long unless `options` say otherwise. An exception
    in one of its callbacks fails the test."""
    folder = Path(tempfile.mkdtemp(prefix="ts-"))
    try:
        async with _scene(folder, {"address": f"ipc://{folder}/run", **options}) as made:
            yield made
        assert os.listdir(folder) == []
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def keyed_scene(**options: Any) -> AsyncIterator[Scene]:
    """The same over TCP, with a key directory as `tandem keys create` makes it."""
    folder = Path(tempfile.mkdtemp(prefix="ts-"))
    directory = KeyDirectory(folder / "keys", make=True)
    directory.create_server()
    for port in ROLES.values():
        directory.create(port, "default")
    clients, workers = free_ports(2)
    addresses = {"address": f"tcp://127.0.0.1:{clients}", "worker_address": f"tcp://127.0.0.1:{workers}"}
    try:
        async with _scene(folder, {"keys": str(directory.path), **addresses, **options}) as made:
            yield made
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def _scene(folder: Path, options: dict[str, Any]) -> AsyncIterator[Scene]:
    options = {"worker_lease": LONG_LEASE_S, "client_lease": LONG_LEASE_S, **options}
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, details: failures.append(details))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    service = Service(SchedulerConfig(**options), context)
    made = Scene(service, options["address"], options.get("worker_address", options["address"]), context, folder)
    try:
        yield made
    finally:
        for peer in made.peers:
            peer.close()
        made.service.close()
        context.term()
    assert failures == []


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback that nobody used a moment ago."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
