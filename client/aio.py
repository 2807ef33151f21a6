"""The asynchronous client, which the synchronous one and the gateway are made of: from a prompt to a request's streams.

A prompt becomes token ids and complete sampling parameters (prompts.py), a request (connection.py), and its tokens
become text where they are read (completion.py).
"""

# ruff: noqa: ASYNC109 - `timeout` is what users of OpenAI's and every other client expect

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast, overload

from ..protocol.errors import InvalidRequest, RequestCancelled, ServiceUnavailable
from .batch import in_order, patiently
from .completion import CompletionStream
from .results import Completion

# NumPy, ZeroMQ, pydantic, tokenizers and jinja2 take longer to import than somebody should wait who only names a
# class of ours, so what needs them is imported where it is used first.
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..protocol.messages import FileInfo, ModelDescription, Stats
    from ..protocol.sampling import SamplingParams
    from .arguments import RequestOptions
    from .completion import Started
    from .prompts import ChatOptions, Message, Prompt
    from .stream import TokenStream
    from .tokenizer import Tokenizer

CONNECT_TIMEOUT_S = 60.0
MAX_CONCURRENCY = 256
LONG_TEXTS = 2
"""How many are made tokens of at a time."""
_T = TypeVar("_T")
CONTEXT_TOKENS = 32
"""Tokens of the prompt in which something visible is looked for, so that the answer's text keeps a leading space."""


