"""`python -m tandem.bench.kill`: the only worker is killed under a load of long streams, and all must go to their end.

A system of its own with one worker serves the load once or more undisturbed. Then the same requests run again, and as
soon as each has `--kill-after-tokens` tokens the worker gets SIGKILL. The launcher starts it again, and the streams go
on. Each must get exactly `--output-tokens` tokens, each offset once, and the tokens that had come before must stand in
its final answer; the exit code is 1 if not. Told are each stream's time to its next token and how many tokens were
computed again. With greedy sampling it is told too how many continuations differ from the undisturbed ones, which in
16 bits they may: the tokens are then recomputed in batches of other shapes. `--undisturbed 2` shows how many differ
when nothing happens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..client.aio import AsyncClient
from ..launch.embedded import EmbeddedSystem
from ..protocol.messages import Stats
from .findings import told, write_findings
from .recovery import IN_FLIGHT_S, draw_streams, kill, pause_s

FIRST_ID = 5
"""Ids below may be special tokens."""
LOOK_S = 0.05
"""How often is looked whether the worker is back."""
SETTLE_S = 120.0
"""How long it may take after the last token until nothing runs and all blocks are free."""


@dataclass
class Run:
    """What each stream got."""

    tokens: list[list[int]]
    times: list[list[float]]
    """When each token came (time.monotonic)."""
    wrong: list[str] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a stream gets tokens."""
    killed_at: float | None = None
    had: list[int] = field(default_factory=list)
    """How many tokens each stream had received at the kill."""
    back_at: float | None = None
    """When the restarted worker was seen to serve."""

    @property
    def seconds(self) -> float:
        """From the first token of any stream to the last."""
        return max(times[-1] for times in self.times) - min(times[0] for times in self.times)

    def open(self) -> list[int]:
        """The streams that had not ended at the kill."""
        assert self.killed_at is not None
        return [i for i, times in enumerate(self.times) if times[-1] > self.killed_at + IN_FLIGHT_S]

    def pauses_s(self) -> list[float]:
        """Of each of these, the time from the kill to its next token."""
        assert self.killed_at is not None
        return [pause_s(self.times[i], self.killed_at) for i in self.open()]


class Load:
    """The same requests each time: random prompts of one length, outputs of one length."""

    def __init__(self, client: AsyncClient, options: argparse.Namespace) -> None:
        rng = np.random.default_rng(options.seed)
        shape = (options.num_prompts, options.prompt_tokens)
        self._prompts = rng.integers(FIRST_ID, client.model.vocab_size, shape).tolist()
        self._client = client
        self._output_tokens = options.output_tokens
        self._sampling = {"temperature": options.temperature, "max_tokens": options.output_tokens, "ignore_eos": True}

    async def run(self, disturb: Callable[[Run], Any] | None = None) -> Run:
        """All at once, to their ends. `disturb` is started beside them."""
        run = Run([[] for _ in self._prompts], [[] for _ in self._prompts])
        async with asyncio.TaskGroup() as group:
            for index in range(len(self._prompts)):
                group.create_task(self._stream(run, index))
            if disturb is not None:
                group.create_task(disturb(run))
        return run

    async def _stream(self, run: Run, index: int) -> None:
        tokens, times = run.tokens[index], run.times[index]
        stream = self._client.stream(self._prompts[index], seed=1_000 + index, **self._sampling)
        async for chunk in stream:
            if chunk.offset != len(tokens):
                run.wrong.append(f"stream {index}: tokens of offset {chunk.offset} came after {len(tokens)} tokens")
            tokens += chunk.token_ids
            times += [time.monotonic()] * len(chunk.token_ids)
            run.grown.set()
        answer = await stream.result()
        if answer.token_ids != tokens:
            run.wrong.append(f"stream {index}: its answer holds other tokens than came")
        if len(tokens) != self._output_tokens or answer.finish_reason != "length":
            run.wrong.append(f"stream {index}: {len(tokens)} tokens, ended by {answer.finish_reason}")


class Killing:
    """Kills the only worker once all streams have so many tokens, and waits until it is back."""

    def __init__(self, client: AsyncClient, options: argparse.Namespace) -> None:
        self._client = client
        self._after_tokens = options.kill_after_tokens
        self._start_timeout = options.start_timeout

    async def disturb(self, run: Run) -> None:
        while min(map(len, run.tokens)) < self._after_tokens:
            await run.grown.wait()
            run.grown.clear()
        before = await self._client.stats(timeout=60)
        (worker,) = before.workers
        run.killed_at = kill(worker.name)
        run.had = [len(tokens) for tokens in run.tokens]
        print(f"SIGKILL {worker.name}: its streams had {min(run.had)} to {max(run.had)} tokens", file=sys.stderr)
        async with asyncio.timeout(self._start_timeout):
            while True:
                found = await self._client.stats(timeout=60)
                if any(one.registration != worker.registration for one in found.workers):
                    break
                await asyncio.sleep(LOOK_S)
        run.back_at = time.monotonic()
        print(f"the worker is back after {run.back_at - run.killed_at:.1f} s", file=sys.stderr)


async def settled(client: AsyncClient) -> Stats:
    """Waits until nothing runs or waits and every block is free."""
    async with asyncio.timeout(SETTLE_S):
        while True:
            found = await client.stats(timeout=60)
            free = all(worker.free_blocks == worker.num_blocks for worker in found.workers)
            if free and not found.running + found.waiting:
                return found
            await asyncio.sleep(LOOK_S)


