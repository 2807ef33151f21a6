"""`python -m tandem.bench.overload`: what a service does with several times the load that it can carry.

A system of its own with small limits first shows its capacity: as many requests at a time as it runs and lets wait
between them. Then requests come at `--factor` times that rate, whatever becomes of them. Told are how many were
accepted, whether each of these was completed, how fast the others were refused, and the memory of every process. The
exit code is 1 if an accepted request was not completed or a refusal was none that a client can act on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..client.aio import AsyncClient
from ..launch.embedded import EmbeddedSystem
from ..protocol.errors import Overloaded, TandemError
from ..protocol.messages import Stats
from .findings import told, write_findings
from .memory import Memory
from .workloads import arrivals

SETTLE_S = 120.0
"""How long what was accepted may take to end after the last request was sent."""


@dataclass
class Outcomes:
    """What became of the requests."""

    completed: int = 0
    refused_s: list[float] = field(default_factory=list)
    """For each refusal, from the call to the answer."""
    retry_after_s: list[float] = field(default_factory=list)
    completed_s: list[float] = field(default_factory=list)
    """For each completed request, from the call to its last token."""
    failures: Counter[str] = field(default_factory=Counter)
    """What else happened, which nothing should."""


class Load:
    """Requests of one size, none of which begins like another."""

    def __init__(self, client: AsyncClient, prompt_tokens: int, output_tokens: int) -> None:
        self._client = client
        self._rng = np.random.default_rng(0)
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens

    async def ask(self, outcomes: Outcomes) -> None:
        prompt = self._rng.integers(5, self._client.model.vocab_size, self._prompt_tokens).tolist()
        began = time.monotonic()
        try:
            done = await self._client.generate(prompt, temperature=0.0, max_tokens=self._output_tokens, ignore_eos=True)
        except Overloaded as error:
            outcomes.refused_s.append(time.monotonic() - began)
            outcomes.retry_after_s.append(error.retry_after)
        except TandemError as error:
            outcomes.failures[f"{type(error).__name__}: {error}"] += 1
        else:
            outcomes.completed_s.append(time.monotonic() - began)
            if len(done.token_ids) == self._output_tokens:
                outcomes.completed += 1
            else:
                outcomes.failures[f"ended with {len(done.token_ids)} tokens: {done.finish_reason}"] += 1

    async def capacity(self, at_once: int, seconds: float) -> float:
        """Requests a second that are completed when always so many are open."""
        outcomes = Outcomes()
        began = time.monotonic()

        async def again() -> None:
            while time.monotonic() - began < seconds:
                await self.ask(outcomes)

        await asyncio.gather(*(again() for _ in range(at_once)))
        if outcomes.failures or not outcomes.completed:
            raise RuntimeError(f"the service does not carry its own limits: {dict(outcomes.failures)}")
        return outcomes.completed / (time.monotonic() - began)

    async def arrive(self, rate: float, seconds: float) -> Outcomes:
        """Requests of a Poisson process, whatever becomes of them; returns when the last accepted one has ended."""
        outcomes = Outcomes()
        began = time.monotonic()
        async with asyncio.timeout(seconds + SETTLE_S), asyncio.TaskGroup() as group:
            for due in arrivals(max(1, round(rate * seconds)), rate, 1.0, seed=0):
                await asyncio.sleep(began + due - time.monotonic())
                group.create_task(self.ask(outcomes))
        return outcomes


async def measure(address: str, options: argparse.Namespace) -> dict[str, Any]:
    async with AsyncClient(address) as client:
        load = Load(client, options.prompt_tokens, options.output_tokens)
        await load.ask(Outcomes())
        capacity = await load.capacity(options.max_num_seqs + options.max_waiting_requests, options.capacity_seconds)
        rate = options.factor * capacity
        print(f"capacity {capacity:.1f} requests/s; now {rate:.1f}/s for {options.seconds:g} s", file=sys.stderr)
        before = await client.stats(timeout=60)
        load_average = os.getloadavg()[0]
        memory = Memory()
        watching = asyncio.create_task(memory.watch())
        try:
            outcomes = await load.arrive(rate, options.seconds)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        after = await client.stats(timeout=60)
    return {
        "capacity_per_s": round(capacity, 2),
        "rate_per_s": round(rate, 2),
        "load_average": [round(load_average, 1), round(os.getloadavg()[0], 1)],
        **_counts(outcomes, before, after),
        "refusal_ms": _percentiles(outcomes.refused_s),
        "completion_ms": _percentiles(outcomes.completed_s),
        "retry_after_s": _ends(outcomes.retry_after_s),
        "memory": memory.report(),
    }


def _counts(outcomes: Outcomes, before: Stats, after: Stats) -> dict[str, Any]:
    """Of the client, and the scheduler's own beside them."""
    refused = len(outcomes.refused_s)
    return {
        "accepted": outcomes.completed + outcomes.failures.total(),
        "completed": outcomes.completed,
        "refused": refused,
        "failures": dict(outcomes.failures),
        "scheduler": {
            "refused": after.refused - before.refused,
            "finished": sum(after.finished.values()) - sum(before.finished.values()),
            "running": after.running,
            "waiting": after.waiting,
        },
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    p50, p99, most = np.percentile(np.array(seconds) * 1_000, [50, 99, 100]).tolist()
    return {"p50": round(p50, 1), "p99": round(p99, 1), "max": round(most, 1)}


def _ends(values: Sequence[float]) -> dict[str, float] | None:
    return {"min": round(min(values), 3), "max": round(max(values), 3)} if values else None


def faults(found: dict[str, Any]) -> list[str]:
    """What should not have been, whatever the machine: times are not judged."""
    wrong = [f"{count} × {what}" for what, count in found["failures"].items()]
    scheduler = found["scheduler"]
    if scheduler["refused"] != found["refused"] or scheduler["finished"] != found["accepted"]:
        wrong.append("scheduler and client do not count the same")
    if scheduler["running"] or scheduler["waiting"]:
        wrong.append("requests are still open")
    if found["retry_after_s"] is not None and found["retry_after_s"]["min"] <= 0:
        wrong.append("a refusal did not tell when to come again")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=4.0, help="of the measured capacity")
    parser.add_argument("--capacity-seconds", type=float, default=10.0, help="how long the capacity is measured")
    parser.add_argument("--model", default=None, help="Hub id or folder (default: the built-in model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-waiting-requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--out", default=None, help="JSON file to write")
    options = parser.parse_args(argv)
    worker: dict[str, Any] = {"device": options.device, "max_num_seqs": options.max_num_seqs}
    if options.model is not None:
        worker["model"] = options.model
    scheduler = {"max_waiting_requests": options.max_waiting_requests}
    with EmbeddedSystem(worker, scheduler, data_parallel_size=options.workers) as system:
        found = asyncio.run(measure(system.address, options))
    print(json.dumps(found, indent=2))
    write_findings(options, found)
    return told(faults(found))


if __name__ == "__main__":
    sys.exit(main())