class AsyncClient:
    """A connection to a running Tandem service.

        async with AsyncClient() as client:
            completion = await client.generate("The capital of France is", max_tokens=16)
            async for chunk in client.stream([{"role": "user", "content": "Hello!"}]):
                print(chunk.text, end="")

    `address` is what `tandem serve` printed (default: $TANDEM_ADDRESS, else this user's own service). Prompts are text,
    token ids, or lists of chat messages; sampling parameters are keyword arguments or a SamplingParams, and what is not
    given comes from the model's generation_config.json. A client belongs to the event loop it was connected on; any
    number of its tasks may use it at once.
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
        """Connects to nothing yet. `keys` is the key file that a tcp address needs, or a key directory (default:
        $TANDEM_KEYS, else ~/.config/tandem/keys); `insecure` does without; `connect_timeout` (s) includes waiting
        for a worker to load the model. Open requests go on when a service that was lost comes back; they fail when no
        scheduler answers for `reconnect_timeout` (s), or one that has no model for `connect_timeout`. `max_concurrency`
        bounds how much of a list of prompts is in flight at once; `name` is for the service's logs. Raises
        ConfigurationError for an address that cannot be or lacks its keys, InvalidRequest for other arguments that
        cannot."""
        from ..protocol.keys import peer_keys
        from ..protocol.transport import Address, default_address
        from .arguments import require_name, require_whole, seconds
        from .connection import Connection

        if address is not None and not isinstance(address, str):
            raise InvalidRequest(
                f"address: expected text like ipc:///directory, got {type(address).__name__}", field="address"
            )
        where = Address(address) if address is not None else default_address()
        if keys is not None and not isinstance(keys, str | PathLike):
            raise InvalidRequest(f"keys: expected a path, got {type(keys).__name__}", field="keys")
        found = peer_keys(where, "clients", None if keys is None else fspath(keys), insecure)
        require_whole("max_concurrency", max_concurrency, 1)
        require_name(name)
        self._connect_timeout = seconds("connect_timeout", connect_timeout)
        self._connection = Connection(
            where,
            name=name,
            reconnect_timeout_s=seconds("reconnect_timeout", reconnect_timeout),
            model_timeout_s=self._connect_timeout,
            keys=found,
        )
        self._max_concurrency = max_concurrency
        self._opened = False
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._long_texts = ThreadPoolExecutor(LONG_TEXTS, "tandem-long-text")
        """Where long texts and chats become tokens, so that short ones need not wait for them."""
        self._loading: tuple[list[str], asyncio.Task[Tokenizer | None]] | None = None
        """By the digests of the files; a scheduler that is started again announces the same ones."""

    # --- life ------------------------------------------------------------------------------------------------------

    async def connect(self, *, patiently: bool = False) -> None:
        """Waits until the service can take requests. Raises ServiceUnavailable after `connect_timeout`, unless it is
        to wait however long that takes, and AuthenticationError as soon as the scheduler has refused our key (within
        seconds, if it has another key than we expect)."""
        if self._opened:
            raise RuntimeError("this client was connected before; make a new one")
        self._opened = True
        self._loop = asyncio.get_running_loop()
        await self._connection.open(None if patiently else self._connect_timeout)

    async def close(self) -> None:
        """Cancels what is open and disconnects. Idempotent."""
        self._connection.close()
        self._closed = True
        self._long_texts.shutdown(wait=False)
        if self._loading is not None:
            task = self._loading[1]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # --- what is served --------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return self._connection.address.url

    @property
    def model(self) -> ModelDescription:
        """What the service serves: name, max_model_len (tokens), vocab_size, eos_token_ids, default_sampling … Raises
        ServiceUnavailable unless connected."""
        return self._connection.model

    async def stats(self, timeout: float | None = 10.0) -> Stats:
        """The service's counters: requests running and waiting, workers, blocks … Raises ServiceUnavailable if the
        scheduler does not answer within `timeout` seconds."""
        from .arguments import seconds

        self._require_loop()
        return await self._connection.stats(seconds("timeout", timeout))

    async def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, fetched on first use; None if the model comes without one."""
        self._require_loop()
        files = self._connection.files
        wanted = [text for info in files for text in (info.name, info.sha256)]
        if self._loading is None or self._loading[0] != wanted or _failed(self._loading[1]):
            self._loading = wanted, asyncio.create_task(self._load_tokenizer(files))
        loading = self._loading[1]
        # A caller that is cancelled must not take the tokenizer away from the others.
        await asyncio.wait({loading})
        if loading.cancelled():  # by close(): the caller itself was not cancelled
            raise RequestCancelled("the client was closed")
        return loading.result()

    async def _load_tokenizer(self, files: Sequence[FileInfo]) -> Tokenizer | None:
        from .tokenizer import TOKENIZER_FILE, Tokenizer

        if TOKENIZER_FILE not in {info.name for info in files}:
            return None
        contents = {info.name: await self._connection.fetch(info) for info in files}
        return await asyncio.to_thread(Tokenizer.from_files, contents)

    # --- requests --------------------------------------------------------------------------------------------------

    @overload
    async def generate(
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
    async def generate(
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

    async def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        chat: ChatOptions | None = None,
        on_done: Callable[[], None] | None = None,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Generates to the end. A list of prompts gives a list of completions in its order, with at most
        `max_concurrency` in flight; the first failure cancels the rest and is raised. `sampling_params` may then be a
        list too; `on_done` is called, on the client's loop, as each is completed.

        `n` samples of each prompt come as the completion's `choices`; sample i of a seed is always the same. Requests
        of a lower `priority` go first. Only requests with the same `cache_salt` share cached prefixes. `timeout` (s) is
        for each prompt, from when its turn comes; the service ends a request then, waiting or running, and the
        RequestTimeout carries what it has as `completion`.

        Raises InvalidRequest, Overloaded (a list waits and tries again instead), RequestFailed, RequestTimeout,
        RequestCancelled, ServiceUnavailable. Cancelling the task cancels the requests.
        """
        from .arguments import request_options
        from .prompts import is_batch

        options = request_options(n, priority, cache_salt)
        if is_batch(prompt):
            prompts = cast("Sequence[Prompt]", prompt)
            return await self._generate_all(prompts, sampling_params, chat, sampling, options, timeout, on_done)
        stream = self._new_stream(
            cast("Prompt", prompt),
            cast("SamplingParams | None", sampling_params),
            chat,
            sampling,
            options,
            timeout=timeout,
            collect=True,
        )
        completion = await stream.collect()
        if on_done is not None:
            on_done()
        return completion

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
    ) -> CompletionStream:
        """The answer as it comes: an asynchronous iterator of chunks, which is also an asynchronous context manager.

        With several samples, a chunk's `index` says whose it is. The request starts with the first iteration (or on
        entering the context). Leaving the loop early, closing the stream, or cancelling the task that iterates cancels
        the request. Errors are those of `generate`, raised while iterating, after what has arrived.
        """
        from .arguments import request_options

        options = request_options(n, priority, cache_salt)
        return self._new_stream(prompt, sampling_params, chat, sampling, options, timeout=timeout, collect=False)

    async def chat(
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
        """The model's answer to a chat. Tools are JSON schemas as in OpenAI's API; `template_variables` are passed to
        the chat template (`{"enable_thinking": False}`). Otherwise as `generate`."""
        from .prompts import ChatOptions, is_chat

        if not is_chat(messages):
            raise InvalidRequest("messages: expected a list of dicts, each with a role", field="messages")
        options = ChatOptions(
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )
        return await self.generate(
            messages,
            sampling_params,
            n=n,
            priority=priority,
            cache_salt=cache_salt,
            timeout=timeout,
            chat=options,
            **sampling,
        )

    def cancel(self, request: CompletionStream) -> None:
        """Cancels a streamed request; its reader gets RequestCancelled after the tokens that have arrived. Nothing
        happens if it is over."""
        request.cancel()

    # --- within ----------------------------------------------------------------------------------------------------

    def _new_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        chat: ChatOptions | None,
        sampling: Mapping[str, Any],
        options: RequestOptions,
        *,
        timeout: float | None,
        collect: bool,
    ) -> CompletionStream:
        from .arguments import require_params, seconds
        from .prompts import require_chat_options

        require_params(params)
        require_chat_options(prompt, chat)
        timeout = seconds("timeout", timeout)
        return CompletionStream(partial(self._start, prompt, params, chat, sampling, options, collect), timeout)

    async def _start(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        chat: ChatOptions | None,
        sampling: Mapping[str, Any],
        options: RequestOptions,
        collect: bool,
        deadline: float | None,
    ) -> Started:
        from ..protocol.sampling import without_text
        from .arguments import require_samples
        from .prompts import (
            is_chat,
            is_long,
            require_count,
            require_length,
            require_random,
            resolve_sampling,
            to_token_ids,
            with_bad_words,
        )
        from .stream import History

        loop = self._require_loop()
        model = await self._connection.ready(self._connect_timeout)
        checked = resolve_sampling(model, params, sampling)
        require_random(checked, options.n)
        require_samples(options.n, self._connection.max_n)
        require_length(prompt, model.max_model_len)
        tokenizer = await self.tokenizer()
        if checked.stop and tokenizer is None:
            raise InvalidRequest(
                "stop: the model comes without a tokenizer, so there is no text to look in; use stop_token_ids",
                field="stop",
                value=list(checked.stop),
            )
        checked = with_bad_words(checked, tokenizer)
        tokens = partial(to_token_ids, prompt, tokenizer, chat, partial(require_count, model.max_model_len))
        chats = is_chat(prompt)
        extras = None if chat is None else (chat.tools, chat.documents, chat.template_variables)
        if (chats or isinstance(prompt, str)) and is_long(prompt, extras):
            ids = await self._aside(tokens)
        else:  # a chat on another thread all the same: nobody knows what a template does
            ids = await asyncio.to_thread(tokens) if chats else tokens()
        require_length(ids, model.max_model_len)
        if deadline is not None and loop.time() >= deadline:
            raise TimeoutError
        samples = [
            History(
                ids,
                without_text(checked),
                sample=index,
                priority=options.priority,
                cache_salt=options.cache_salt,
                deadline=deadline,
            )
            for index in range(options.n)
        ]
        streams = await self._connection.submit(samples, collect=collect, patience=self._connect_timeout)
        return self._started(streams, ids, checked, model, tokenizer)

    def _started(
        self,
        streams: Sequence[TokenStream],
        ids: npt.NDArray[np.int32],
        sampling: SamplingParams,
        model: ModelDescription,
        tokenizer: Tokenizer | None,
    ) -> Started:
        """What reads the streams of a prompt's samples, as text where the model has a tokenizer."""
        from .completion import Sample, Started, TextEnd
        from .logprobs import LogprobReader

        context = ids[-CONTEXT_TOKENS:].tolist()
        eos = frozenset(() if sampling.ignore_eos else model.eos_token_ids)
        named = frozenset(sampling.stop_token_ids)
        end = TextEnd(eos | named, named - eos, sampling.stop, sampling.include_stop_str_in_output, sampling.min_tokens)
        skip = sampling.skip_special_tokens
        logprobs = LogprobReader(tokenizer)
        return Started(
            samples=[
                Sample(
                    index,
                    tokens,
                    None if tokenizer is None else tokenizer.detokenizer(context, skip),
                    end,
                    self._connection.stop,
                    logprobs,
                )
                for index, tokens in enumerate(streams)
            ],
            watches_text=bool(sampling.stop),
            cancel=self._connection.cancel,
            loop=asyncio.get_running_loop(),
        )

    async def _aside(self, work: Callable[[], _T]) -> _T:
        """What `work` returns, on one of the threads for long texts. Raises ServiceUnavailable if the client is closed
        before it begins."""

        def unless_closed() -> _T:
            if self._closed:
                raise ServiceUnavailable("the client was closed")
            return work()

        if self._closed:  # then no thread takes it
            return unless_closed()
        return await asyncio.get_running_loop().run_in_executor(self._long_texts, unless_closed)

    async def _generate_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        chat: ChatOptions | None,
        sampling: Mapping[str, Any],
        options: RequestOptions,
        time_limit: float | None,
        on_done: Callable[[], None] | None,
    ) -> list[Completion]:
        from .arguments import require_params, seconds

        time_limit = seconds("timeout", time_limit)
        if isinstance(params, Sequence) and not isinstance(params, str):
            params_of: Sequence[SamplingParams | None] = params
        else:
            require_params(params)
            params_of = [params] * len(prompts)
        if len(params_of) != len(prompts):
            raise InvalidRequest(
                f"sampling_params: {len(params_of)} for {len(prompts)} prompts",
                field="sampling_params",
                limit=len(prompts),
                value=len(params_of),
            )

        async def one(i: int) -> Completion:
            def attempt(time_left: float | None) -> Awaitable[Completion]:
                stream = self._new_stream(
                    prompts[i], params_of[i], chat, sampling, options, timeout=time_left, collect=True
                )
                return stream.collect()

            completion = await patiently(attempt, time_limit)
            if on_done is not None:
                on_done()
            return completion

        return await in_order(len(prompts), self._max_concurrency, one)

    def _require_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            raise ServiceUnavailable("not connected: use the client in an async with block, or await connect()")
        if loop is not self._loop:
            raise RuntimeError("this client was connected on another event loop; make one for each loop, or use Client")
        return loop


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
