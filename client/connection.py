"""One client's conversation with the scheduler, on one event loop: greeting, lease, requests, files.

    greeting ──Welcome with a model──▶ ready ──UnknownPeer, Goodbye, unreachable for too long──▶ greeting

While greeting, ClientHello is sent until somebody answers. Leaving `ready` fails all open requests, since the scheduler
has forgotten them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import (
    ProtocolError,
    RequestCancelled,
    ServiceUnavailable,
    TandemError,
    VersionMismatch,
)
from ..protocol.keys import PeerKeys
from ..protocol.messages import (
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
    Refused,
    Stats,
    Suspected,
    Tokens,
    UnknownPeer,
    VersionRefused,
    Welcome,
)
from ..protocol.transport import Address, LoopSocket, open_dealer, require_private
from ..protocol.wires import HANDSHAKE_EVENTS, Handshakes, monitor, read_event
from .files import FileFetcher
from .requests import OpenRequests
from .stream import MAX_UNREAD_TOKENS, History, TokenStream

HELLO_RETRY_S = 3.0
"""A greeting that nobody answered is repeated after this time."""
CONNECT_RETRY_S = 0.02
SEND_RETRY_S = 0.01
LONGEST_SILENCE_S = 1.0
"""Something is sent at least so often: it renews the lease, and shows whether the scheduler can be reached."""
MAX_UNSENT_CANCELS = 65_536


class Connection:
    """See the module. Everything here must be called on the loop that `open` ran on."""

    def __init__(
        self,
        address: Address,
        *,
        name: str = "",
        reconnect_timeout_s: float | None = 10.0,
        keys: PeerKeys | None = None,
    ) -> None:
        self.address = address
        self._keys = keys
        self._handshakes = Handshakes(address.url, None if keys is None else keys.public)
        self._monitor: LoopSocket | None = None
        self._name = name
        self._reconnect_timeout_s = reconnect_timeout_s
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: LoopSocket | None = None
        self._welcome: Welcome | None = None
        self._ready = asyncio.Event()
        self._failure: TandemError | None = None
        """Why the connection is over for good."""
        self._requests = OpenRequests(self.cancel)
        self._fetcher = FileFetcher(self._send_patiently)
        self._unsent_cancels: deque[int] = deque(maxlen=MAX_UNSENT_CANCELS)
        self._asked: deque[asyncio.Future[Stats]] = deque()
        """Who waits for Stats; answers come in the order of the questions."""
        self._timer: asyncio.TimerHandle | None = None
        self._hello_at: float | None = None
        self._sent_at = 0.0
        self._unreachable_since: float | None = None

    # --- life ------------------------------------------------------------------------------------------------------

    async def open(self, patience: float | None) -> None:
        """Connects and waits until there is a model. Raises ServiceUnavailable (VersionMismatch if that is why) after
        `patience` seconds (None: never), ConfigurationError if the address is another user's; nothing is open then."""
        if self.address.is_ipc and self.address.directory.exists():
            require_private(self.address.directory)
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        try:
            watch = None if self.address.is_ipc else self._watch_handshakes
            dealer = open_dealer(self._context, self.address.endpoint("clients"), self._keys, watch)
            self._socket = LoopSocket(dealer, self._on_frames)
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

    def close(self, reason: str = "the client was closed") -> None:
        """Ends everything: open requests fail with RequestCancelled, and the scheduler cancels them. Idempotent."""
        if self._failure is None:
            self._failure = ServiceUnavailable(reason)
        self._end_streams(RequestCancelled(reason))
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
        if self._context is not None:
            context, self._context = self._context, None
            context.term()  # waits at most for the socket's linger
        self._ready.set()  # nobody waits for what will not come

    @property
    def open_requests(self) -> int:
        """How many requests have not ended."""
        return len(self._requests)

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
            self._requests.add(stream)
        return streams

    def cancel(self, stream: TokenStream, error: TandemError | None = None) -> None:
        """Ends a request now, on both ends; nothing happens if it is over."""
        if not self._requests.remove(stream):
            return
        stream.fail(error or RequestCancelled("the request was cancelled"))
        self._send_cancel(stream.ticket)

    def stop(self, stream: TokenStream) -> None:
        """Ends a request now and well: its reader has found all that it wants among the tokens that have come."""
        if self._requests.stop(stream):
            self._send_cancel(stream.ticket)

    def _send_cancel(self, ticket: int) -> None:
        if not self._send(encode(Cancel(ticket=ticket))):
            self._unsent_cancels.append(ticket)

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
        try:
            if len(frames) != 1:
                raise ProtocolError(f"a message has one frame, not {len(frames)}")
            self._handle(decode(frames[0], *_INCOMING))
        except VersionMismatch as error:
            self._give_up(VersionMismatch(f"the scheduler at {self.address.url}: {error}"))
        except ProtocolError as error:
            broken = ProtocolError(f"the scheduler at {self.address.url} broke the protocol: {error}")
            if self._ready.is_set():
                self._leave(broken)
            else:
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
                    self._leave(_lost("the scheduler restarted, or took this client for gone"))
            case Goodbye():
                self._leave(_lost(f"the scheduler said goodbye: {message.reason}"))

    def _on_welcome(self, welcome: Welcome) -> None:
        if self._welcome is not None and self._welcome.epoch != welcome.epoch:
            self._end_streams(_lost("the scheduler restarted"))
        self._welcome = welcome
        if welcome.model is not None:
            self._ready.set()

    # --- sending, and noticing that nobody listens -----------------------------------------------------------------

    def _send(self, data: bytes) -> bool:
        if self._socket is None or not self._socket.send([data]):
            return False
        self._sent_at = self._loop.time()
        self._unreachable_since = None
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
        delay = CONNECT_RETRY_S
        if self._welcome is None:
            if self._hello_at is None or now - self._hello_at > HELLO_RETRY_S:
                sent = self._send(encode(ClientHello(version=PROTOCOL_VERSION, name=self._name)))
                self._hello_at = now if sent else None
        else:
            silence = min(self._welcome.lease_s / 3, LONGEST_SILENCE_S)
            while self._unsent_cancels and self._send(encode(Cancel(ticket=self._unsent_cancels[0]))):
                self._unsent_cancels.popleft()
            if now - self._sent_at >= silence / 2 and not self._send(encode(Ping())):
                self._on_unreachable(now)
                if self._welcome is None:
                    return
            else:
                delay = silence / 2
        self._tick_in(delay)

    def _tick_in(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._failure is None:
            self._timer = self._loop.call_later(delay, self._tick)

    def _on_unreachable(self, now: float) -> None:
        if self._unreachable_since is None:
            self._unreachable_since = now
        elif (limit := self._reconnect_timeout_s) is not None and now - self._unreachable_since > limit:
            self._leave(_lost(f"the scheduler at {self.address.url} could not be reached for {limit:g} s"))

    def _leave(self, error: TandemError) -> None:
        """Back to greeting, at once."""
        self._end_streams(error)
        self._welcome = self._hello_at = self._unreachable_since = None
        self._unsent_cancels.clear()
        self._ready.clear()
        self._tick_in(0.0)

    def _give_up(self, error: TandemError) -> None:
        if self._failure is None:
            self._failure = error
            self._end_streams(error)
            self._ready.set()

    def _end_streams(self, error: TandemError) -> None:
        self._requests.fail_all(error)
        self._fetcher.fail(error)
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
        return f"no scheduler could be reached {where}; is `tandem serve` running, with this address?"


_INCOMING = (Tokens, Accepted, Refused, Suspected, Welcome, Stats, FileChunk, UnknownPeer, VersionRefused, Goodbye)


def _lost(why: str) -> ServiceUnavailable:
    return ServiceUnavailable(f"{why}; open requests are lost")
