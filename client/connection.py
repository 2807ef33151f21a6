"""One client's conversation with the scheduler, on one event loop: greeting, lease, requests, files.

    greeting ──Welcome with a model──▶ ready ──UnknownPeer, Goodbye, another epoch, silence──▶ greeting

While greeting, ClientHello is sent until somebody answers. Open requests outlive that: they are sent again, each with
the tokens it has, as soon as there is a service, and fail only if there is none for too long. A scheduler that had them
still ends its own when it hears the same session greet again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import (
    ConfigurationError,
    ProtocolError,
    RequestCancelled,
    ServiceUnavailable,
    TandemError,
    VersionMismatch,
)
from ..protocol.keys import PeerKeys
from ..protocol.messages import (
    MAX_SAMPLES,
    PROTOCOL_VERSION,
    Accepted,
    AskStats,
    Cancel,
    ClientHello,
    FileChunk,
    FileInfo,
    Goodbye,
    ModelDescription,
    Ping,
    Pong,
    Refused,
    Stats,
    Suspected,
    Tokens,
    UnknownPeer,
    VersionRefused,
    Welcome,
)
from ..protocol.process import require_files
from ..protocol.transport import Address, LoopSocket, open_dealer, require_private
from ..protocol.wires import HANDSHAKE_EVENTS, Handshakes, monitor, read_event
from .context import Context
from .files import FileFetcher
from .requests import OpenRequests
from .resumption import SEND_RETRY_S, Resumptions
from .stream import MAX_UNREAD_TOKENS, History, TokenStream

HELLO_RETRY_S = 0.5
"""A greeting that nobody answered is repeated after this time."""
CONNECT_RETRY_S = 0.02
LOOK_S = 0.1
"""With requests open, how often is looked whether the scheduler can be reached: if not, they wait for it."""
LONGEST_SILENCE_S = 1.0
"""Something is sent at least so often: it renews the lease, and shows whether the scheduler can be reached."""
SCHEDULER_SILENT_S = 5.0
"""A scheduler that leaves an answer outstanding for so long, and says nothing else, is given up: it hangs, or the
network in between was cut without a word. A new socket is tried."""
MAX_UNSENT_CANCELS = 65_536
SOCKET_FILES = 12
"""Files that a context of ZeroMQ with one socket and a monitor may have open."""


class Connection:
    """See the module. Everything here must be called on the loop that `open` ran on."""

    def __init__(
        self,
        address: Address,
        *,
        name: str = "",
        reconnect_timeout_s: float | None = 10.0,
        keys: PeerKeys | None = None,
        model_timeout_s: float | None = 60.0,
        silence_limit_s: float = SCHEDULER_SILENT_S,
    ) -> None:
        """Open requests fail `reconnect_timeout_s` after the service was lost or, if a scheduler answers by then that
        has no model yet, `model_timeout_s` after."""
        self.address = address
        self._keys = keys
        self._handshakes = Handshakes(address.url, None if keys is None else keys.public)
        self._monitor: LoopSocket | None = None
        self._name = name
        self._reconnect_timeout_s = reconnect_timeout_s
        self._model_timeout_s = model_timeout_s
        self._silence_limit_s = silence_limit_s
        self._session = secrets.randbits(63) or 1
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: LoopSocket | None = None
        self._welcome: Welcome | None = None
        self._ready = asyncio.Event()
        self._failure: TandemError | None = None
        """Why the connection is over for good."""
        self._requests = OpenRequests(self._repair, self._wait_out)
        self._resumptions = Resumptions(self._resume)
        self._fetcher = FileFetcher(self._send_patiently)
        self._unsent_cancels: deque[int] = deque(maxlen=MAX_UNSENT_CANCELS)
        self._asked: deque[asyncio.Future[Stats]] = deque()
        """Who waits for Stats; answers come in the order of the questions."""
        self._timer: asyncio.TimerHandle | None = None
        self._hello_at: float | None = None
        self._sent_at = 0.0
        self._heard_at = 0.0
        self._asked_at: float | None = None
        """When an answer was asked for that is outstanding, if nothing has been heard since."""
        self._ticked_at = 0.0
        self._lost: tuple[float, str] | None = None
        """Since when there has been no service, and why; None before the first and while there is one."""

    # --- life ------------------------------------------------------------------------------------------------------

    async def open(self, patience: float | None) -> None:
        """Connects and waits until there is a model. Raises ServiceUnavailable (VersionMismatch if that is why) after
        `patience` seconds (None: never), ConfigurationError if the address is another user's; nothing is open then."""
        if self.address.is_ipc and self.address.directory.exists():
            require_private(self.address.directory)
        self._loop = asyncio.get_running_loop()
        require_files(SOCKET_FILES)
        self._context = Context()
        try:
            self._connect(self._context)
            self._tick()
            await self.ready(patience)
        except BaseException:
            self.close()
            raise

    async def ready(self, patience: float | None) -> ModelDescription:
        """Waits until requests can be sent, and returns what is served. Raises as `open`."""
        if self._failure is None and not self._ready.is_set():
            try:
                async with asyncio.timeout(patience):
                    await self._ready.wait()
            except TimeoutError:
                raise ServiceUnavailable(self._why_not_ready(patience)) from None
        if self._failure is not None:
            raise self._failure
        return self.model

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """With a new socket, instead of the one before if there was one. ZeroMQ does the rest in the background."""
        if self._socket is not None:
            self._socket.close(0)
        if self._monitor is not None:
            self._monitor.close(0)
        watch = None if self.address.is_ipc else self._watch_handshakes
        dealer = open_dealer(context, self.address.endpoint("clients"), self._keys, watch)
        self._socket = LoopSocket(dealer, self._on_frames)

    def close(self, reason: str = "the client was closed") -> None:
        """Ends everything: open requests fail with RequestCancelled, and the scheduler cancels them. Idempotent."""
        if self._failure is None:
            self._failure = ServiceUnavailable(reason)
        self._resumptions.close()
        self._end_all(RequestCancelled(reason))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            if self._welcome is not None:
                self._socket.send([encode(Goodbye(reason=reason))])
            self._socket.close()
            self._socket = None
        if self._monitor is not None:
            self._monitor.close(0)
            self._monitor = None
        self._handshakes.close()
        if self._context is not None:
            context, self._context = self._context, None
            context.term()  # waits at most for the socket's linger
        self._ready.set()  # nobody waits for what will not come

    @property
    def open_requests(self) -> int:
        """How many requests have not ended."""
        return len(self._requests) + len(self._resumptions)

    @property
    def is_closed(self) -> bool:
        return self._failure is not None

    @property
    def model(self) -> ModelDescription:
        """What is served. Raises ServiceUnavailable before `open`."""
        if self._welcome is None or self._welcome.model is None:
            raise self._failure or ServiceUnavailable(
                "not connected: use the client in a with block, or call connect()"
            )
        return self._welcome.model

    @property
    def max_n(self) -> int:
        """Samples that a request may have."""
        return MAX_SAMPLES if self._welcome is None else self._welcome.max_n

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """The tokenizer files that `fetch` can get."""
        return () if self._welcome is None else self._welcome.files

    # --- requests --------------------------------------------------------------------------------------------------

    async def submit(self, samples: Sequence[History], *, collect: bool, patience: float | None) -> list[TokenStream]:
        """Sends a request for samples of one prompt, which differ in nothing but their number; returns the streams that
        their tokens will come through. `collect` lifts the limit on unread tokens. Raises ServiceUnavailable if it
        could not be sent within `patience` seconds."""
        ticket = self._requests.new_tickets(len(samples))
        most = None if collect else MAX_UNREAD_TOKENS
        streams = [TokenStream(ticket + i, history, self.cancel, most) for i, history in enumerate(samples)]
        try:
            async with asyncio.timeout(patience):
                await self._send_patiently(samples[0].submission(ticket, len(samples)))
        except TimeoutError:
            raise ServiceUnavailable(self._why_not_ready(patience)) from None
        for stream in streams:
            stream.history.model = self.model
            self._requests.add(stream)
        return streams

    def cancel(self, stream: TokenStream, error: TandemError | None = None) -> None:
        """Ends a request now, on both ends; nothing happens if it is over."""
        waited = self._resumptions.discard(stream)
        if not (waited or self._requests.remove(stream)):
            return
        stream.fail(error or RequestCancelled("the request was cancelled"))
        if not waited:
            self._send_cancel(stream.ticket)

    def stop(self, stream: TokenStream) -> None:
        """Ends a request now and well: its reader has found all that it wants among the tokens that have come."""
        if self._resumptions.discard(stream):
            stream.stop()
            stream.settle(None)
        elif self._requests.stop(stream):
            self._send_cancel(stream.ticket)

    def _send_cancel(self, ticket: int) -> None:
        if not self._send(encode(Cancel(ticket=ticket))):
            self._unsent_cancels.append(ticket)

    def _resume(self, stream: TokenStream) -> bool:
        """Sends an open request again, to go on after the tokens it has; False if there is no room for the message."""
        ticket = self._requests.new_tickets(1)
        if not self._send(encode(stream.history.submission(ticket, resumed=True))):
            return False
        stream.ticket = ticket
        self._requests.add(stream)
        return True

    def _repair(self, stream: TokenStream, error: ProtocolError, is_running: bool) -> None:
        """Asks again for the rest of a stream that is broken, from where it stands."""
        if is_running:
            self._send_cancel(stream.ticket)
        self._resumptions.repair(stream, error)

    def _wait_out(self, stream: TokenStream, retry_after: float) -> None:
        self._resumptions.wait_out(stream, retry_after)

    async def fetch(self, info: FileInfo) -> bytes:
        """A tokenizer file's content; see FileFetcher.fetch."""
        return await self._fetcher.fetch(info)

    async def stats(self, patience: float | None) -> Stats:
        """The scheduler's counters now. Raises ServiceUnavailable if it does not answer within `patience` seconds."""
        answer: asyncio.Future[Stats] = self._loop.create_future()
        try:
            async with asyncio.timeout(patience):
                await self._send_patiently(AskStats(), answer)
                return await answer
        except TimeoutError:
            raise ServiceUnavailable(self._why_not_ready(patience)) from None

    # --- whether we are let in ---------------------------------------------------------------------------------------

    def _watch_handshakes(self, dealer: zmq.Socket[bytes]) -> None:
        self._monitor = LoopSocket(monitor(dealer, HANDSHAKE_EVENTS), self._on_handshake)

    def _on_handshake(self, frames: list[bytes]) -> None:
        error = self._handshakes.heard(read_event(frames), self._loop.time())
        if error is not None:
            self._give_up(error)

    # --- what the scheduler says -----------------------------------------------------------------------------------

    def _on_frames(self, frames: list[bytes]) -> None:
        if self._failure is not None:
            return
        self._heard_at = self._loop.time()
        self._asked_at = None
        if self._ready.is_set():
            self._lost = None
        try:
            if len(frames) != 1:
                raise ProtocolError(f"a message has one frame, not {len(frames)}")
            self._handle(decode(frames[0], *_INCOMING))
        except VersionMismatch as error:
            self._give_up(VersionMismatch(f"the scheduler at {self.address.url}: {error}"))
        except ProtocolError as error:
            broken = ProtocolError(f"the scheduler at {self.address.url} broke the protocol: {error}")
            if self._ready.is_set():
                self._leave(str(broken), broken)
            elif self._lost is None:
                self._give_up(broken)  # this is no scheduler of ours

    def _handle(self, message: Any) -> None:
        match message:
            case Tokens() | Accepted() | Refused() | Suspected():
                if self._welcome is not None and self._welcome.epoch == message.epoch:
                    self._requests.handle(message)
            case Stats():
                if self._asked:
                    answer = self._asked.popleft()
                    if not answer.done():  # else whoever asked has stopped waiting
                        answer.set_result(message)
            case FileChunk():
                self._fetcher.on_chunk(message)
            case Welcome():
                self._on_welcome(message)
            case UnknownPeer():
                if self._welcome is not None:
                    self._leave("the scheduler restarted, or took this client for gone")
            case Goodbye():
                why = f"the scheduler said goodbye: {message.reason}"
                if message.final:
                    self._give_up(ServiceUnavailable(why))
                else:
                    # It may have said so because of what this client sends: that must not go on for ever.
                    self._leave(why, ServiceUnavailable(why))

    def _on_welcome(self, welcome: Welcome) -> None:
        if self._welcome is not None and self._welcome.epoch != welcome.epoch:
            self._lose("the scheduler restarted")
        if not self._is_private():
            return
        self._welcome = welcome
        if welcome.model is not None:
            self._lost = None
            self._ready.set()
            self._resumptions.open(welcome.model)

    def _is_private(self) -> bool:
        """Whether the sockets are still this user's: a scheduler that ends removes its directory, and anyone may make
        one of that name."""
        try:
            if self.address.is_ipc:
                require_private(self.address.directory)
        except FileNotFoundError:
            return False  # that scheduler has ended since
        except ConfigurationError as error:
            self._give_up(error)
            return False
        return True

    # --- sending, and noticing that nobody listens -----------------------------------------------------------------

    def _send(self, data: bytes) -> bool:
        if self._socket is None or not self._socket.send([data]):
            return False
        self._sent_at = self._loop.time()
        return True

    async def _send_patiently(self, message: Any, answer: asyncio.Future[Stats] | None = None) -> None:
        """Sends as soon as there is a service and room in its queue; ZeroMQ does not say when there is room again.
        `answer` gets the Stats that this message asks for."""
        data = encode(message)
        while True:
            await self._ready.wait()
            if self._failure is not None:
                raise self._failure
            if self._send(data):
                if answer is not None:
                    self._asked.append(answer)
                return
            await asyncio.sleep(SEND_RETRY_S)

    def _tick(self) -> None:
        """Says hello until it is answered, then something at least every LONGEST_SILENCE_S."""
        now = self._loop.time()
        if now - self._ticked_at > self._silence_limit_s / 2:
            self._asked_at = None  # this end was busy with something else: what came meanwhile has not been read yet
        self._ticked_at = now
        if self._asked_at is not None and now - self._asked_at > self._silence_limit_s:
            self._on_silence(now)
        delay = CONNECT_RETRY_S
        if self._welcome is None:
            if self._hello_at is None or now - self._hello_at > HELLO_RETRY_S:
                hello = ClientHello(version=PROTOCOL_VERSION, name=self._name, session=self._session)
                self._hello_at = now if self._ask(hello, now) else None
        else:
            while self._unsent_cancels and self._send(encode(Cancel(ticket=self._unsent_cancels[0]))):
                self._unsent_cancels.popleft()
            silence = min(self._welcome.lease_s / 3, LONGEST_SILENCE_S)
            if self._keep_in_touch(now, silence):
                delay = min(silence / 2, LOOK_S) if len(self._requests) else silence / 2
        self._check_patience(now)
        self._tick_in(delay)

    def _keep_in_touch(self, now: float, silence: float) -> bool:
        """Pings if nothing has been sent or heard for a while; False if nobody can be reached."""
        if now - self._heard_at >= silence or self._lost is not None:  # it may be another one that is there now
            reached = self._ask(Ping(answer=True), now)
        elif now - self._sent_at < silence / 2 and self._socket is not None and self._socket.has_room:
            reached = True
        else:
            reached = self._send(encode(Ping()))
        if not reached and self._lost is None:
            self._lost = now, f"the scheduler at {self.address.url} could not be reached"
        return reached

    def _ask(self, message: Any, now: float) -> bool:
        """Sends something that is answered at once."""
        if not self._send(encode(message)):
            return False
        if self._asked_at is None:
            self._asked_at = now
        return True

    def _on_silence(self, now: float) -> None:
        """Nobody answers. A new socket, since the old one may lead nowhere."""
        self._asked_at = None
        if self._context is not None:
            self._connect(self._context)
        if self._welcome is not None:
            why = f"the scheduler at {self.address.url} has said nothing for {now - self._heard_at:.1f} s"
            self._lose(why, since=self._heard_at)
        self._hello_at = None

    def _tick_in(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._failure is None:
            self._timer = self._loop.call_later(delay, self._tick)

    def _check_patience(self, now: float) -> None:
        """Fails what is open if there has been no service for too long."""
        if self._lost is None:
            return
        since, why = self._lost
        limit = self._reconnect_timeout_s
        if self._welcome is not None and not self._ready.is_set():
            limit, why = self._model_timeout_s, f"{why}; it is there again, but has no worker with a loaded model"
        if limit is not None and now - since > limit:
            self._end_all(ServiceUnavailable(f"{why}; there was no service for {limit:g} s, so open requests are lost"))
            if self._ready.is_set():
                self._lose(why)
            self._lost = now, why  # for what is asked for from now on

    def _leave(self, why: str, broken: TandemError | None = None) -> None:
        """Back to greeting, at once. Open requests wait for a service; if `broken`, for the last time perhaps."""
        self._lose(why, broken)
        self._tick_in(0.0)

    def _lose(self, why: str, broken: TandemError | None = None, since: float | None = None) -> None:
        self._resumptions.close()
        for stream in self._requests.take_all():
            if broken is None:
                self._resumptions.add(stream)
            else:
                self._resumptions.repair(stream, broken)
        if self._lost is None:
            self._lost = self._loop.time() if since is None else since, why
        self._fetcher.ask_again()
        self._fail_questions(ServiceUnavailable(why))
        self._welcome = self._hello_at = None
        self._unsent_cancels.clear()
        self._ready.clear()

    def _give_up(self, error: TandemError) -> None:
        if self._failure is None:
            self._failure = error
            self._end_all(error)
            self._ready.set()

    def _end_all(self, error: TandemError) -> None:
        """Fails whatever is open."""
        self._requests.fail_all(error)
        self._resumptions.fail_all(error)
        self._fetcher.fail(error)
        self._fail_questions(error)

    def _fail_questions(self, error: TandemError) -> None:
        while self._asked:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_exception(error)

    def _why_not_ready(self, waited: float | None) -> str:
        where = f"at {self.address.url}" + (f" within {waited:g} s" if waited is not None else "")
        if self._ready.is_set():
            return f"the scheduler {where} took no more messages"
        if self._welcome is not None:
            return f"the scheduler {where} had no worker with a loaded model; start one, or allow more time to connect"
        if self._hello_at is not None:
            return f"something listens but no scheduler answered {where}"
        return (
            f"no scheduler could be reached {where}; is `tandem serve` running, with this address? (If it is, and its "
            "log says that it cuts connections, raise its ulimit -n.)"
        )


_INCOMING = (
    *(Tokens, Accepted, Refused, Suspected, Pong),
    *(Welcome, Stats, FileChunk, UnknownPeer, VersionRefused, Goodbye),
)
