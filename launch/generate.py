"""`tandem generate`: answers prompts; one is streamed, several are answered at once and printed in their order."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..client import AsyncClient, Completion
from ..protocol.errors import ConfigurationError, RequestError, RequestTimeout
from .config import Options
from .connect import Service, service
from .progress import PromptCount, note, prompt_bar
from .sampling import require_possible
from .signals import ending_interrupts
from .terminal import write_answer

INTERRUPTED = 130
MAX_CONCURRENCY = 256
"""How many prompts are in flight at once."""


def generate(
    prompts: Sequence[str],
    *,
    connect: str | None,
    worker_options: Options,
    sampling: Mapping[str, Any],
    system: str | None,
    raw: bool,
    as_json: bool,
) -> int:
    """Prints the answers; returns the exit code: 0, 1 if a request failed, 130 if it was interrupted.

    Without `raw` a prompt is the user's message of a chat, if the model has a chat template.
    """
    if not prompts:
        raise ConfigurationError("no prompt was given: name one, or a file of them with --file")
    if raw and system is not None:
        raise ConfigurationError(
            "--system is part of a chat, and --raw is for prompts without one; give one of the two"
        )
    require_possible(sampling)
    with ending_interrupts() as ending:
        try:
            with service(connect, worker_options) as target:
                return asyncio.run(_Run(target, prompts, sampling, system, raw, as_json).run())
        except KeyboardInterrupt:
            ending.is_last = True
            note("Interrupted.")
            return INTERRUPTED


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line, empty lines skipped; "-" is stdin. Raises ConfigurationError."""
    try:
        if str(path) != "-":
            data = path.read_bytes()
        else:
            data = sys.stdin.buffer.read()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"cannot read the prompts in {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the prompts in {path} are not UTF-8 text") from error
    # Not splitlines(): what it also takes for a line's end, such as U+2028, may be part of a prompt.
    return [line for line in re.split(r"\r\n?|\n", text) if line.strip()]


class _Run:
    """One batch of prompts against one service."""

    def __init__(
        self,
        target: Service,
        prompts: Sequence[str],
        sampling: Mapping[str, Any],
        system: str | None,
        raw: bool,
        as_json: bool,
    ) -> None:
        self._target = target
        self._prompts = prompts
        self._sampling = sampling
        self._system = system
        self._raw = raw
        self._as_json = as_json
        self._answers: dict[int, Completion | RequestError] = {}
        self._printed = 0

    async def run(self) -> int:
        target = self._target
        async with AsyncClient(
            target.address, keys=target.keys, insecure=target.insecure, name="tandem generate"
        ) as client:
            tokenizer = await client.tokenizer()
            if not self._raw and (tokenizer is None or not tokenizer.chat_templates):
                if self._system is not None:
                    raise ConfigurationError("--system: the model has no chat template, so there is no system message")
                self._raw = True
            if len(self._prompts) == 1 and not self._as_json and self._sampling.get("n", 1) == 1:
                await self._stream(client)
                return 0
            with prompt_bar(len(self._prompts)) as bar:
                todo = iter(range(len(self._prompts)))
                workers = [
                    asyncio.create_task(self._work(client, todo, bar))
                    for _ in range(min(len(self._prompts), MAX_CONCURRENCY))
                ]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
        return 1 if any(isinstance(answer, RequestError) for answer in self._answers.values()) else 0

    async def _stream(self, client: AsyncClient) -> None:
        async with client.stream(self._prompt(0), **self._sampling) as stream:
            try:
                async for chunk in stream:
                    write_answer(chunk.text)
            finally:
                print(flush=True)
            completion = await stream.result()
        if sys.stderr.isatty():
            tokens, seconds = completion.usage.completion_tokens, completion.timings.client_total_s
            note(f"[{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s]")

    async def _work(self, client: AsyncClient, todo: Any, bar: PromptCount) -> None:
        for index in todo:  # shared by all workers
            try:
                # A list waits while the service is overloaded, a single prompt would be refused.
                (self._answers[index],) = await client.generate([self._prompt(index)], **self._sampling)
            except RequestError as error:
                self._answers[index] = error
            bar.one_done()
            while self._printed in self._answers:
                self._print(self._printed, self._answers[self._printed])
                self._printed += 1

    def _prompt(self, index: int) -> Any:
        text = self._prompts[index]
        if self._raw:
            return text
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, {"role": "user", "content": text}]

    def _print(self, index: int, answer: Completion | RequestError) -> None:
        prompt = self._prompts[index]
        if self._as_json:
            print(as_line({"prompt": prompt, **_as_dict(answer)}), flush=True)
            return
        write_answer(f"> {prompt}\n")
        if isinstance(answer, RequestTimeout) and answer.completion is not None:
            write_answer(_as_text(answer.completion))
        write_answer(f"failed: {answer}\n\n" if isinstance(answer, RequestError) else f"{_as_text(answer)}\n")


def _as_text(answer: Completion) -> str:
    """The answer's lines, numbered if there are several answers."""
    if len(answer.choices) == 1:
        return f"{answer.text}\n"
    return "".join(f"[{choice.index + 1}] {choice.text}\n" for choice in answer.choices)


def as_line(content: Mapping[str, Any]) -> str:
    """JSON that stdout can take: as it is, or with escapes if the encoding or a lone surrogate forbids that."""
    line = json.dumps(content, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(content)
    return line


def _as_dict(answer: Completion | RequestError) -> dict[str, Any]:
    if isinstance(answer, RequestTimeout) and answer.completion is not None:
        return {"error": str(answer), **_as_dict(answer.completion)}
    if isinstance(answer, RequestError):
        return {"error": str(answer)}
    several = len(answer.choices) > 1
    choices = [{"text": choice.text, "finish_reason": choice.finish_reason} for choice in answer.choices]
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        **({"choices": choices} if several else {}),
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "seed": answer.seed,
    }
