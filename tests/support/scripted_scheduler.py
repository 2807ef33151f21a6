"""A scheduler for tests of the client: it speaks the real protocol over a real ROUTER, and says what the test wants."""

import asyncio
import hashlib
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import zmq

from tandem.client.tokenizer import Tokenizer
from tandem.protocol.codec import decode, encode
from tandem.protocol.messages import (
    MAX_SAMPLES,
    PROTOCOL_VERSION,
    Accepted,
    AskStats,
    Cancel,
    ClientHello,
    Ended,
    FetchFile,
    FileChunk,
    FileInfo,
    Goodbye,
    ModelDescription,
    Ping,
    Pong,
    Stats,
    Submit,
    Tokens,
    UnknownPeer,
    Welcome,
)
from tandem.protocol.transport import Address, LoopSocket, open_router

from support.deadlines import DEADLINE_S
from support.tokenizer_zoo import byte_level

M = TypeVar("M")
FILES = byte_level()
TOKENIZER = Tokenizer.from_files(FILES)
EOS = TOKENIZER.eos_token_ids[0]
MODEL = ModelDescription(
    name="scripted",
    architecture="none",
    dtype="float32",
    vocab_size=TOKENIZER.vocab_size,
    max_model_len=4096,
    eos_token_ids=(EOS,),
    default_sampling={"temperature": 0.5, "top_k": 7},
)
ANSWER = "Hello, world! 😀"


