"""The scheduler's conversation with clients."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..protocol.codec import decode, encode
from ..protocol.errors import ProtocolError, VersionMismatch
from ..protocol.messages import (
    MAX_SAMPLES,
    PROTOCOL_VERSION,
    Accepted,
    AskDrain,
    AskStats,
    Cancel,
    ClientHello,
    Draining,
    FetchFile,
    Goodbye,
    ModelDescription,
    Ping,
    Pong,
    Refused,
    Stats,
    Submit,
    Suspected,
    UnknownPeer,
    VersionRefused,
    Welcome,
)
from ..protocol.transport import LoopSocket, Sent
from .admission import Admission, Complaints
from .core import Core
from .delivery import Delivery
from .events import Accept, Cancelled, ClientLost, Deliver, Event, Reject, Submitted, Suspect
from .files import FileStore
from .peers import MAX_BACKLOG_BYTES, ClientPeer, require_given_route
from .worker_port import WorkerPort

log = logging.getLogger(__name__)

MAX_FETCHES = 4
"""Times that a connection may fetch all tokenizer files."""
RETRY_S = 0.02
"""Pause before a client's full queue is tried again."""


class ClientPort:
    """Who the clients are, what they ask, and how tokens reach them."""

    def __init__(
        self,
        epoch: int,
        lease_s: float,
        post: Callable[[Event], None],
        clock: Callable[[], float],
        core: Core,
        call_later: Callable[[float, Callable[[], None]], object],
        delivery_interval_s: float = 0.02,
        max_n: int = MAX_SAMPLES,
    ) -> None:
        self._epoch = epoch
        self._lease_s = lease_s
        self._post = post
        self._clock = clock
        self._core = core
        self._call_later = call_later
        self._max_n = max_n
        self._retrying = False
        self._delivery = Delivery(epoch, delivery_interval_s)
        self._flushing = False
        self._complaints = Complaints(clock)
        self.admission: Admission | None = None
        """Who may connect; None where no keys are used."""
        self._socket: LoopSocket | None = None
        self._by_route: dict[bytes, ClientPeer] = {}
        self._by_client: dict[int, ClientPeer] = {}
        self._by_session: dict[tuple[str, int], ClientPeer] = {}
        """By CURVE key and session: nobody else's number is taken for a client's own."""
        self._next_client = 0
        self._model: ModelDescription | None = None
        self._files = FileStore(())
        self._started_at = clock()
        self.workers: WorkerPort | None = None
        """Who tells of the workers."""
        self.drain: Callable[[str], int | None] | None = None
        """Begins to drain the workers of a name; None if clients here have no say in that."""

    def attach(self, socket: LoopSocket) -> None:
        self._socket = socket

    def serve_model(self, model: ModelDescription, files: FileStore) -> None:
        """From now on there is something to serve; tells every client that waits for it."""
        self._model, self._files = model, files
        for peer in list(self._by_client.values()):
            self._send(peer, self._welcome())

    def close(self, reason: str) -> None:
        self._send_tokens(self._delivery.flush())
        for peer in list(self._by_client.values()):
            self._send(peer, Goodbye(reason=reason))
        if self._socket is not None:
            self._socket.close()

    # --- what clients say ------------------------------------------------------------------------------------------

    def on_message(self, frames: list[bytes]) -> None:
        route, data = frames[0], frames[-1]
        assert self._socket is not None
        peer = self._sender(route, self._socket.sender)
        if self.admission is not None and peer is None and not self.admission.check("clients", self._socket):
            return
        try:
            if len(frames) != 2:
                raise ProtocolError(f"a message has one frame, not {len(frames) - 1}")
            if peer is None:
                require_given_route(route)
            message = decode(data, ClientHello, Submit, Cancel, Ping, AskStats, AskDrain, FetchFile, Goodbye)
        except VersionMismatch as error:
            self._complaints.warn("refused a client: %r", str(error)[:200])
            self._reply(route, VersionRefused(version=PROTOCOL_VERSION))
            return
        except ProtocolError as error:
            self._complaints.warn("client %s broke the protocol: %r", route.hex(), str(error)[:200])
            self._reply(route, Goodbye(reason=f"protocol error: {error}"[:1_000]))
            self._lose(route)
            return
        if isinstance(message, ClientHello):
            self._greet(route, message)
        elif peer is None:
            self._reply(route, UnknownPeer(epoch=self._epoch))
        else:
            peer.heard_at = self._clock()
            self._handle(peer, message)

    def _sender(self, route: bytes, key: str) -> ClientPeer | None:
        """The client that a message is from, if it is one. A route whose client is gone may have been
        given to another key."""
        peer = self._by_route.get(route)
        if peer is not None and peer.key != key:
            self._lose(route)
            return None
        return peer

    def drop_revoked(self) -> None:
        """Ends the connections of clients whose keys are not admitted any more, and cancels their requests."""
        assert self.admission is not None
        for peer in list(self._by_client.values()):
            if not self.admission.admits("clients", peer.key):
                log.warning("client %d (%s) is dropped: its key was revoked", peer.client, peer.name)
                self._send(peer, Goodbye(reason="the key of this client was revoked"))
                self._lose(peer.routing_id)
                self.admission.condemn(peer.wire)

    def _greet(self, route: bytes, hello: ClientHello) -> None:
        assert self._socket is not None
        former = self._by_route.get(route)
        self._lose(route)  # a repeated hello starts anew
        key = self._socket.sender
        name = repr(hello.name)[:80]
        if self.admission is not None:
            name += f" with key {self.admission.name('clients', key)}"
        twin = self._by_session.get((key, hello.session))
        if twin is not None:  # the client came back before this end noticed that it had gone
            former = twin
            log.info("client %d (%s) has a new connection", twin.client, twin.name)
            self._lose(twin.routing_id)
        peer = ClientPeer(route, key, self._next_client, name, self._clock(), hello.session, wire=self._socket.wire())
        peer.fetched_bytes = 0 if former is None else former.fetched_bytes
        if hello.session:
            self._by_session[key, hello.session] = peer
        self._next_client += 1
        self._by_route[route] = self._by_client[peer.client] = peer
        if former is None:  # else it says hello again and again, and would fill the disk
            log.info("client %d %s connected", peer.client, peer.name)
        self._send(peer, self._welcome())

    def _welcome(self) -> Welcome:
        return Welcome(
            version=PROTOCOL_VERSION,
            epoch=self._epoch,
            lease_s=self._lease_s,
            model=self._model,
            files=self._files.infos if self._model is not None else (),
            max_n=self._max_n,
        )

    def _handle(self, peer: ClientPeer, message: object) -> None:
        match message:
            case Submit():
                self._post(
                    Submitted(
                        client=peer.client,
                        ticket=message.ticket,
                        prompt=message.prompt,
                        generated=message.generated,
                        sampling=message.sampling,
                        n=message.n,
                        sample=message.sample,
                        priority=message.priority,
                        timeout_s=message.timeout_s,
                        cache_salt=message.cache_salt,
                        resumed=message.resumed or len(message.generated) > 0,
                        suspicions=message.suspicions,
                    )
                )
            case Cancel():
                self._post(Cancelled(peer.client, message.ticket))
            case Ping():
                if message.answer:
                    self._send(peer, Pong(epoch=self._epoch))
            case FetchFile():
                self._send_chunk(peer, message)
            case AskStats():
                self._send(peer, self._stats())
            case AskDrain():
                self._send(peer, self._drain(message.worker))
            case Goodbye():
                self._lose(peer.routing_id)

    def _send_chunk(self, peer: ClientPeer, wanted: FetchFile) -> None:
        """A client needs each file once. One that asks for far more, or asks without reading, fills only memory."""
        chunk = self._files.chunk(wanted.name, wanted.offset)
        peer.fetched_bytes += len(chunk.data)
        if peer.fetched_bytes > MAX_FETCHES * self._files.total_bytes or peer.backlog:
            log.warning("client %d fetches files without end", peer.client)
            self._send(peer, Goodbye(reason=f"the tokenizer files were fetched over {MAX_FETCHES} times"))
            self._lose(peer.routing_id)
        else:
            self._send(peer, chunk)

    def _drain(self, worker: str) -> Draining:
        if self.drain is None:
            return Draining(epoch=self._epoch, worker=worker, state="refused")
        running = self.drain(worker)
        state = "unknown" if running is None else "draining"
        return Draining(epoch=self._epoch, worker=worker, state=state, running=running or 0)

    def _stats(self) -> Stats:
        counters, workers = self._core.counters, self.workers
        return Stats(
            epoch=self._epoch,
            running=self._core.running,
            waiting=self._core.waiting,
            preemptions=counters.preemptions,
            refused=counters.refused,
            timeouts=counters.timeouts,
            looked_up_tokens=counters.looked_up_tokens,
            cached_tokens=counters.cached_tokens,
            evicted_blocks=self._core.evicted_blocks,
            uptime_s=self._clock() - self._started_at,
            clients=len(self._by_client),
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            finished=dict(counters.finished),
            refusals=dict(counters.refusals),
            resumptions=counters.resumptions,
            joined_workers=0 if workers is None else workers.joined,
            restarted_workers=0 if workers is None else workers.restarted,
            histograms=counters.histograms(),
            lost_workers=counters.lost_workers,
            moved=counters.moved,
            suspects=self._core.suspects,
            poisoned=counters.poisoned,
            workers=() if workers is None else workers.stats(),
        )

    # --- what clients are told -------------------------------------------------------------------------------------

    def accept(self, accept: Accept) -> None:
        peer = self._by_client.get(accept.client)
        if peer is not None:
            self._send(peer, Accepted(epoch=self._epoch, ticket=accept.ticket, number=accept.number))

    def reject(self, reject: Reject) -> None:
        self._core.counters.refuse(reject.code)
        peer = self._by_client.get(reject.client)
        if peer is not None:
            refused = Refused(
                epoch=self._epoch,
                ticket=reject.ticket,
                code=reject.code,
                message=reject.message,
                field=reject.field,
                limit=reject.limit,
                value=reject.value,
                retry_after_s=reject.retry_after,
            )
            self._send(peer, refused)

    def tell_suspicions(self, suspect: Suspect) -> None:
        """After what has been generated until then: the client counts from there."""
        peer = self._by_client.get(suspect.client)
        if peer is not None:
            self._send_tokens(self._delivery.flush())
            self._send(peer, Suspected(epoch=self._epoch, ticket=suspect.ticket, count=suspect.count))

    def deliver(self, deliver: Deliver) -> None:
        """Tokens go out at once or, where that saves messages, a little later; endings at once."""
        self._send_tokens(self._delivery.add(deliver, self._clock()))
        due = self._delivery.due
        if due is not None and not self._flushing:
            self._flushing = True
            self._call_later(max(0.0, due - self._clock()), self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._send_tokens(self._delivery.flush())

    def _send_tokens(self, messages: list[tuple[int, bytes]]) -> None:
        for client, data in messages:
            peer = self._by_client.get(client)
            if peer is not None:
                self._send_bytes(peer, data)

    def _send(self, peer: ClientPeer, message: Any) -> None:
        self._send_bytes(peer, encode(message))

    def _send_bytes(self, peer: ClientPeer, data: bytes) -> None:
        if self._socket is None:
            return
        sent = Sent.FULL if peer.backlog else self._socket.send([peer.routing_id, data])
        if sent is Sent.GONE:
            log.info("client %d (%s) disconnected", peer.client, peer.name)
            self._lose(peer.routing_id)
        elif sent is Sent.FULL:
            peer.backlog.append(data)
            peer.backlog_bytes += len(data)
            if peer.backlog_bytes > MAX_BACKLOG_BYTES:
                log.warning("client %d (%s) does not read; its requests are cancelled", peer.client, peer.name)
                self._lose(peer.routing_id)
            elif not self._retrying:
                self._retrying = True
                self._call_later(RETRY_S, self._send_backlogs)

    def _reply(self, route: bytes, message: Any) -> None:
        """To somebody who is no client (yet); lost if its queue is full."""
        if self._socket is not None:
            self._socket.send([route, encode(message)])

    # --- clients that go -------------------------------------------------------------------------------------------

    def expire(self, now: float, forgiven: float) -> None:
        """Gives up clients whose lease ran out. `forgiven`: seconds in which nobody could be heard."""
        for peer in list(self._by_client.values()):
            peer.heard_at += forgiven
            if now - peer.heard_at > self._lease_s:
                log.info("client %d (%s) is gone", peer.client, peer.name)
                self._lose(peer.routing_id)

    def _send_backlogs(self) -> None:
        """Tries again where a queue was full, until nothing waits."""
        for peer in list(self._by_client.values()):
            sent = Sent.QUEUED
            while peer.backlog and self._socket is not None and sent is Sent.QUEUED:
                sent = self._socket.send([peer.routing_id, peer.backlog[0]])
                if sent is Sent.QUEUED:
                    peer.backlog_bytes -= len(peer.backlog.popleft())
            if sent is Sent.GONE:
                self._lose(peer.routing_id)
        self._retrying = any(peer.backlog for peer in self._by_client.values())
        if self._retrying:
            self._call_later(RETRY_S, self._send_backlogs)

    def _lose(self, route: bytes) -> None:
        peer = self._by_route.pop(route, None)
        if peer is not None:
            del self._by_client[peer.client]
            self._by_session.pop((peer.key, peer.session), None)
            self._post(ClientLost(peer.client))
