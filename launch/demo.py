"""`tandem demo`: starts a system, asks the model several things at once, and shows the answers as they come."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..client import AsyncClient, Completion
from .config import Options
from .connect import Service, service
from .progress import note
from .signals import ending_interrupts
from .terminal import shown

QUESTIONS = (
    "What is 458 + 267?",
    "What is 12 * 11?",
    "Sort these numbers: 42, 7, 99, 15, 63",
    "Reverse the list 1, 2, 3, 4, 5.",
    "Spell elephant.",
    "Spell garden backwards.",
    "What day comes after Friday?",
    "How many days are in September?",
    "Count down from 12 to 1.",
    "Sort these words alphabetically: pear, apple, melon, cherry",
    "Tell me a story about a fox.",
    "Tell me a story about a rabbit.",
)
MAX_TOKENS = 256
FRAMES_PER_SECOND = 15


@dataclass
class Answer:
    """A question, and what has been said to it so far."""

    question: str
    text: str = ""
    tokens: int = 0
    done: Completion | None = None


def demo(worker_options: Options) -> int:
    """Runs the demonstration on a system of its own; returns the exit code."""
    with ending_interrupts() as ending:
        began = time.monotonic()
        try:
            with service(None, worker_options, embed=True) as target:
                ready_s = time.monotonic() - began
                answers, seconds = asyncio.run(_ask_all(target, [Answer(question) for question in QUESTIONS]))
        except KeyboardInterrupt:
            ending.is_last = True
            note("Stopped.")
            return 0
    tokens = sum(answer.tokens for answer in answers)
    print(
        f"{len(answers)} questions at once: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s "
        f"(ready after {ready_s:.1f} s).\n"
        "Next: `tandem chat` to talk to it, `tandem serve` to keep it running, `--model` for another model.",
        flush=True,
    )
    return 0


async def _ask_all(target: Service, answers: Sequence[Answer]) -> tuple[Sequence[Answer], float]:
    """Streams all answers; returns them, and the seconds from the first request to the last token."""
    async with AsyncClient(target.address, name="tandem demo") as client:
        tokenizer = await client.tokenizer()
        is_chat = tokenizer is not None and bool(tokenizer.chat_templates)
        console = Console(file=sys.stdout, highlight=False)
        began = time.monotonic()
        if console.is_terminal:
            # Long stories are cut to the screen while they stream, and stand in full at the end.
            with Live(
                get_renderable=lambda: _table(answers),
                console=console,
                refresh_per_second=FRAMES_PER_SECOND,
                vertical_overflow="ellipsis",
            ) as live:
                await asyncio.gather(*(_ask(client, answer, is_chat, plain=False) for answer in answers))
                seconds = time.monotonic() - began
                live.vertical_overflow = "visible"
        else:
            await asyncio.gather(*(_ask(client, answer, is_chat, plain=True) for answer in answers))
            seconds = time.monotonic() - began
        return answers, seconds


async def _ask(client: AsyncClient, answer: Answer, is_chat: bool, *, plain: bool) -> None:
    prompt = [{"role": "user", "content": answer.question}] if is_chat else answer.question
    stream = client.stream(prompt, temperature=0.0, max_tokens=MAX_TOKENS)
    async with stream:
        async for chunk in stream:
            answer.text += chunk.text
            answer.tokens += len(chunk.token_ids)
        answer.done = await stream.result()
    if plain:
        first = answer.done.timings.client_first_token_s
        print(
            f"> {answer.question}\n{answer.text}\n  [{answer.tokens} tokens, the first after {first:.2f} s]\n",
            flush=True,
        )


def _table(answers: Sequence[Answer]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", max_width=40)
    table.add_column(ratio=1)
    table.add_column(justify="right", style="dim")
    for answer in answers:
        text = Text(shown(answer.text)) if answer.done else Text(shown(answer.text) + "▌", style="bold")
        table.add_row(answer.question, text, str(answer.tokens) if answer.tokens else "")
    return table
