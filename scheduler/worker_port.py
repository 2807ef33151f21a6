"""The scheduler's conversation with workers."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..protocol.codec import decode, encode
from ..protocol.errors import MessageTooLarge, ProtocolError, VersionMismatch
from ..protocol.messages import (
    MAX_BLOCKS,
    MAX_CONTEXT,
    MAX_SLOTS,
    PROTOCOL_VERSION,
    CheckGrammar,
    FileChunk,
    Goodbye,
    GrammarChecked,
    Idle,
    Leave,
    ModelDescription,
    Ping,
    StepResult,
    UnknownPeer,
    VersionRefused,
    WorkerHello,
    WorkerStats,
    WorkerWelcome,
)
from ..protocol.process import open_process
from ..protocol.tracing import OFF, Track
from ..protocol.transport import LoopSocket, Sent
from .admission import Admission, Complaints
from .core import Core
from .events import (
    Checked,
    Dismiss,
    DrainWorker,
    Event,
    Expel,
    SendCheck,
    SendPlan,
    StepDone,
    WorkerJoined,
    WorkerLimits,
    WorkerLost,
)
from .files import FileStore
from .leases import WorkerLeases
from .logprobs import StepLogprobs
from .peers import WorkerPeer, require_given_route

log = logging.getLogger(__name__)

RECEIVE, SEND = range(2)
"""Kinds of spans of the track."""
PROBE_AFTER_S = 1.0
"""A worker that was silent for so long is sent something: only by sending is noticed that its connection has ended."""
LAST_WORDS_S = 0.02
"""What a process said last, results or a goodbye, may still be on its way through ZeroMQ's thread when it has ended."""
KEPT_LOSSES = 64
"""Lost workers that are remembered, for the case that one comes back."""
MAX_LOOKAHEAD = 64
MOST_REMEMBERED = 1_024
"""Of the workers that are gone."""
MAX_HISTORY = 2**32
"""Tokens that the rows of one worker may have in all; memory is taken only as they are used."""
MAX_LONGEST_STEP_S = 600.0
"""A worker cannot ask for a lease without end."""
MAX_FILES = 64
HELLO_PAUSE_S = 0.25
"""A registration cannot be replaced over the same connection before; workers repeat a hello that is not answered."""
MAX_EXPELLED = 1_024
"""Processes that are remembered not to be let in again."""
MAX_EOS_TOKENS = 1_024


