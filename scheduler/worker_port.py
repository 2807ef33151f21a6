"""The scheduler's conversation with workers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..protocol.codec import decode, encode
from ..protocol.errors import ProtocolError, VersionMismatch
from ..protocol.messages import (
    PROTOCOL_VERSION,
    FileChunk,
    Goodbye,
    Idle,
    ModelDescription,
    StepResult,
    UnknownPeer,
    VersionRefused,
    WorkerHello,
    WorkerStats,
    WorkerWelcome,
)
from ..protocol.transport import LoopSocket
from .core import Core
from .events import Event, Expel, SendPlan, StepDone, WorkerJoined, WorkerLimits, WorkerLost
from .files import FileStore
from .peers import WorkerPeer

log = logging.getLogger(__name__)


class WorkerPort:
    """Who the workers are; plans go out and results come in."""

    def __init__(
        self,
        epoch: int,
        lease_s: float,
        post: Callable[[Event], None],
        clock: Callable[[], float],
        core: Core,
        serve_model: Callable[[ModelDescription, FileStore], None],
    ) -> None:
        self._epoch = epoch
        self._lease_s = lease_s
        self._post = post
        self._clock = clock
        self._core = core
        self._serve_model = serve_model
        self._socket: LoopSocket | None = None
        self._by_route: dict[bytes, WorkerPeer] = {}
        self._by_registration: dict[int, WorkerPeer] = {}
        self._next_registration = 1
        self._model: ModelDescription | None = None
        self._files: FileStore | None = None

    def attach(self, socket: LoopSocket) -> None:
        self._socket = socket

    def close(self, reason: str) -> None:
        for peer in self._by_registration.values():
            self._send(peer.routing_id, Goodbye(reason=reason))
        if self._socket is not None:
            self._socket.close()

    def stats(self) -> tuple[WorkerStats, ...]:
        found = []
        for peer in self._by_registration.values():
            replica = self._core.replica(peer.registration)
            if replica is not None:
                found.append(peer.stats(replica.pool.free, replica.rows.owned))
        return tuple(found)

    # --- what workers say ------------------------------------------------------------------------------------------

    def on_message(self, frames: list[bytes]) -> None:
        route = frames[0]
        try:
            if len(frames) != 2:
                raise ProtocolError(f"a message has one frame, not {len(frames) - 1}")
            message = decode(frames[1], StepResult, Idle, WorkerHello, FileChunk, Goodbye)
            if isinstance(message, WorkerHello):
                self._greet(route, message)
                return
            peer = self._by_route.get(route)
            if peer is None:
                self._send(route, UnknownPeer(epoch=self._epoch))
                return
            peer.heard_at = self._clock()
            self._handle(peer, message)
        except VersionMismatch as error:
            log.warning("refused a worker: %s", error)
            self._send(route, VersionRefused(version=PROTOCOL_VERSION))
        except ProtocolError as error:
            log.warning("worker %s is refused: %s", route.hex(), error)
            self._send(route, Goodbye(reason=str(error)[:1_000], final=True))
            self._lose(route)

    def _handle(self, peer: WorkerPeer, message: object) -> None:
        match message:
            case StepResult():
                if (message.epoch, message.registration) == (self._epoch, peer.registration):
                    peer.steps += 1
                    peer.tokens += len(message.token)
                    peer.busy_us += message.busy_us
                    peer.gap_us += message.gap_us
                    self._post(StepDone(peer.registration, message.step, message.token))
            case FileChunk():
                if self._files is not None and not peer.registered:
                    self._files.add(message)
                    self._advance_registration(peer)
            case Goodbye():
                log.info("worker %s leaves: %s", peer.hello.name, message.reason)
                self._lose(peer.routing_id)

    def _greet(self, route: bytes, hello: WorkerHello) -> None:
        """Registers a worker. Raises ProtocolError, which refuses it, if it does not fit the service or cannot run one
        request."""
        self._lose(route)
        if self._model is not None:
            _require_same(hello.name, hello.model, self._model)
        room = hello.num_blocks * hello.block_size
        if min(hello.block_size, hello.max_num_seqs) < 1 or room < hello.model.max_model_len:
            raise ProtocolError(
                f"worker {hello.name} has room for {room} tokens, less than one request of max_model_len "
                f"{hello.model.max_model_len}"
            )
        if hello.max_num_batched_tokens < hello.max_num_seqs:
            raise ProtocolError(f"worker {hello.name}: max_num_batched_tokens is less than max_num_seqs")
        peer = WorkerPeer(route, self._next_registration, hello, self._clock())
        self._next_registration += 1
        if self._model is None and (self._files is None or not self._by_registration):
            self._files = FileStore(hello.files)
        self._by_route[route] = self._by_registration[peer.registration] = peer
        self._advance_registration(peer)

    def _advance_registration(self, peer: WorkerPeer) -> None:
        """Fetches what is missing of the tokenizer files, then lets the worker in."""
        missing = self._files.missing if self._model is None and self._files is not None else None
        if missing is not None:
            self._send(peer.routing_id, missing)
            return
        peer.registered = True
        hello = peer.hello
        self._send(
            peer.routing_id,
            WorkerWelcome(version=PROTOCOL_VERSION, epoch=self._epoch, registration=peer.registration),
        )
        limits = WorkerLimits(
            num_blocks=hello.num_blocks,
            block_size=hello.block_size,
            max_num_seqs=hello.max_num_seqs,
            max_num_batched_tokens=hello.max_num_batched_tokens,
            max_model_len=hello.model.max_model_len,
            vocab_size=hello.model.vocab_size,
            lookahead=hello.lookahead,
        )
        self._post(WorkerJoined(peer.registration, hello.model, limits))
        log.info(
            "worker %s (pid %d) joined: %d blocks of %d", hello.name, hello.pid, hello.num_blocks, hello.block_size
        )
        if self._model is None and self._files is not None:
            self._model = hello.model
            self._serve_model(hello.model, self._files)

    # --- what workers are told -------------------------------------------------------------------------------------

    def send_plan(self, instruction: SendPlan) -> None:
        peer = self._by_registration.get(instruction.worker)
        if peer is not None and not self._send(peer.routing_id, instruction.plan):
            log.error("worker %s cannot be reached", peer.hello.name)
            self._lose(peer.routing_id)

    def expel(self, instruction: Expel) -> None:
        peer = self._by_registration.get(instruction.worker)
        if peer is not None:
            log.error("worker %s is expelled: %s", peer.hello.name, instruction.reason)
            self._send(peer.routing_id, Goodbye(reason=instruction.reason[:1_000], final=True))
            self._lose(peer.routing_id)

    def _send(self, route: bytes, message: Any) -> bool:
        return self._socket is not None and bool(self._socket.send([route, encode(message)]))

    # --- workers that go -------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        for peer in list(self._by_registration.values()):
            if now - peer.heard_at > self._lease_s:
                log.error("worker %s said nothing for %.1f s and is given up", peer.hello.name, now - peer.heard_at)
                self._lose(peer.routing_id)

    def _lose(self, route: bytes) -> None:
        peer = self._by_route.pop(route, None)
        if peer is not None:
            del self._by_registration[peer.registration]
            self._post(WorkerLost(peer.registration))


def _require_same(name: str, offered: ModelDescription, served: ModelDescription) -> None:
    """Raises ProtocolError, naming the first field that differs, unless a worker brings what the service serves."""
    for field in fields(ModelDescription):
        theirs, ours = getattr(offered, field.name), getattr(served, field.name)
        if theirs != ours:
            raise ProtocolError(f"worker {name} differs from the service in {field.name}: {theirs!r}, not {ours!r}")
