"""A load sent by client processes, and what each run of it gave: figures of the clients and of the devices."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from ..launch.connect import Service
from ..launch.progress import note, prompt_bar
from ..launch.tether import command
from ..protocol.errors import ConfigurationError, TandemError
from ..protocol.messages import Stats
from .client_process import SDK
from .http_target import HttpTarget
from .metrics import Figures, Outcome, failures, figures, medians
from .observer import Observer
from .workloads import Load, Wanted, arrivals, plan

LEAD_S = 0.1
"""From the order to start until the start, so that it reaches all processes before."""
END_S = 10.0
MODULE = "tandem.bench.client_process"


class Pace(BaseModel):
    """How fast requests are sent. Fields are the command line's flags."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request_rate: Annotated[float, Field(gt=0, description="Requests a second; inf sends all at once.")] = math.inf
    burstiness: Annotated[
        float,
        Field(
            gt=0,
            le=1e6,
            description="Shape of the gamma distribution of gaps; 1 is a Poisson process, less is burstier.",
        ),
    ] = 1.0
    max_concurrency: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="Most requests in flight at once; others wait in the client.")
    ] = None


class Measuring(BaseModel):
    """How often to measure, and with what. Fields are the command line's flags."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repeats: Annotated[int, Field(ge=1, le=1_000, description="Measured runs; their medians are shown.")] = 1
    num_warmups: Annotated[
        int, Field(ge=0, le=100_000, description="Requests of 16 tokens that are sent before, and not measured.")
    ] = 32
    client_processes: Annotated[
        int, Field(ge=1, le=1_024, description="Processes that send the load, if one cannot keep up.")
    ] = 1


class BenchFailed(TandemError):
    """A client process could not do its part."""


class Clients:
    """The client processes of one service. Used in a with block; ends them, and kills what has not ended."""

    def __init__(self, target: Service, http: HttpTarget | None, load: Load, parts: int) -> None:
        """Starts them. Call it in a thread that outlives them (see launch.tether)."""
        self._said: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self.parts = parts
        try:
            for part in range(parts):
                self._start(part)
        except BaseException:
            self._end(0.0)
            raise
        self._orders = [
            {
                "address": target.address,
                "keys": target.keys,
                "insecure": target.insecure,
                "base_url": None if http is None else http.base_url,
                "api_key": "" if http is None else http.api_key,
                "part": part,
                "parts": parts,
                "load": load.model_dump(),
            }
            for part in range(parts)
        ]

    def _start(self, part: int) -> None:
        # A group of its own: Ctrl-C is for us, who then end it.
        process = subprocess.Popen(
            command(MODULE, []), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        self._processes.append(process)
        reader = threading.Thread(target=self._read, args=(part, process), name=f"bench-client-{part}", daemon=True)
        self._readers.append(reader)
        reader.start()

    def _read(self, part: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._said.put((part, json.loads(line)))
        self._said.put((part, None))

    def connect(self) -> dict[str, Any]:
        """Returns what is served, when all of them are connected."""
        return self.ask(self._orders, "ready")[0]

    def ask(
        self, orders: Sequence[dict[str, Any]], until: str, progress: Callable[[int], None] = lambda _ended: None
    ) -> list[dict[str, Any]]:
        """Sends each process its order; returns the `until` event of each. `progress` is told of requests that ended.
        Raises BenchFailed with what a process said, or if one ends instead."""
        for process, order in zip(self._processes, orders, strict=True):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(order) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                continue  # why it has gone is in what it said
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < self.parts:
            part, said = self._said.get()
            if said is None:
                code = self._processes[part].wait()
                raise BenchFailed(f"client process {part} ended unexpectedly with exit code {code}")
            if said["event"] == "error":
                raise BenchFailed(said["message"])
            if said["event"] == "progress":
                progress(said["ended"])
            elif said["event"] == until:
                answers[part] = said
        return [answers[part] for part in range(self.parts)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(END_S if kind is None else 0.0)

    def _end(self, grace_s: float) -> None:
        for process in self._processes:
            if grace_s == 0:
                process.kill()
            if process.stdin is not None:
                try:
                    process.stdin.close()
                except BrokenPipeError:
                    pass  # it has ended already
        end = time.monotonic() + grace_s
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join()
        for process in self._processes:
            if process.stdout is not None:
                process.stdout.close()


@dataclass(frozen=True)
class Benchmark:
    """What is measured on one service: the load at each of some paces."""

    load: Load
    paces: Sequence[Pace]
    measuring: Measuring
    limits: dict[str, float]
    """Goodput's, in ms by latency."""
    keep_arrivals: bool = True
    """Whether a trace's own times of arrival count."""
    backends: Sequence[str] = (SDK,)
    """What the load goes through, in turns."""

    def __post_init__(self) -> None:
        """Raises ConfigurationError for what does not fit together."""
        parts = self.measuring.client_processes
        count = len(self._wanted)
        if count < parts:
            raise ConfigurationError(f"--client-processes {parts}: there are only {count} requests to share among them")
        for pace in self.paces:
            if pace.max_concurrency is not None and pace.max_concurrency < parts:
                raise ConfigurationError(
                    f"--max-concurrency {pace.max_concurrency}: less than --client-processes {parts}, each of which "
                    "has at least one request in flight"
                )
            if self.load.workload == "trace" and not math.isinf(pace.request_rate):
                raise ConfigurationError("--request-rate: a trace has its own times of arrival")

    @cached_property
    def _wanted(self) -> list[Wanted]:
        return plan(self.load)

    def measure(self, target: Service, http: HttpTarget | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What is served, and for each pace and backend the runs and their medians; `http` is where backends other than
        the SDK go. Raises BenchFailed, ServiceUnavailable."""
        with ExitStack() as stack:
            clients = stack.enter_context(Clients(target, http, self.load, self.measuring.client_processes))
            observer = Observer(target.address)
            stack.callback(observer.close)
            served = clients.connect()
            del served["event"]
            for backend in self.backends if self.measuring.num_warmups else ():
                self._warm_up(clients, backend)
            found = []
            number = 0
            for pace in self.paces:
                by_backend: dict[str, list[dict[str, Any]]] = {backend: [] for backend in self.backends}
                for _ in range(self.measuring.repeats):
                    for backend, runs in by_backend.items():  # in turns, so that what changes meanwhile changes for all
                        number += 1
                        runs.append(self._run(clients, observer, http, backend, pace, number))
                        self._say(runs[-1], number)
                points = [_point(pace, backend, runs) for backend, runs in by_backend.items()]
                first = points[0]["median"]["output_throughput"]
                for point in points[1:]:
                    throughput = point["median"]["output_throughput"]
                    point["of_first_backend"] = throughput / first if throughput and first else None
                found += points
            return served, found

    def _say(self, run: dict[str, Any], number: int) -> None:
        total = len(self.paces) * self.measuring.repeats * len(self.backends)
        if total > 1:
            backend = f", {run['backend']}" if len(self.backends) > 1 else ""
            note(f"run {number} of {total}{backend}: {_in_short(run['figures'])}")

    def _warm_up(self, clients: Clients, backend: str) -> None:
        counts = shares(self.measuring.num_warmups, clients.parts)
        clients.ask([{"backend": backend, "warm_up": count} for count in counts], "prepared")
        clients.ask([{"start": time.monotonic()}] * clients.parts, "done")

    def _run(
        self, clients: Clients, observer: Observer, http: HttpTarget | None, backend: str, pace: Pace, number: int
    ) -> dict[str, Any]:
        due = self._due(pace)
        most: Sequence[int | None] = [None] * clients.parts
        if pace.max_concurrency is not None:
            most = shares(pace.max_concurrency, clients.parts)
        orders = [
            {"backend": backend, "run": number, "concurrency": most[part], "due": due[part :: clients.parts]}
            for part in range(clients.parts)
        ]
        clients.ask(orders, "prepared")
        before = observer.stats()
        asked = http if http is not None and backend != SDK else HttpTarget("")
        used = asked.cpu_seconds()
        with prompt_bar(len(due)) as bar:
            told = 0

            def progress(ended: int) -> None:
                nonlocal told
                told += ended
                for _ in range(ended):
                    bar.one_done()

            done = clients.ask([{"start": time.monotonic() + LEAD_S}] * clients.parts, "done", progress)
            progress(len(due) - told)
        after = observer.stats()
        outcomes = [Outcome(**one) for part in done for one in part["outcomes"]]
        found = figures(outcomes, self.limits)
        used = [now - then for now, then in zip(asked.cpu_seconds(), used, strict=True)]
        tokens = found["output_tokens"]
        return {
            "backend": backend,
            "figures": {
                **found,
                **device_figures(before, after),
                "gateway_cpu_us_per_token": 1e6 * sum(used) / tokens if used and tokens else None,
            },
            "failures": failures(outcomes),
            "gateway_cpu_share": [one / (found["duration_s"] or math.inf) for one in used],
            "client_cpu_share": [part["cpu_share"] for part in done],
        }

    def _due(self, pace: Pace) -> list[float]:
        if self.load.workload == "trace" and self.keep_arrivals:
            return [one.arrival_s for one in self._wanted]
        return arrivals(len(self._wanted), pace.request_rate, pace.burstiness, self.load.seed)


def shares(total: int, parts: int) -> list[int]:
    """`total` divided as equally as whole numbers allow."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def device_figures(before: Stats, after: Stats) -> Figures:
    """Steps, and how the workers' device time with work divides into steps and gaps, between two readings; and what
    the scheduler counted meanwhile. Includes what other clients asked for."""
    earlier = {worker.registration: worker for worker in before.workers}
    steps = busy = gap = 0
    for worker in after.workers:
        then = earlier.get(worker.registration)
        steps += worker.steps - (then.steps if then else 0)
        busy += worker.busy_us - (then.busy_us if then else 0)
        gap += worker.gap_us - (then.gap_us if then else 0)
    looked_up = after.looked_up_tokens - before.looked_up_tokens
    return {
        "steps": steps,
        "step_ms": busy / 1e3 / steps if steps else None,
        "idle_share": gap / (busy + gap) if busy + gap else None,
        "preemptions": after.preemptions - before.preemptions,
        "prefix_cache_hit_rate": (after.cached_tokens - before.cached_tokens) / looked_up if looked_up else None,
    }


def _point(pace: Pace, backend: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {**_as_json(pace), "backend": backend, "median": medians([run["figures"] for run in runs]), "runs": runs}


def _in_short(found: Figures) -> str:
    return f"{found['completed']} completed, {found['failed']} failed, {found['output_throughput'] or 0:,.0f} tokens/s"


def _as_json(pace: Pace) -> dict[str, Any]:
    found = pace.model_dump()
    if math.isinf(pace.request_rate):
        found["request_rate"] = "inf"  # as vLLM writes it: JSON has no infinity
    return found
