"""`python -m tandem.bench.recovery`: how long streams stand still when a worker or the scheduler is killed.

A system of its own, with two workers unless told otherwise, serves some streams that each get a token a step. Then one
process gets SIGKILL, again and again once all is well; each stream's pause is the time from the signal to its next
token. With `--plot`, the streams' token times around the last kill of each kind become a picture.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ..client.aio import AsyncClient
from ..launch.embedded import EmbeddedSystem
from ..launch.status import Ready, Status
from ..protocol.messages import Stats
from .findings import write_findings
from .processes import command_line, descendants

CALM_S = 1.0
"""All streams get tokens for so long before a kill."""
SHOWN_S = (-1.0, 5.0)
"""What the picture shows, from the kill on."""
IN_FLIGHT_S = 0.1
"""What a process said before it was killed may come so long after."""


@dataclass
class Times:
    """When a stream's tokens came (time.monotonic)."""

    tokens: list[float] = field(default_factory=list)


@dataclass
class Kill:
    """What one kill did."""

    what: str
    at: float
    pauses_s: list[float]
    """Of each stream that the process served: from the signal to its next token."""
    stages_s: dict[str, float]
    """What was told meanwhile, and how long after the signal."""


class Heard:
    """What the processes said of themselves, and when; warnings go to stderr."""

    def __init__(self) -> None:
        self._told: list[tuple[float, str]] = []

    def status(self, name: str, status: Status) -> None:
        if isinstance(status, Ready):
            self._told.append((time.monotonic(), f"{name} listens"))

    def output(self, name: str, line: str) -> None:
        if name == "scheduler" and " joined: " in line:
            self._told.append((time.monotonic(), "all workers joined"))
        elif name == "scheduler" and "the process of worker" in line:
            self._told.append((time.monotonic(), "death noticed"))
        if " INFO " not in line:
            print(f"[{name}] {line}", file=sys.stderr)

    def since(self, moment: float, what: str) -> dict[str, float]:
        """Of one kill of a `what`: when each thing was told last, in seconds from `moment` on."""
        wanted = ("scheduler listens", "all workers joined") if what == "scheduler" else ("death noticed",)
        return {said: at - moment for at, said in self._told if at > moment and said in wanted}


class Streams:
    """Streams that never end for as long as this runs."""

    def __init__(self, client: AsyncClient, count: int, prompt_tokens: int, max_tokens: int) -> None:
        self.times = [Times() for _ in range(count)]
        self._client = client
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._tasks = [asyncio.create_task(self._run(i)) for i in range(count)]

    async def _run(self, index: int) -> None:
        turn = 0
        while True:
            turn += 1
            prompt = [5 + (7 * index + 13 * turn + 3 * position) % 100 for position in range(self._prompt_tokens)]
            request = self._client.stream(prompt, temperature=1.0, max_tokens=self._max_tokens, ignore_eos=True)
            async for chunk in request:
                self.times[index].tokens += [time.monotonic()] * len(chunk.token_ids)

    def failed(self) -> BaseException | None:
        """What ended a stream, if something did."""
        return next((task.exception() for task in self._tasks if task.done() and not task.cancelled()), None)

    async def calm(self) -> None:
        """Waits until every stream gets tokens and has done so for CALM_S."""
        since = [time.monotonic()] * len(self.times)
        while True:
            error = self.failed()
            if error is not None:
                raise error
            now = time.monotonic()
            for i, times in enumerate(self.times):
                if not times.tokens or now - times.tokens[-1] > CALM_S / 2:
                    since[i] = now
            if all(now - start > CALM_S for start in since):
                return
            await asyncio.sleep(0.05)

    async def after(self, moment: float) -> list[float]:
        """For each stream, how long after `moment` its next token came that was not on its way already."""
        while any(not times.tokens or times.tokens[-1] <= moment + IN_FLIGHT_S for times in self.times):
            error = self.failed()
            if error is not None:
                raise error
            await asyncio.sleep(0.01)
        return [pause_s(times.tokens, moment) for times in self.times]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def measure(address: str, heard: Heard, options: argparse.Namespace) -> tuple[list[Kill], list[Times]]:
    async with AsyncClient(address, reconnect_timeout=120) as client:
        streams = Streams(client, options.streams, options.prompt_tokens, options.max_tokens)
        try:
            kills = []
            for _ in range(options.kills):
                for what in ("worker", "scheduler"):
                    await streams.calm()
                    found = await all_there(client, options.workers)
                    served = found.workers[0].running if what == "worker" else options.streams
                    at = kill(found.workers[0].name if what == "worker" else None)
                    # The others go on with their next step, so those that stand still the longest are its own.
                    pauses = sorted(await streams.after(at))[-served:]
                    kills.append(Kill(what, at, pauses, heard.since(at, what)))
                    print(f"SIGKILL {what}: {_shown(kills[-1])}", file=sys.stderr)
            await asyncio.sleep(max(0.0, kills[-1].at + SHOWN_S[1] - time.monotonic()))  # the picture shows so much
            return kills, streams.times
        finally:
            await streams.close()


