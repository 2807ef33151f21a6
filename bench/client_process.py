"""One process that sends its part of a load and takes every token: `python -m tandem.bench.client_process`.

A Python client streams some tens of thousands of deliveries a second, which can be less than what it measures, so
load.py starts as many of these as it is told. JSON lines come on stdin and go to stdout:

    {"address", "keys", "insecure", "part", "parts", "load"}  →  {"event": "ready", …what is served}
    {"run", "concurrency", "due"}, or {"warm_up"}     →  {"event": "prepared"}
    {"start": monotonic seconds}                      →  {"event": "progress", "ended"} …, {"event": "done", …}

Every part makes its own prompts from the seed; `due` are its requests' times in seconds after the start. All processes
of a machine share the monotonic clock, so their times can be put together.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import uvloop

from ..client import AsyncClient, Tokenizer
from ..protocol.errors import ConfigurationError, TandemError
from ..protocol.sampling import SamplingParams
from .metrics import Outcome
from .workloads import Ids, Load, Wanted, plan, prompt_of

WARM_UP_TOKENS = 16
TEXT_PROMPT_TOKENS = 64
"""Random tokens that stand for a text of a trace while warming up."""
PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is ready to be sent."""

    prompt: str | Ids
    sampling: SamplingParams


class ClientProcess:
    """This process's part of the load, on one connection."""

    def __init__(self, client: AsyncClient, tokenizer: Tokenizer | None, load: Load, part: int, parts: int) -> None:
        """Raises ConfigurationError if the load is text and the model has no tokenizer, or the trace is not good."""
        if load.text and tokenizer is None:
            raise ConfigurationError("--text: the model comes without a tokenizer; send token ids")
        self._client = client
        self._tokenizer = tokenizer
        self._load = load
        self._wanted = plan(load)
        self._mine = range(part, len(self._wanted), parts)

    def prepare(self, run: int) -> list[Job]:
        """The requests of a run, made before it starts so that making them costs it nothing."""
        return [self._job(index, self._wanted[index], run) for index in self._mine]

    def prepare_warm_up(self, count: int) -> list[Job]:
        """A few short requests whose prompts are as long as the load's, and are no prompts of any run."""
        found = []
        for index in self._mine[:count]:
            wanted = self._wanted[index]
            given = wanted.prompt
            length = TEXT_PROMPT_TOKENS if isinstance(given, str) else given if isinstance(given, int) else len(given)
            tokens = min(WARM_UP_TOKENS, wanted.output_tokens)
            found.append(self._job(index, Wanted(length, tokens, wanted.group), run=0))
        return found

    def _job(self, index: int, wanted: Wanted, run: int) -> Job:
        prompt = prompt_of(self._load, index, wanted, self._client.model.vocab_size, run)
        if self._load.text and self._tokenizer is not None and not isinstance(prompt, str):
            prompt = self._tokenizer.decode(prompt.tolist())
        sampling = SamplingParams(
            temperature=self._load.temperature,
            ignore_eos=self._load.ignore_eos,
            max_tokens=wanted.output_tokens,
            seed=self._load.seed + index,
        )
        return Job(prompt, sampling)

    async def run(
        self, jobs: Sequence[Job], due: Sequence[float], concurrency: int | None, start: float
    ) -> list[Outcome]:
        """Sends each job when it is due, with at most `concurrency` in flight; returns what became of them."""
        gate = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
        outcomes = [Outcome() for _ in due]
        ended = 0

        async def one(job: Job, outcome: Outcome, when: float) -> None:
            nonlocal ended
            # uvloop rounds to milliseconds, and so may wake up too early.
            while (left := start + when - time.monotonic()) > 0:  # noqa: ASYNC110  (time is all that is waited for)
                await asyncio.sleep(left)
            outcome.late = time.monotonic() - start - when
            async with gate:
                await self._stream(job, outcome, start)
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

    async def _stream(self, job: Job, outcome: Outcome, start: float) -> None:
        clock = time.monotonic
        outcome.sent = clock() - start
        try:
            stream = self._client.stream(job.prompt, job.sampling)
            async for chunk in stream:
                if chunk.token_ids:
                    outcome.times.append(clock() - start)
                    outcome.counts.append(len(chunk.token_ids))
            usage = (await stream.result()).usage
            if not outcome.times:
                outcome.failure, outcome.message = "NoTokens", "the request ended without a token"
            outcome.prompt_tokens, outcome.cached_tokens = usage.prompt_tokens, usage.cached_tokens
        except TandemError as error:
            outcome.failure, outcome.message = type(error).__name__, str(error)
        outcome.ended = clock() - start


def say(event: str, **details: Any) -> None:
    """One line to whoever started this process."""
    sys.stdout.write(json.dumps({"event": event, **details}) + "\n")
    sys.stdout.flush()


async def _hear() -> dict[str, Any]:
    """The next line from there; empty at the end."""
    line = await asyncio.to_thread(sys.stdin.readline)
    found: dict[str, Any] = json.loads(line) if line else {}
    return found


async def _serve(first: dict[str, Any]) -> None:
    name = f"tandem bench {first['part']}"
    async with AsyncClient(first["address"], keys=first["keys"], insecure=first["insecure"], name=name) as client:
        load = Load.model_validate(first["load"])
        process = ClientProcess(client, await client.tokenizer(), load, first["part"], first["parts"])
        model = client.model
        say("ready", model=model.name, dtype=model.dtype, architecture=model.architecture, weights=model.weights)
        while order := await _hear():
            warm_up = order.get("warm_up")
            if warm_up is None:
                jobs = await asyncio.to_thread(process.prepare, order["run"])
            else:
                jobs = await asyncio.to_thread(process.prepare_warm_up, warm_up)
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