async def measure(address: str, options: argparse.Namespace) -> tuple[list[Run], Run, Stats]:
    async with AsyncClient(address, connect_timeout=options.start_timeout, reconnect_timeout=60) as client:
        load = Load(client, options)
        undisturbed = []
        for _ in range(options.undisturbed):
            undisturbed.append(await load.run())
            print(f"undisturbed: {undisturbed[-1].seconds:.1f} s", file=sys.stderr)
        killed = await load.run(Killing(client, options).disturb)
        return undisturbed, killed, await settled(client)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two outputs begin to differ; None if they do not."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def compared(run: Run, reference: Run) -> dict[str, Any]:
    """How many streams of `run` differ from those of `reference`, and where they begin to."""
    found = [first_difference(one, other) for one, other in zip(run.tokens, reference.tokens, strict=True)]
    differing = sorted(at for at in found if at is not None)
    after = [at for at, had in zip(found, run.had, strict=False) if at is not None and at >= had]
    return {
        "streams": len(found),
        "differ": len(differing),
        "differ_first_after_the_kill": len(after) if run.had else None,
        "first_difference_at": differing[0] if differing else None,
        "median_difference_at": statistics.median(differing) if differing else None,
    }


def summary(undisturbed: Sequence[Run], killed: Run, prompt_tokens: int) -> dict[str, Any]:
    assert killed.killed_at is not None
    assert killed.back_at is not None
    pauses = killed.pauses_s()
    if not pauses:
        raise RuntimeError("all streams had ended when the worker was killed: give a smaller --kill-after-tokens")
    back_s = killed.back_at - killed.killed_at
    return {
        "streams": len(killed.tokens),
        "tokens": sum(map(len, killed.tokens)),
        "tokens_before_the_kill": sum(killed.had),
        "streams_open_at_the_kill": len(pauses),
        "worker_back_s": round(back_s, 2),
        "computed_again_tokens": sum(prompt_tokens + killed.had[i] for i in killed.open()),
        "next_token_s": {
            "median": round(statistics.median(pauses), 2),
            "first": round(min(pauses), 2),
            "last": round(max(pauses), 2),
        },
        "run_s": round(killed.seconds, 1),
        "undisturbed_s": [round(run.seconds, 1) for run in undisturbed],
        "killed_against_undisturbed": compared(killed, undisturbed[0]) if undisturbed else None,
        "undisturbed_against_undisturbed": [compared(run, undisturbed[0]) for run in undisturbed[1:]],
    }


def plot(path: str, run: Run) -> None:
    """Each stream's tokens as dots on a line of its own, around the kill."""
    assert run.killed_at is not None
    figure = import_module("matplotlib.figure").Figure(figsize=(10, 5), layout="constrained")
    shown = (-2.0, max(run.pauses_s()) + 5.0)
    draw_streams(figure.subplots(), run.times, run.killed_at, shown, "SIGKILL of the only worker at 0")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.kill", description=__doc__)
    parser.add_argument("--model", default=None, help="Hub id or folder (default: the built-in model)")
    parser.add_argument("--load-format", default="auto", choices=("auto", "safetensors", "dummy"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--batch-invariant", action="store_true", help="then no continuation may differ")
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument(
        "--num-gpu-blocks-override", type=int, default=None, help="KV cache blocks; default: what memory there is"
    )
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=8192)
    parser.add_argument("--kill-after-tokens", type=int, default=1000, help="that every stream has")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--undisturbed", type=int, default=1, help="runs before, to compare with; 0 for none")
    parser.add_argument("--start-timeout", type=float, default=600.0, help="seconds until the first worker serves")
    parser.add_argument("--out", default=None, help="JSON file to write")
    parser.add_argument("--plot", default=None, help="picture to write (matplotlib)")
    options = parser.parse_args(argv)
    for name in ("num_prompts", "prompt_tokens", "kill_after_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1, not {getattr(options, name)}")
    if options.kill_after_tokens >= options.output_tokens:
        parser.error(f"--kill-after-tokens {options.kill_after_tokens}: must be less than --output-tokens")
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'tandem-serve[bench]'")
    worker: dict[str, Any] = {
        "load_format": options.load_format,
        "dtype": options.dtype,
        "device": options.device,
        "batch_invariant": options.batch_invariant,
        "max_model_len": options.prompt_tokens + options.output_tokens,
        "max_num_seqs": options.num_prompts,
        "max_num_batched_tokens": max(options.max_num_batched_tokens, options.num_prompts),
    }
    if options.model is not None:
        worker["model"] = options.model
    if options.num_gpu_blocks_override is not None:
        worker["num_gpu_blocks_override"] = options.num_gpu_blocks_override
    # Else the second run would find the prompts of the first one cached, and compute them in other shapes.
    scheduler = {"enable_prefix_caching": False}
    with EmbeddedSystem(worker, scheduler) as system:
        undisturbed, killed, stats = asyncio.run(measure(system.address, options))
    found = summary(undisturbed, killed, options.prompt_tokens)
    wrong = [one for run in (*undisturbed, killed) for one in run.wrong]
    if options.batch_invariant and undisturbed and found["killed_against_undisturbed"]["differ"]:
        wrong.append("continuations differ although the worker is batch-invariant")
    if stats.lost_workers != 1:
        wrong.append(f"{stats.lost_workers} workers were lost, not one")
    print(json.dumps(found, indent=2))
    pauses = [round(pause, 3) for pause in killed.pauses_s()]
    write_findings(options, {**found, "wrong": wrong, "pauses_s": pauses})
    if options.plot is not None:
        plot(options.plot, killed)
    return told(wrong)


if __name__ == "__main__":
    sys.exit(main())
