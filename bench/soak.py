"""`python -m tandem.bench.soak`: a service under ragged load for minutes, each token checked, memory watched.

Requests of all lengths come and go, some are cancelled on the way. Their prompts are among a few whose greedy
continuations transformers' `generate` has told beforehand, on the CPU in float32, and each answer must begin as its
prompt's does. The exit code is 1 for a wrong token, a failed request, or a process whose memory still grows in the
second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..client.aio import AsyncClient
from ..launch.builtin import MODEL_DIR
from ..launch.embedded import EmbeddedSystem
from ..protocol.errors import TandemError
from .findings import told, write_findings
from .memory import Memory

CANCELLED_SHARE = 0.1
"""Of requests that are cancelled somewhere before their end."""
GROWTH_MIB, GROWTH_SHARE = 16.0, 0.02
"""A process may have so much more at the end than halfway: the larger of the two."""


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt and what transformers makes of it, greedily."""

    prompt: list[int]
    continuation: list[int]


@dataclass
class Tally:
    finished: int = 0
    cancelled: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


def known(model: str, count: int, longest_prompt: int, most: int, seed: int) -> list[Known]:
    """Random prompts of 1 to `longest_prompt` tokens, with `most` tokens of transformers' own on the CPU in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    own: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    own.generation_config.eos_token_id = None
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [rng.randrange(5, own.config.vocab_size) for _ in range(rng.randint(1, longest_prompt))]
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = own.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0
            )
        made.append(Known(prompt, out[0, len(prompt) :].tolist()))
    return made


async def ask(client: AsyncClient, one: Known, rng: random.Random, tally: Tally) -> None:
    """One request of a random length, which may be cancelled at a random token."""
    wanted = rng.randint(1, len(one.continuation))
    leave = rng.randint(0, wanted - 1) if rng.random() < CANCELLED_SHARE else None
    got: list[int] = []
    try:
        async with client.stream(one.prompt, temperature=0.0, max_tokens=wanted, ignore_eos=True) as stream:
            async for chunk in stream:
                got += chunk.token_ids
                if leave is not None and len(got) > leave:
                    break
    except TandemError as error:
        tally.wrong.append(f"{type(error).__name__}: {error}")
        return
    tally.tokens += len(got)
    if got != one.continuation[: len(got)]:
        at = next(i for i, (ours, theirs) in enumerate(zip(got, one.continuation, strict=False)) if ours != theirs)
        tally.wrong.append(f"a prompt of {len(one.prompt)} tokens: token {at} is {got[at]}, not {one.continuation[at]}")
    elif leave is None and len(got) != wanted:
        tally.wrong.append(f"{len(got)} tokens instead of {wanted}")
    elif leave is None:
        tally.finished += 1
    else:
        tally.cancelled += 1


async def soak(address: str, prompts: Sequence[Known], options: argparse.Namespace) -> dict[str, Any]:
    tally = Tally()
    async with AsyncClient(address, max_concurrency=options.at_once) as client:
        ends = time.monotonic() + options.seconds

        async def again(number: int) -> None:
            rng = random.Random(options.seed * 100_003 + number)
            while True:  # each at least once, however slow the machine
                await ask(client, rng.choice(prompts), rng, tally)
                if time.monotonic() > ends:
                    return

        memory = Memory(gpu=options.device != "cpu")
        watching = asyncio.create_task(memory.watch())
        try:
            await asyncio.gather(*(again(number) for number in range(options.at_once)))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        stats = await client.stats(timeout=60)
    return {
        "finished": tally.finished,
        "cancelled": tally.cancelled,
        "tokens": tally.tokens,
        "preemptions": stats.preemptions,
        "wrong": tally.wrong[:20],
        "wrong_count": len(tally.wrong),
        "memory": memory.report(),
    }


def growing(memory: dict[str, dict[str, float]]) -> list[str]:
    """The processes that had more at the end than halfway, beyond what is allowed."""
    found = []
    for name, of_process in memory.items():
        half, last = of_process["half_mib"], of_process["last_mib"]
        if last - half > max(GROWTH_MIB, GROWTH_SHARE * half):
            found.append(f"{name} grew from {half} MiB halfway to {last} MiB")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--model", default=str(MODEL_DIR), help="Folder (default: the built-in model)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--num-gpu-blocks-override", type=int, default=None, help="A small KV cache preempts")
    parser.add_argument("--prompts", type=int, default=48, help="different ones")
    parser.add_argument("--longest-prompt", type=int, default=300)
    parser.add_argument("--most-tokens", type=int, default=192, help="of an answer")
    parser.add_argument("--at-once", type=int, default=80, help="requests open at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="JSON file to write")
    options = parser.parse_args(argv)
    prompts = known(options.model, options.prompts, options.longest_prompt, options.most_tokens, options.seed)
    worker: dict[str, Any] = {"model": options.model, "device": options.device, "dtype": "float32"}
    worker |= {"max_num_seqs": options.max_num_seqs, "max_model_len": options.longest_prompt + options.most_tokens}
    if options.num_gpu_blocks_override is not None:
        worker["num_gpu_blocks_override"] = options.num_gpu_blocks_override
    with EmbeddedSystem(worker, data_parallel_size=options.workers) as system:
        found = asyncio.run(soak(system.address, prompts, options))
    print(json.dumps(found, indent=2))
    write_findings(options, found)
    return told([*found["wrong"], *growing(found["memory"])])


if __name__ == "__main__":
    sys.exit(main())
