"""Clients and workers that speak the real protocol to a real scheduler service, and do exactly what a test says."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zmq

from tandem.protocol import messages
from tandem.protocol.codec import decode, encode
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
from tandem.protocol.transport import LoopSocket, Sent, open_dealer
from tandem.scheduler.config import SchedulerConfig
from tandem.scheduler.service import Service

from support.simulated_worker import SimulatedWorker

DEADLINE_S = 20.0
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

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.got: list[Any] = []
        self.arrived = asyncio.Event()
        self.socket = LoopSocket(open_dealer(context, endpoint), self._on_frames)

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


class ScriptedClient(Peer):
    async def hello(self) -> None:
        await self.send(ClientHello(version=PROTOCOL_VERSION, name="scripted"))

    async def submit(self, ticket: int, prompt: list[int], max_tokens: int = 5, timeout_s: float | None = None) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        column = np.array(prompt, np.int32)
        await self.send(Submit(ticket=ticket, prompt=column, sampling=sampling, timeout_s=timeout_s))

    def tokens(self, ticket: int) -> list[int]:
        """Received so far, offsets checked."""
        found: list[int] = []
        for message in self.got:
            if isinstance(message, messages.Tokens):
                columns = (message.ticket, message.offset, message.token)
                for owner, offset, token in zip(*(column.tolist() for column in columns), strict=True):
                    if owner == ticket:
                        assert offset == len(found)
                        found.append(token)
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
        **changes: Any,
    ) -> None:
        super().__init__(context, endpoint)
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
    context: zmq.Context[zmq.Socket[bytes]]
    peers: list[Peer] = field(default_factory=list)

    def client(self) -> ScriptedClient:
        made = ScriptedClient(self.context, f"{self.address}/clients")
        self.peers.append(made)
        return made

    def worker(self, instance: int = 1, manual: bool = False, **changes: Any) -> ScriptedWorker:
        made = ScriptedWorker(self.context, f"{self.address}/workers", instance, manual, **changes)
        self.peers.append(made)
        return made


@asynccontextmanager
async def scene(**options: Any) -> AsyncIterator[Scene]:
    """A scheduler service of its own on the running loop. An exception in one of its callbacks fails the test."""
    folder = Path(tempfile.mkdtemp(prefix="ts-"))
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, details: failures.append(details))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = f"ipc://{folder}/run"
    made = Scene(Service(SchedulerConfig(address=address, **options), context), address, context)
    try:
        yield made
    finally:
        for peer in made.peers:
            peer.close()
        made.service.close()
        context.term()
        left = os.listdir(folder)
        shutil.rmtree(folder)
    assert left == []
    assert failures == []