class WorkerPort:
    """Who the workers are; plans go out and results come in."""

    def __init__(
        self,
        epoch: int,
        leases: WorkerLeases,
        post: Callable[[Event], None],
        loop: asyncio.AbstractEventLoop,
        core: Core,
        serve_model: Callable[[ModelDescription, FileStore], None],
    ) -> None:
        self._epoch = epoch
        self._leases = leases
        self._post = post
        self._loop = loop
        self._clock = loop.time
        self._core = core
        self._serve_model = serve_model
        self._complaints = Complaints(loop.time)
        self.admission: Admission | None = None
        """Who may connect; None where no keys are used."""
        self.track: Track = OFF
        self._socket: LoopSocket | None = None
        self.local = False
        """The socket can be reached from this machine only, so a worker's process id means a process here."""
        self._lost: OrderedDict[tuple[int, str | None], int] = OrderedDict()
        """Registrations of workers that were lost without a word, by instance and key."""
        self._by_route: dict[bytes, WorkerPeer] = {}
        self._by_registration: dict[int, WorkerPeer] = {}
        self._next_registration = 1
        self._expelled: deque[tuple[str, int]] = deque(maxlen=MAX_EXPELLED)
        """Key and instance of processes whose results were lies: they would take requests from honest workers again."""
        self._model: ModelDescription | None = None
        self._files = FileStore(())
        self.joined = self.restarted = 0
        """See Stats."""
        self._gone: deque[tuple[str, int]] = deque(maxlen=MOST_REMEMBERED)
        """Names and instances of workers that are gone."""
        self._fetching: WorkerPeer | None = None
        """Whose tokenizer files are on their way."""

    def attach(self, socket: LoopSocket) -> None:
        self._socket = socket

    def close(self, reason: str) -> None:
        for peer in self._by_registration.values():
            self._send(peer.routing_id, Goodbye(reason=reason))
            self._watch_no_more(peer)
        if self._socket is not None:
            self._socket.close()

    def name(self, registration: int | None) -> str:
        """For the log: a worker's name, or its registration once it has gone; empty for none."""
        peer = None if registration is None else self._by_registration.get(registration)
        return str(registration or "") if peer is None else peer.hello.name

    def pids(self) -> list[int]:
        """Of the workers that have said hello and are not given up."""
        return [peer.hello.pid for peer in self._by_registration.values()]

    def stats(self) -> tuple[WorkerStats, ...]:
        found, now = [], self._clock()
        for peer in self._by_registration.values():
            replica = self._core.replica(peer.registration)
            if replica is not None:
                found.append(peer.stats(replica, max(0.0, now - peer.progress_at), self._lease(peer)))
        return tuple(found)

    def drain(self, name: str) -> int | None:
        """Begins to drain the workers of that name, or goes on with it; returns how many requests they still have, None
        if there are no such workers."""
        running = None
        for peer in self._by_registration.values():
            if peer.hello.name == name and (replica := self._core.replica(peer.registration)) is not None:
                running = (running or 0) + replica.rows.owned
                if not replica.draining:
                    log.info("worker %s is drained", name)
                    self._post(DrainWorker(peer.registration))
        return running

    # --- what workers say ------------------------------------------------------------------------------------------

    def on_message(self, frames: list[bytes]) -> None:
        route = frames[0]
        assert self._socket is not None
        peer = self._sender(route, self._socket.sender)
        if self.admission is not None and peer is None and not self.admission.check("workers", self._socket):
            return
        try:
            if len(frames) != 2:
                raise ProtocolError(f"a message has one frame, not {len(frames) - 1}")
            if peer is None:
                require_given_route(route)
            begun = self.track.start()
            message = decode(frames[1], StepResult, GrammarChecked, Idle, WorkerHello, FileChunk, Goodbye)
            if self.track.on and isinstance(message, StepResult):
                self.track.end(RECEIVE, message.step, begun)
            if isinstance(message, WorkerHello):
                self._greet(route, message)
                return
            if peer is None:
                self._send(route, UnknownPeer(epoch=self._epoch))
                return
            self._handle(peer, message)
        except VersionMismatch as error:
            self._complaints.warn("refused a worker: %s", error)
            self._send(route, VersionRefused(version=PROTOCOL_VERSION))
        except ProtocolError as error:
            self._refuse(route, error)

    def _sender(self, route: bytes, key: str) -> WorkerPeer | None:
        """The worker that a message is from, if it is one. A route whose worker is gone may have been
        given to another key."""
        peer = self._by_route.get(route)
        if peer is not None and peer.key != key:
            self._lose(route, died=True, silently=True)
            return None
        return peer

    def drop_revoked(self) -> None:
        """Ends the connections of workers whose keys are not admitted any more; their requests go on elsewhere."""
        assert self.admission is not None
        for peer in list(self._by_registration.values()):
            if not self.admission.admits("workers", peer.key):
                log.warning("worker %s is dropped: its key was revoked", peer.hello.name)
                self._send(peer.routing_id, Goodbye(reason="the key of this worker was revoked", final=True))
                self._lose(peer.routing_id, died=False)
                self.admission.condemn(peer.wire)

    def _refuse(self, route: bytes, error: ProtocolError) -> None:
        self._complaints.warn("worker %s is refused: %r", route.hex(), str(error)[:400])
        self._send(route, Goodbye(reason=str(error)[:1_000], final=True))
        self._lose(route, died=True)

    def _handle(self, peer: WorkerPeer, message: object) -> None:
        match message:
            case StepResult():
                if (message.epoch, message.registration) == (self._epoch, peer.registration):
                    peer.progress_at = self._clock()
                    peer.doubted_step = None
                    if peer.planned:  # else it answers what was not asked, for which the core expels it
                        sent_at, after_idle = peer.planned.popleft()
                        peer.meter.result(message, time.monotonic(), sent_at, after_idle, len(peer.planned))
                    if len(message.failed) != len(message.failed_error):
                        raise ProtocolError("StepResult: failed and failed_error differ in length")
                    failed = tuple(zip(message.failed.tolist(), message.failed_error, strict=True))
                    told = _told(message)
                    self._post(StepDone(peer.registration, message.step, message.token, message.busy_us, failed, told))
            case GrammarChecked():
                if (message.epoch, message.registration) == (self._epoch, peer.registration):
                    self._post(Checked(peer.registration, message.number, message.error))
            case Idle():
                if (message.epoch, message.registration) == (self._epoch, peer.registration):
                    peer.progress_at = self._clock()
                    self._note_idle(peer, message)
            case FileChunk():
                if self._fetching is peer:
                    peer.progress_at = self._clock()
                    self._files.add(message)
                    self._fetch(peer)
            case Goodbye():
                log.info("worker %s leaves: %r", peer.hello.name, message.reason)
                self._lose(peer.routing_id, died=message.failed)

    def _note_idle(self, peer: WorkerPeer, said: Idle) -> None:
        """A worker that waits for a step which was planned has not got the plan. It may have said so before the plan
        was sent, and on a busy machine that may be heard much later; so it is asked. What it answers, it says after all
        that was sent before the question has reached it: a plan that has not by then is lost."""
        replica = self._core.replica(peer.registration)
        if replica is None or replica.awaited_step != said.step:
            peer.doubted_step = None
        elif peer.doubted_step == said.step and said.heard == peer.asked:
            log.error("worker %s never got step %d and must register anew", peer.hello.name, said.step)
            self._lose(peer.routing_id, died=False)
        else:
            if peer.doubted_step != said.step:
                peer.doubted_step, peer.asked = said.step, peer.asked + 1
            self._send(peer.routing_id, Ping(number=peer.asked))  # again with each Idle: it may be lost as well

    def _greet(self, route: bytes, hello: WorkerHello) -> None:
        """Takes in a worker. Raises ProtocolError, which refuses it, if it does not fit the service or cannot run one
        request."""
        assert self._socket is not None
        key = self._socket.sender
        known = self._by_route.get(route)
        if known is not None and known.registered and self._clock() - known.joined_at < HELLO_PAUSE_S:
            return  # it has just been welcomed; its requests must not pay for every hello that it repeats
        for former in list(self._by_registration.values()):
            # A worker that connects anew; with another key it would be somebody else who knows its number.
            if former.routing_id == route or (former.hello.instance == hello.instance and former.key == key):
                self._lose(former.routing_id, died=False)
        if (key, hello.instance) in self._expelled:
            raise ProtocolError(f"worker {hello.name} was expelled; start it anew")
        if self._model is not None:
            _require_same(hello.name, hello.model, self._model)
        _require_sound(hello)
        peer = WorkerPeer(route, key, self._next_registration, hello, self._clock(), wire=self._socket.wire())
        peer.lived_on = self._lost.pop((hello.instance, key), None)
        if self.local:
            self._watch(peer)
        self._next_registration += 1
        peer.joined_at = peer.progress_at
        self._by_route[route] = self._by_registration[peer.registration] = peer
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        """Registers workers if the tokenizer files are here; else sees to it that one worker is asked for them."""
        waiting = [peer for peer in self._by_registration.values() if not peer.registered]
        if self._model is None and self._fetching is None and waiting:
            self._fetching, self._files = waiting[0], FileStore(waiting[0].hello.files)
            self._fetch(waiting[0])
        elif self._model is not None:
            for peer in waiting:
                try:
                    _require_same(peer.hello.name, peer.hello.model, self._model)
                except ProtocolError as error:
                    self._refuse(peer.routing_id, error)
                else:
                    self._register(peer)

    def _fetch(self, peer: WorkerPeer) -> None:
        """Asks for the next piece; with the last one, there is a model to serve."""
        missing = self._files.missing
        if missing is not None:
            self._send(peer.routing_id, missing)
            return
        self._fetching, self._model = None, peer.hello.model
        self._admit_waiting()
        self._serve_model(peer.hello.model, self._files)

    def _register(self, peer: WorkerPeer) -> None:
        peer.registered = True
        hello = peer.hello
        self.joined += 1
        former = {instance for name, instance in self._gone if name == hello.name}
        self.restarted += bool(former) and hello.instance not in former
        welcome = WorkerWelcome(version=PROTOCOL_VERSION, epoch=self._epoch, registration=peer.registration)
        self._send(peer.routing_id, welcome)
        limits = WorkerLimits(
            num_blocks=hello.num_blocks,
            block_size=hello.block_size,
            max_num_seqs=hello.max_num_seqs,
            max_num_batched_tokens=hello.max_num_batched_tokens,
            max_model_len=hello.model.max_model_len,
            vocab_size=hello.model.vocab_size,
            lookahead=hello.lookahead,
        )
        self._post(WorkerJoined(peer.registration, hello.model, limits, peer.lived_on))
        log.info(
            "worker %s (pid %d) joined: %d blocks of %d; its lease is %.1f s, and %.1f s in its largest step",
            hello.name,
            hello.pid,
            hello.num_blocks,
            hello.block_size,
            self._leases.seconds(hello.longest_step_s, 0.0),
            self._leases.seconds(hello.longest_step_s, None),
        )
        if self._leases.cut(hello.longest_step_s):
            log.warning(
                "worker %s took %.1f s for its largest step when it tried, and is lost after %.1f s in one; if the "
                "machine was not just busy then, lower --max-num-batched-tokens or raise --worker-lease-limit",
                hello.name,
                hello.longest_step_s,
                self._leases.seconds(hello.longest_step_s, None),
            )

    # --- what workers are told -------------------------------------------------------------------------------------

    def send_plan(self, instruction: SendPlan) -> None:
        peer = self._by_registration.get(instruction.worker)
        if peer is None:
            return
        replica = self._core.replica(peer.registration)
        if replica is not None and replica.awaited_step == instruction.plan.step:
            peer.progress_at = self._clock()  # until now it had nothing to do
        begun = self.track.start()
        try:
            data = encode(instruction.plan)
        except MessageTooLarge as error:
            log.error("worker %s is given up: %s", peer.hello.name, error)  # noqa: TRY400  (it says all there is)
            self._lose(peer.routing_id, died=True)
            return
        self._core.counters.plan_bytes.observe(len(data))
        peer.planned.append((time.monotonic(), instruction.plan.after_idle))
        sent = self._send_bytes(peer.routing_id, data)
        self.track.end(SEND, instruction.plan.step, begun)
        if not sent:
            log.error("worker %s cannot be reached", peer.hello.name)
            self._lose(peer.routing_id, died=True, silently=True)

    def send_check(self, instruction: SendCheck) -> None:
        peer = self._by_registration.get(instruction.worker)
        if peer is not None:
            question = CheckGrammar(
                epoch=self._epoch,
                registration=peer.registration,
                number=instruction.number,
                grammar=instruction.grammar,
            )
            if not self._send(peer.routing_id, question):
                log.error("worker %s cannot be reached", peer.hello.name)
                self._lose(peer.routing_id, died=True, silently=True)

    def expel(self, instruction: Expel) -> None:
        peer = self._by_registration.get(instruction.worker)
        if peer is not None:
            log.error("worker %s is expelled: %s", peer.hello.name, instruction.reason)
            self._expelled.append((peer.key, peer.hello.instance))
            self._send(peer.routing_id, Goodbye(reason=instruction.reason[:1_000], final=True))
            self._lose(peer.routing_id, died=True)

    def dismiss(self, instruction: Dismiss) -> None:
        peer = self._by_registration.get(instruction.worker)
        if peer is not None:
            log.info("worker %s is drained and may go", peer.hello.name)
            self._send(peer.routing_id, Leave(reason="drained"))
            self._lose(peer.routing_id, died=False)

    def _send(self, route: bytes, message: Any) -> bool:
        return self._send_bytes(route, encode(message))

    def _send_bytes(self, route: bytes, data: bytes) -> bool:
        return self._socket is not None and bool(self._socket.send([route, data]))

    # --- workers that go -------------------------------------------------------------------------------------------

    def expire(self, now: float, forgiven: float) -> None:
        """Gives up workers whose lease ran out. `forgiven`: seconds in which nobody could be heard, because it was us
        who stood still."""
        for peer in list(self._by_registration.values()):
            peer.progress_at += forgiven
            silent, lease = now - peer.progress_at, self._lease(peer)
            if silent > lease:
                log.error(
                    "worker %s has made no progress for %.1f s (its lease is %.1f s) and is given up",
                    peer.hello.name,
                    silent,
                    lease,
                )
                self._lose(peer.routing_id, died=True, silently=True)
            elif silent > PROBE_AFTER_S and self._is_cut_off(peer):
                log.error("worker %s is not connected any more", peer.hello.name)
                self._lose(peer.routing_id, died=True, silently=True)

    def _is_cut_off(self, peer: WorkerPeer) -> bool:
        """Whether its connection has ended. One that is full has not."""
        return self._socket is not None and self._socket.send([peer.routing_id, encode(Ping())]) is Sent.GONE

    def _lease(self, peer: WorkerPeer) -> float:
        """How long the worker may show no progress now: nothing is heard during a step."""
        replica = self._core.replica(peer.registration)
        return self._leases.seconds(
            peer.hello.longest_step_s,
            0.0 if replica is None or not replica.in_flight else replica.expected_step_s,
        )

    def _watch(self, peer: WorkerPeer) -> None:
        """A process that ends is lost at once, and not when its lease ends."""
        peer.process = open_process(peer.hello.pid, peer.hello.started)
        if peer.process is not None:
            self._loop.add_reader(peer.process, self._on_end, peer)

    def _on_end(self, peer: WorkerPeer) -> None:
        self._watch_no_more(peer)
        self._loop.call_later(LAST_WORDS_S, self._bury, peer)

    def _bury(self, peer: WorkerPeer) -> None:
        if self._by_registration.get(peer.registration) is peer:
            log.error("the process of worker %s (pid %d) has ended", peer.hello.name, peer.hello.pid)
            self._lose(peer.routing_id, died=True)

    def _watch_no_more(self, peer: WorkerPeer) -> None:
        if peer.process is not None:
            self._loop.remove_reader(peer.process)
            os.close(peer.process)
            peer.process = None

    def _lose(self, route: bytes, *, died: bool, silently: bool = False) -> None:
        """`died`: its launched steps may be why. `silently`: it may be alive, and will be back then."""
        peer = self._by_route.pop(route, None)
        if peer is None:
            return
        del self._by_registration[peer.registration]
        if peer.registered:
            self._gone.append((peer.hello.name, peer.hello.instance))
        self._watch_no_more(peer)
        if silently:
            self._lost[peer.hello.instance, peer.key] = peer.registration
            if len(self._lost) > KEPT_LOSSES:
                self._lost.popitem(last=False)
        self._post(WorkerLost(peer.registration, died))
        if self._fetching is peer:
            self._fetching = None
            self._admit_waiting()


