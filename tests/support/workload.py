"""Greedy requests of mixed lengths, what transformers answers to them, and sending them at staggered times."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from tandem import AsyncClient

from support.tiny_models import EOS, VOCAB


@dataclass(frozen=True)
class Wanted:
    """One request, in terms that both sides understand."""

    prompt: tuple[int, ...]
    max_tokens: int
    stops: tuple[int, ...] = ()

    def sampling(self) -> dict[str, Any]:
        return {"temperature": 0.0, "max_tokens": self.max_tokens, "stop_token_ids": self.stops}


def mixed_requests(count: int, seed: int, longest: int, most: int) -> list[Wanted]:
    """Prompts of 1 to `longest` tokens, 1 to `most` new ones; some stop at tokens of their own."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        length = 1 if index == 0 else longest if index == 1 else rng.randint(1, longest)
        stops = tuple(rng.sample(range(4, VOCAB), 12)) if index % 4 == 3 else ()
        prompt = tuple(rng.randrange(4, VOCAB) for _ in range(length))
        made.append(Wanted(prompt, 1 if index == 2 else rng.randint(1, most), stops))
    return made


@torch.no_grad()
def reference(model: PreTrainedModel, wanted: Wanted) -> list[int]:
    """transformers' `generate`, alone."""
    prompt = torch.tensor([wanted.prompt])
    generate: Any = model.generate
    out = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=wanted.max_tokens,
        do_sample=False,
        eos_token_id=[EOS, *wanted.stops],
        pad_token_id=2,
    )
    return [int(token) for token in out[0, len(wanted.prompt) :]]


class Sendable(Protocol):
    """A prompt, and how its answer is to be chosen."""

    @property
    def prompt(self) -> tuple[int, ...]: ...

    def sampling(self) -> dict[str, Any]: ...


async def send_staggered(client: AsyncClient, requests: Sequence[Sendable], gap: int = 6) -> list[list[int]]:
    """Sends request i once `gap` · i tokens have arrived in all (or everything sent so far is over), so that requests
    join batches that already run."""
    arrived, open_requests = 0, 0
    changed = asyncio.Condition()

    async def one(index: int, wanted: Sendable) -> list[int]:
        nonlocal arrived, open_requests
        async with changed:
            await changed.wait_for(lambda: arrived >= gap * index or not open_requests)
            open_requests += 1
        tokens: list[int] = []
        async for chunk in client.stream(list(wanted.prompt), **wanted.sampling()):
            tokens += chunk.token_ids
            async with changed:
                arrived += len(chunk.token_ids)
                changed.notify_all()
        async with changed:
            open_requests -= 1
            changed.notify_all()
        return tokens

    return await asyncio.gather(*(one(index, wanted) for index, wanted in enumerate(requests)))