def infos(files: Mapping[str, bytes]) -> tuple[FileInfo, ...]:
    return tuple(
        FileInfo(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()
    )


class ScriptedScheduler:
    """`async with` it on the client's own loop. Answers greetings and file requests by itself, and each Submit with
    what `script(self, submit)` does."""

    def __init__(
        self,
        script: "Callable[[ScriptedScheduler, Submit], None] | None" = None,
        *,
        greeting: "Callable[[ScriptedScheduler], None] | None" = None,
        model: ModelDescription | None = MODEL,
        files: Mapping[str, bytes] = FILES,
        lease_s: float = 15.0,
        max_n: int = MAX_SAMPLES,
        chunk_bytes: int = 1_000,
        url: str | None = None,
    ) -> None:
        self.script = script or ScriptedScheduler.answer
        self.greeting = greeting or ScriptedScheduler.welcome
        self.model = model
        self.files = files
        self.file_infos = infos(files)
        self.lease_s = lease_s
        self.max_n = max_n
        self.chunk_bytes = chunk_bytes
        self.epoch = 7
        self.stats: Stats | None = Stats(epoch=7, running=0, waiting=0, preemptions=0)
        """What AskStats is answered with; None leaves it unanswered."""
        self.answers_pings = self.answers_fetches = True
        self.received: list[Any] = []
        self.directory = Path(tempfile.mkdtemp(prefix="tandem-test-"))
        self.address = url or f"ipc://{self.directory}"
        self._heard = asyncio.Event()
        self._routes: list[bytes] = []
        self._known: set[bytes] = set()
        self._number = 0

    async def __aenter__(self) -> Self:
        self._context = zmq.Context()
        self.listen()
        return self

    def listen(self) -> None:
        router = open_router(self._context, Address(self.address).endpoint("clients"))
        self.socket = LoopSocket(router, self._on_message)

    async def __aexit__(self, *_: object) -> None:
        self.socket.close()
        self._context.term()
        shutil.rmtree(self.directory)

    def restart(self) -> None:
        """Another life at the same address, which knows nobody."""
        self.epoch += 1
        self._known.clear()

    # --- what the test sees ----------------------------------------------------------------------------------------

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.received if isinstance(message, kind)]

    async def until(self, kind: type[M], count: int = 1) -> list[M]:
        """Waits for `count` messages of a kind."""
        async with asyncio.timeout(DEADLINE_S):
            while len(found := self.of(kind)) < count:
                self._heard.clear()
                await self._heard.wait()
        return found

    # --- what it says ----------------------------------------------------------------------------------------------

    def say(self, message: object) -> None:
        """To the client that spoke last."""
        self.socket.send([self._routes[-1], message if isinstance(message, bytes) else encode(message)])

    def welcome(self) -> None:
        files = self.file_infos if self.model is not None else ()
        self.say(
            Welcome(
                version=PROTOCOL_VERSION,
                epoch=self.epoch,
                lease_s=self.lease_s,
                model=self.model,
                files=files,
                max_n=self.max_n,
            )
        )

    def accept(self, submit: Submit) -> None:
        self._number += 1
        self.say(Accepted(epoch=self.epoch, ticket=submit.ticket, number=self._number))

    def tokens(
        self, ticket: int, tokens: Sequence[int], offset: int, ended: Sequence[Ended] = (), epoch: int | None = None
    ) -> None:
        some = len(tokens) > 0
        self.say(
            Tokens(
                epoch=self.epoch if epoch is None else epoch,
                ticket=np.array([ticket] if some else [], np.int64),
                offset=np.array([offset] if some else [], np.int32),
                count=np.array([len(tokens)] if some else [], np.int32),
                token=np.array(tokens, np.int32),
                ended=tuple(ended),
            )
        )

    def end(self, submit: Submit, count: int, reason: str = "stop") -> Ended:
        return Ended(
            ticket=submit.ticket,
            reason=reason,
            prompt_tokens=len(submit.prompt),
            completion_tokens=count,
            cached_tokens=1,
            queue_s=0.25,
            first_token_s=0.5,
            total_s=0.75,
        )

    def answer(self, submit: Submit) -> None:
        """ANSWER token by token, then the end-of-sequence token and the end."""
        self.accept(submit)
        ids = TOKENIZER.encode(ANSWER, add_special_tokens=False)
        for offset, token in enumerate(ids):
            self.tokens(submit.ticket, [token], offset)
        self.tokens(submit.ticket, [EOS], len(ids), [self.end(submit, len(ids) + 1)])

    def begin(self, submit: Submit) -> None:
        """Three tokens and no end."""
        self.accept(submit)
        self.tokens(submit.ticket, [5, 6, 7], 0)

    # --- within ----------------------------------------------------------------------------------------------------

    def _on_message(self, frames: list[bytes]) -> None:
        route, data = frames
        message = decode(data, ClientHello, Submit, Cancel, Ping, AskStats, FetchFile, Goodbye)
        if not self._routes or self._routes[-1] != route:
            self._routes.append(route)
        self.received.append(message)
        self._heard.set()
        if isinstance(message, ClientHello):
            self._known.add(route)
            self.greeting(self)
            return
        if route not in self._known:
            self.say(UnknownPeer(epoch=self.epoch))
            return
        match message:
            case FetchFile() if self.answers_fetches:
                content = self.files[message.name][message.offset : message.offset + self.chunk_bytes]
                self.say(FileChunk(name=message.name, offset=message.offset, data=content))
            case AskStats():
                if self.stats is not None:
                    self.say(self.stats)
            case Ping() if message.answer and self.answers_pings:
                self.say(Pong(epoch=self.epoch))
            case Submit():
                self.script(self, message)


@contextmanager
def scheduler_thread(make: Callable[[], ScriptedScheduler]) -> Iterator[ScriptedScheduler]:
    """A scripted scheduler on a thread and loop of its own, for tests of the synchronous client."""
    running = threading.Event()
    held: dict[str, Any] = {}

    async def main() -> None:
        held["loop"], held["stop"] = asyncio.get_running_loop(), asyncio.Event()
        async with make() as scheduler:
            held["scheduler"] = scheduler
            running.set()
            await held["stop"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert running.wait(DEADLINE_S)
        yield held["scheduler"]
    finally:
        held["loop"].call_soon_threadsafe(held["stop"].set)
        thread.join()


def on_thread(loop_of: ScriptedScheduler, wait: Callable[[], Awaitable[M]]) -> M:
    """Waits, from another thread, for something on the scheduler's loop."""

    async def call() -> M:
        return await wait()

    loop = loop_of.socket._loop
    return asyncio.run_coroutine_threadsafe(call(), loop).result(DEADLINE_S)