def _told(result: StepResult) -> StepLogprobs | None:
    columns = (
        result.rank, result.entry_token, result.entry_logprob, result.prompt_rank, result.prompt_entry_token,
        result.prompt_entry_logprob,
    )  # fmt: skip
    return StepLogprobs(*columns) if any(map(len, columns)) else None


def _require_sound(hello: WorkerHello) -> None:
    """Raises ProtocolError for limits that no worker of ours has, or with which not even one request could run."""
    room, need = hello.num_blocks * hello.block_size, hello.model.max_model_len
    history = hello.max_num_seqs * need
    for field, value, most in (
        ("num_blocks", hello.num_blocks, MAX_BLOCKS),
        ("max_num_seqs", hello.max_num_seqs, MAX_SLOTS),
        ("max_model_len", need, MAX_CONTEXT),
        ("lookahead", hello.lookahead, MAX_LOOKAHEAD),
        ("longest_step_s", hello.longest_step_s, MAX_LONGEST_STEP_S),
        ("tokenizer files", len(hello.files), MAX_FILES),
        ("eos_token_ids", len(hello.model.eos_token_ids), MAX_EOS_TOKENS),
    ):
        if value > most:
            raise ProtocolError(f"worker {hello.name}: {field} {value} is over the limit of {most}")
    for wrong, story in (
        (min(hello.block_size, hello.max_num_seqs) < 1, "block_size and max_num_seqs must be at least 1"),
        (min(need, hello.model.vocab_size) < 2, "max_model_len and vocab_size must be at least 2"),
        (room < need, f"there is room for {room} tokens, less than one request of max_model_len {need}"),
        (hello.max_num_batched_tokens < hello.max_num_seqs, "max_num_batched_tokens is less than max_num_seqs"),
        (history > MAX_HISTORY, f"max_num_seqs × max_model_len = {history} is over {MAX_HISTORY}"),
    ):
        if wrong:
            raise ProtocolError(f"worker {hello.name}: {story}")


def _require_same(name: str, offered: ModelDescription, served: ModelDescription) -> None:
    """Raises ProtocolError, naming the first field that differs, unless a worker brings what the service serves."""
    for field in fields(ModelDescription):
        theirs, ours = getattr(offered, field.name), getattr(served, field.name)
        if theirs != ours:
            raise ProtocolError(f"worker {name} differs from the service in {field.name}: {theirs!r}, not {ours!r}")
