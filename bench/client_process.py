"""One process that sends its part of a load and takes every token, through the SDK or HTTP: `python -m
tandem.bench.client_process`.

A Python client streams some tens of thousands of deliveries a second, which can be less than what it measures, so
load.py starts as many of these as it is told. JSON lines come on stdin and go to stdout:

    {"address", "keys", "insecure", "base_url", "part", "parts", "load"}  →  {"event": "ready", …what is served}
    {"backend", "run", "concurrency", "due"}, or {"backend", "warm_up"}   →  {"event": "prepared"}
    {"start": monotonic seconds}                        →  {"event": "progress", "ended"} …, {"event": "done", …}

Every part makes its own prompts from the seed; `due` are its requests' times in seconds after the start. All processes
of a machine share the monotonic clock, so their times can be put together.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from ..client import AsyncClient, Tokenizer
from ..protocol.errors import ConfigurationError, TandemError
from ..protocol.sampling import SamplingParams
from ..protocol.structured import StructuredOutputsParams
from .metrics import HttpFailed, Outcome
from .workloads import Ids, Load, Wanted, more_sampling, plan, prompt_of, sampling_of

if TYPE_CHECKING:
    from .http_client import HttpClient


WARM_UP_TOKENS = 16
TEXT_PROMPT_TOKENS = 64
"""Random tokens that stand for a text of a trace while warming up."""
PROGRESS_EVERY_S = 0.5
SDK = "sdk"
OPENAI = "openai"
BACKENDS = (SDK, OPENAI)
"""What a load may go through."""

Chat = list[dict[str, str]]
Sender = Callable[[Outcome, float], Awaitable[None]]
"""Sends a request, takes its answer and enters what became of it, with times from a monotonic time on. Raises
TandemError."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request."""

    prompt: str | Ids | Chat
    sampling: SamplingParams


class ClientProcess:
    """This process's part of the load."""

    def __init__(
        self,
        client: AsyncClient,
        http: HttpClient | None,
        tokenizer: Tokenizer | None,
        load: Load,
        part: int,
        parts: int,
    ) -> None:
        """Raises ConfigurationError if the load is text and the model has no tokenizer, if HTTP does not know one of
        its sampling parameters, or if the trace is not good."""
        if (load.text or load.chat) and tokenizer is None:
            flag = "--chat" if load.chat else "--text"
            raise ConfigurationError(f"{flag}: the model comes without a tokenizer; send token ids")
        if http is not None and "bad_words_token_ids" in more_sampling(load.sampling_params):
            raise ConfigurationError(
                "--sampling-params: bad_words_token_ids cannot be asked for over HTTP (bad_words can)"
            )
        self._client = client
        self._http = http
        self._tokenizer = tokenizer
        self._load = load
        self._wanted = plan(load)
        self._mine = range(part, len(self._wanted), parts)

    def prepare(self, backend: str, run: int) -> list[Sender]:
        """The requests of a run, made before it starts so that making them costs it nothing."""
        return [self._sender(backend, self._job(index, self._wanted[index], run)) for index in self._mine]

    def prepare_warm_up(self, backend: str, count: int) -> list[Sender]:
        """A few short requests whose prompts are as long as the load's, and are no prompts of any run."""
        found = []
        for index in self._mine[:count]:
            wanted = self._wanted[index]
            given = wanted.prompt
            length = TEXT_PROMPT_TOKENS if isinstance(given, str) else given if isinstance(given, int) else len(given)
            tokens = min(WARM_UP_TOKENS, wanted.output_tokens)
            found.append(self._sender(backend, self._job(index, Wanted(length, tokens, wanted.group), run=0)))
        return found

    def _job(self, index: int, wanted: Wanted, run: int) -> Job:
        load = self._load
        prompt: str | Ids | Chat = prompt_of(load, index, wanted, self._client.model.vocab_size, run)
        if (load.text or load.chat) and self._tokenizer is not None and isinstance(prompt, np.ndarray):
            prompt = self._tokenizer.decode(prompt.tolist())
        if load.chat:
            prompt = [{"role": "user", "content": str(prompt)}]
        return Job(prompt, sampling_of(load, index, wanted.output_tokens))

    def _sender(self, backend: str, job: Job) -> Sender:
        if backend == SDK:
            return lambda outcome, start: self._through_sdk(job, outcome, start)
        http = self._http
        assert http is not None
        path, body = _as_http(job, self._client.model.name)
        request = http.request(path, body)
        return lambda outcome, start: http.stream(request, outcome, start)

    def begin(self) -> None:
        """Before each run."""
        if self._http is not None:
            self._http.close_idle()

    async def run(
        self, jobs: Sequence[Sender], due: Sequence[float], concurrency: int | None, start: float
    ) -> list[Outcome]:
        """Sends each job when it is due, with at most `concurrency` in flight; returns what became of them."""
        gate = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
        outcomes = [Outcome() for _ in due]
        ended = 0

        async def one(job: Sender, outcome: Outcome, when: float) -> None:
            nonlocal ended
            # uvloop rounds to milliseconds, and so may wake up too early.
            while (left := start + when - time.monotonic()) > 0:  # noqa: ASYNC110  (time is all that is waited for)
                await asyncio.sleep(left)
            outcome.late = time.monotonic() - start - when
            async with gate:
                await self._send(job, outcome, start)
            ended += 1

        async def tell() -> None:
            told = 0
            while True:
                await asyncio.sleep(PROGRESS_EVERY_S)
                if ended > told:
                    say("progress", ended=ended - told)
                    told = ended

        teller = asyncio.create_task(tell())
        try:
            async with asyncio.TaskGroup() as tasks:
                for job, outcome, when in zip(jobs, outcomes, due, strict=True):
                    tasks.create_task(one(job, outcome, when))
        finally:
            teller.cancel()
        return outcomes

    async def _send(self, job: Sender, outcome: Outcome, start: float) -> None:
        outcome.sent = time.monotonic() - start
        try:
            await job(outcome, start)
            if not outcome.times:
                outcome.failure, outcome.message = "NoTokens", "the request ended without a token"
        except HttpFailed as error:
            outcome.failure, outcome.message = error.kind, str(error)
        except TandemError as error:
            outcome.failure, outcome.message = type(error).__name__, str(error)
        outcome.ended = time.monotonic() - start

    async def _through_sdk(self, job: Job, outcome: Outcome, start: float) -> None:
        clock = time.monotonic
        stream = self._client.stream(job.prompt, job.sampling)
        async for chunk in stream:
            if chunk.token_ids:
                outcome.times.append(clock() - start)
                outcome.counts.append(len(chunk.token_ids))
        usage = (await stream.result()).usage
        outcome.prompt_tokens, outcome.cached_tokens = usage.prompt_tokens, usage.cached_tokens