async def all_there(client: AsyncClient, workers: int) -> Stats:
    """Waits until so many workers serve, and nobody is a suspect any more: whom the next death made one again would
    run alone, which is no measure of a recovery."""
    while True:
        found = await client.stats(timeout=60)
        if len(found.workers) == workers and all(one.running and not one.suspects for one in found.workers):
            return found
        await asyncio.sleep(0.2)


def kill(worker: str | None) -> float:
    """SIGKILL for our own worker of that name, or for the scheduler; returns when."""
    module = "tandem.scheduler.main" if worker is None else "tandem.worker.main"
    for pid in descendants(os.getpid()):
        command = command_line(pid)
        if module not in command:
            continue
        if worker is None or json.loads(command[command.index("--config-json") + 1])["name"] == worker:
            at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            return at
    raise RuntimeError(f"there is no {worker or 'scheduler'} process to kill")


def pause_s(times: Sequence[float], moment: float) -> float:
    """How long after `moment` a stream went on, whose last token came more than IN_FLIGHT_S after it: the end of the
    longest gap in which it can have stood still because of what happened then. Tokens that were on their way already
    are no sign that it went on."""
    first = bisect.bisect_right(times, moment)
    last = bisect.bisect_right(times, moment + IN_FLIGHT_S)
    starts = [moment, *times[first:last]]
    gaps = [(end - start, end) for start, end in zip(starts, times[first : last + 1], strict=True)]
    return max(gaps)[1] - moment


def summary(kills: Sequence[Kill], what: str) -> dict[str, Any]:
    """Of all streams that a killed process served."""
    of_kind = [kill for kill in kills if kill.what == what]
    pauses = [pause for kill in of_kind for pause in kill.pauses_s]
    longest = [max(kill.pauses_s) for kill in of_kind]
    return {
        "kills": len(of_kind),
        "median_ms": 1_000 * statistics.median(pauses),
        "median_of_the_longest_ms": 1_000 * statistics.median(longest),
        "longest_ms": 1_000 * max(longest),
        "stages_median_ms": {
            said: 1_000 * statistics.median(kill.stages_s[said] for kill in of_kind if said in kill.stages_s)
            for said in of_kind[-1].stages_s
        },
    }


def plot(path: str, kills: Sequence[Kill], times: Sequence[Times]) -> None:
    """Each stream's tokens as dots on a line of its own, around the last kill of each kind."""
    figure = import_module("matplotlib.figure").Figure(figsize=(10, 7), layout="constrained")
    for axes, what in zip(figure.subplots(2, 1), ("worker", "scheduler"), strict=True):
        last = [kill for kill in kills if kill.what == what][-1]
        draw_streams(axes, [one.tokens for one in times], last.at, SHOWN_S, f"SIGKILL of the {what} at 0")
    figure.savefig(path)


def draw_streams(
    axes: Any, times: Sequence[Sequence[float]], zero: float, shown_s: tuple[float, float], title: str
) -> None:
    """Each stream's tokens on a line of its own; `times` are those of each stream, a red line stands at `zero`."""
    for line, tokens in enumerate(times):
        shown = [at - zero for at in tokens if shown_s[0] <= at - zero <= shown_s[1]]
        axes.plot(shown, [line] * len(shown), "|", color="#1f77b4", markersize=5)
    axes.axvline(0.0, color="#d62728")
    axes.set(title=title, xlabel="seconds", ylabel="stream", xlim=shown_s)


def _shown(kill: Kill) -> str:
    stages = "".join(f"{said} after {1_000 * at:.0f} ms, " for said, at in kill.stages_s.items())
    pauses = kill.pauses_s
    return f"{stages}next tokens: median {1_000 * statistics.median(pauses):.0f} ms, last {1_000 * max(pauses):.0f} ms"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.recovery", description=__doc__)
    parser.add_argument("--model", default=None, help="Hub id or folder (default: the built-in model)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--kills", type=int, default=5, help="of each kind")
    parser.add_argument("--out", default=None, help="JSON file to write")
    parser.add_argument("--plot", default=None, help="picture to write (matplotlib)")
    options = parser.parse_args(argv)
    worker: dict[str, Any] = {"device": options.device, "max_num_seqs": max(64, options.streams)}
    if options.model is not None:
        worker["model"] = options.model
    heard = Heard()
    with EmbeddedSystem(worker, {"log_level": "info"}, data_parallel_size=options.workers, listener=heard) as system:
        kills, times = asyncio.run(measure(system.address, heard, options))
    found = {
        **{what: summary(kills, what) for what in ("worker", "scheduler")},
        "kills": [
            {
                "what": kill.what,
                "pauses_ms": [round(1_000 * pause, 1) for pause in kill.pauses_s],
                "stages_ms": {said: round(1_000 * at, 1) for said, at in kill.stages_s.items()},
            }
            for kill in kills
        ],
    }
    print(json.dumps({name: found[name] for name in ("worker", "scheduler")}, indent=2))
    write_findings(options, found)
    if options.plot is not None:
        plot(options.plot, kills, times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
