"""The synchronous client: an AsyncClient on an event loop of its own, on a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from ..protocol.errors import ServiceUnavailable
from .aio import CONNECT_TIMEOUT_S, MAX_CONCURRENCY, AsyncClient

if TYPE_CHECKING:
    from ..protocol.messages import ModelDescription, Stats
    from ..protocol.sampling import SamplingParams
    from .completion import CompletionStream
    from .prompts import ChatOptions, Message, Prompt
    from .results import Chunk, Completion
    from .tokenizer import Tokenizer

_T = TypeVar("_T")

LAST_WORDS_S = 1.0
"""How long calls that are open when the client is closed may take to end by themselves."""


class Client:
    """A connection to a running Tandem service, for programs that are not asynchronous, and for notebooks.

        with Client() as client:
            print(client.generate("The capital of France is", max_tokens=16).text)
            for chunk in client.stream([{"role": "user", "content": "Hello!"}]):
                print(chunk.text, end="")

    Connects at once. Any number of threads may use it. Ctrl-C during a call cancels its requests. For parameters and
    what is raised see AsyncClient.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        keys: str | PathLike[str] | None = None,
        insecure: bool = False,
        connect_timeout: float | None = CONNECT_TIMEOUT_S,
        reconnect_timeout: float | None = 10.0,
        max_concurrency: int = MAX_CONCURRENCY,
        name: str = "",
    ) -> None:
        """As AsyncClient, and connects: raises ServiceUnavailable after `connect_timeout` seconds."""
        self._client = AsyncClient(
            address,
            keys=keys,
            insecure=insecure,
            connect_timeout=connect_timeout,
            reconnect_timeout=reconnect_timeout,
            max_concurrency=max_concurrency,
            name=name,
        )
        self._thread = _LoopThread()
        # A program that forgets to close must end all the same, and its thread with the client.
        self._finalizer = weakref.finalize(self, _shut_down, self._thread, self._client)
        try:
            self._thread.run(self._client.connect)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancels what is open, disconnects and ends the thread. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        return self._client.address

    @property
    def model(self) -> ModelDescription:
        """What the service serves; see AsyncClient.model."""
        return self._client.model

    def stats(self, timeout: float | None = 10.0) -> Stats:
        """The service's counters; see AsyncClient.stats."""
        return self._run(partial(self._client.stats, timeout))

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if the model comes without one."""
        return self._run(self._client.tokenizer)

    @overload
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        chat: ChatOptions | None = None,
        **sampling: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        chat: ChatOptions | None = None,
        on_done: Callable[[], None] | None = None,
        **sampling: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Any,
        sampling_params: Any = None,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        chat: ChatOptions | None = None,
        on_done: Callable[[], None] | None = None,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """As AsyncClient.generate: one completion, or a list for a list of prompts."""
        call: Callable[[], Coroutine[Any, Any, Completion | list[Completion]]] = partial(
            self._client.generate,
            prompt,
            sampling_params,
            n=n,
            priority=priority,
            cache_salt=cache_salt,
            timeout=timeout,
            chat=chat,
            on_done=on_done,
            **sampling,
        )
        return self._run(call)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        chat: ChatOptions | None = None,
        **sampling: Any,
    ) -> SyncCompletionStream:
        """As AsyncClient.stream: an iterator of chunks, which is also a context manager."""
        stream = self._client.stream(
            prompt,
            sampling_params,
            n=n,
            priority=priority,
            cache_salt=cache_salt,
            timeout=timeout,
            chat=chat,
            **sampling,
        )
        return SyncCompletionStream(stream, self)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        template_variables: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Completion:
        """As AsyncClient.chat."""
        return self._run(
            partial(
                self._client.chat,
                messages,
                sampling_params,
                n=n,
                priority=priority,
                cache_salt=cache_salt,
                timeout=timeout,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_variables=template_variables,
                **sampling,
            )
        )

    def cancel(self, request: SyncCompletionStream) -> None:
        """Cancels a streamed request, from any thread; its reader gets RequestCancelled."""
        request.cancel()

    def _run(self, call: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        return self._thread.run(call)


class SyncCompletionStream:
    """A streamed answer: iterate over it for chunks, call `result()` for the whole. One thread may read it at a time.

    The request is cancelled by `cancel`, by `close`, by leaving the context, or when nobody holds the stream any more.
    """

    def __init__(self, stream: CompletionStream, client: Client) -> None:
        self._stream = stream
        self._client = client  # which would close if nobody held it: `for chunk in Client().stream(...)`
        self._run = client._run

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        chunk: Chunk | None = self._run(partial(_next_or_none, self._stream))
        if chunk is None:
            raise StopIteration
        return chunk

    def result(self) -> Completion:
        """Reads what is left and returns the whole answer."""
        completion: Completion = self._run(self._stream.result)
        return completion

    def cancel(self) -> None:
        """Cancels the request; its reader gets the tokens that have arrived, then RequestCancelled."""
        self._run(partial(_cancel, self._stream))

    def close(self) -> None:
        """Cancels the request if it is not over, and ends the iteration."""
        self._run(self._stream.aclose)

    def __enter__(self) -> Self:
        self._run(self._stream.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def text(self) -> str:
        """All text that has been read."""
        return self._stream.text


async def _next_or_none(stream: CompletionStream) -> Chunk | None:
    async for chunk in stream:
        return chunk
    return None


async def _cancel(stream: CompletionStream) -> None:
    stream.cancel()


class _LoopThread:
    """An event loop that runs on a thread until it is stopped."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._main, name="tandem-client", daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Calls it there and waits for what it returns. An exception here, such as KeyboardInterrupt, cancels it."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this Client was made before the process forked, and works in the parent alone; make one "
                "in each process"
            )
        if threading.current_thread() is self._thread:
            raise RuntimeError("a Client cannot be used from within its own event loop; use AsyncClient")
        with self._lock:
            if self._stopped:
                raise ServiceUnavailable("the client was closed")
            future = self._begin(call)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ServiceUnavailable("the client was closed during the call") from None
        except BaseException:
            future.cancel()
            raise

    def _begin(self, call: Callable[[], Coroutine[Any, Any, _T]]) -> concurrent.futures.Future[_T]:
        """As asyncio.run_coroutine_threadsafe, but that the coroutine is made there: one made here would be left behind
        by a Ctrl-C before it is handed over, of which Python warns the user."""
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(_start, call, future)
        return future

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Calls `last`, ends every other task, then the thread. Idempotent; does nothing in a forked child, which has
        no such thread."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        self._begin(partial(self._finish, last))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def _finish(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await last()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:  # calls that were open have just failed, and say why if they may
                _, late = await asyncio.wait(others, timeout=LAST_WORDS_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
            await self._loop.shutdown_default_executor()
        finally:
            self._loop.stop()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()


def _start(call: Callable[[], Coroutine[Any, Any, _T]], future: concurrent.futures.Future[_T]) -> None:
    """On the loop. How the call ends is how the future does, and the call is cancelled if the future is."""

    async def called() -> _T:
        return await call()

    loop = asyncio.get_running_loop()
    task = loop.create_task(called())

    def ended(_: object) -> None:
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            future.cancel()
        if not future.set_running_or_notify_cancel():
            return
        if error is None:
            future.set_result(task.result())
        else:
            future.set_exception(error)

    def cancelled(_: object) -> None:
        if future.cancelled() and not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)

    task.add_done_callback(ended)
    future.add_done_callback(cancelled)


def _shut_down(thread: _LoopThread, client: AsyncClient) -> None:
    thread.stop(client.close)