def _as_http(job: Job, model: str) -> tuple[str, dict[str, Any]]:
    """Path and body that ask for the same."""
    sampling: dict[str, Any] = {"temperature": job.sampling.temperature, **_set(job.sampling)}
    if (structure := job.sampling.structured_outputs) is not None:
        sampling["structured_outputs"] = _set(structure)
    body = {**sampling, "model": model, "stream": True, "stream_options": {"include_usage": True}}
    if isinstance(job.prompt, list):
        if job.sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": job.sampling.logprobs}
        return "/v1/chat/completions", {**body, "messages": job.prompt}
    prompt = job.prompt if isinstance(job.prompt, str) else job.prompt.tolist()
    return "/v1/completions", {**body, "prompt": prompt}


def _set(params: SamplingParams | StructuredOutputsParams) -> dict[str, Any]:
    """Its fields that are not at their defaults."""
    return {f.name: value for f in fields(params) if (value := getattr(params, f.name)) != f.default}


def say(event: str, **details: Any) -> None:
    """One line to whoever started this process."""
    sys.stdout.write(json.dumps({"event": event, **details}) + "\n")
    sys.stdout.flush()


async def _hear() -> dict[str, Any]:
    """The next line from there; empty at the end."""
    line = await asyncio.to_thread(sys.stdin.readline)
    found: dict[str, Any] = json.loads(line) if line else {}
    return found


def _http_client(base_url: str, api_key: str) -> HttpClient:
    from .http_client import HttpClient, Server  # needs httptools, which only a load over HTTP does

    return HttpClient(Server.at(base_url, api_key))


async def _serve(first: dict[str, Any]) -> None:
    name = f"tandem bench {first['part']}"
    async with AsyncClient(first["address"], keys=first["keys"], insecure=first["insecure"], name=name) as client:
        load = Load.model_validate(first["load"])
        http = None if first["base_url"] is None else _http_client(first["base_url"], first["api_key"])
        process = ClientProcess(client, http, await client.tokenizer(), load, first["part"], first["parts"])
        model = client.model
        say("ready", model=model.name, dtype=model.dtype, architecture=model.architecture, weights=model.weights)
        while order := await _hear():
            warm_up, backend = order.get("warm_up"), order["backend"]
            if warm_up is None:
                jobs = await asyncio.to_thread(process.prepare, backend, order["run"])
            else:
                jobs = await asyncio.to_thread(process.prepare_warm_up, backend, warm_up)
            process.begin()
            due = order.get("due", [0.0] * len(jobs))
            say("prepared")
            start = (await _hear()).get("start")
            if start is None:
                return
            cpu = time.process_time()
            outcomes = await process.run(jobs, due, order.get("concurrency"), start)
            seconds = time.monotonic() - start
            say("done", cpu_share=(time.process_time() - cpu) / seconds, outcomes=[vars(one) for one in outcomes])


def main() -> int:
    first = json.loads(sys.stdin.readline())
    try:
        uvloop.run(_serve(first))
    except TandemError as error:
        say("error", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
