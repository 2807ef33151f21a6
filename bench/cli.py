"""`tandem bench offline | serve | sweep`. Flags are the fields of the load, the pace and the measuring, and those of
the system that is started for the benchmark unless `--connect` names a running one."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..launch.config import build, merged, read_file
from ..launch.connect import NEUTRAL, service
from ..launch.options import Group, flags, option_names, with_flags
from ..launch.progress import note
from ..launch.signals import ending_interrupts
from ..launch.system import BUILTIN_NAME, place_workers
from ..protocol.errors import ConfigurationError
from ..scheduler.config import SchedulerConfig
from ..worker.config import WorkerConfig
from . import report
from .load import Benchmark, Measuring, Pace
from .metrics import read_limits
from .trace import SystemTrace, Wanted, load
from .workloads import Load

INTERRUPTED = 130
LOGGING = ("log_level", "log_format", "log_requests")
"""Options that no figure depends on much."""
HEADING = "The system that is started, without --connect"

# The launcher chooses addresses and names, and `--trace` a directory; `--seed` is the load's.
WORKER = Group(WorkerConfig, HEADING, without=("scheduler", "name", "seed", "trace_dir"))
SCHEDULER = Group(SchedulerConfig, HEADING, without=("address", "worker_address", "trace_dir"))
SYSTEM_FLAGS = flags(WORKER, SCHEDULER)
OFFLINE_SYSTEM_FLAGS = [flag for flag in SYSTEM_FLAGS if flag.name != "lookahead"]  # it may be given several times
LOAD_FLAGS = flags(Group(Load, "Load"))
PACE_FLAGS = flags(Group(Pace, "Pace"))
SWEEP_PACE_FLAGS = [flag for flag in PACE_FLAGS if flag.name == "burstiness"]
MEASURING_FLAGS = flags(Group(Measuring, "Measuring"))

Connect = Annotated[str | None, typer.Option(help="Address of a running service to measure.")]
Replicas = Annotated[
    int | None, typer.Option("--data-parallel-size", help="How many workers the system gets (default 1).")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with the system's options, named like the flags.")
]
Out = Annotated[str | None, typer.Option(help="JSON file to write the report to.")]
Trace = Annotated[
    str | None,
    typer.Option("--trace", help="File for Perfetto: what each process, thread and stream did when, on one clock."),
]
Timeline = Annotated[
    str | None, typer.Option("--timeline", help="Picture of some steps in every track of the trace (matplotlib).")
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:MS",
        help="A limit that a request must keep to count as good: ttft:500, tpot:50 or e2el:10000. May be repeated.",
    ),
]

_DEFAULT_LOOKAHEAD = WorkerConfig.model_fields["lookahead"].default

app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
@with_flags([*LOAD_FLAGS, *MEASURING_FLAGS, *OFFLINE_SYSTEM_FLAGS])
def offline(
    connect: Connect = None,
    lookahead: Annotated[
        list[int] | None, typer.Option(help="Steps queued ahead (default 1). Repeated, each is measured and compared.")
    ] = None,
    data_parallel_size: Replicas = None,
    config: ConfigFile = None,
    out: Out = None,
    trace: Trace = None,
    timeline: Timeline = None,
    **options: Any,
) -> None:
    """All requests at once: throughput, and how long the device idles between steps."""
    system = _system(connect, data_parallel_size, config, {**options, "lookahead": lookahead or None})
    report.check_writable(("--out", out))
    pictures = Wanted(trace, timeline)
    pictures.check(connect)
    depths: Any = system.options.pop("lookahead", _DEFAULT_LOOKAHEAD)
    varied = [{"lookahead": depth} for depth in (depths if isinstance(depths, list) else [depths])]
    benchmark = _benchmark(options, [Pace()], [], keep_arrivals=False)
    results = _measure(system, benchmark, varied if connect is None else [{}], pictures)
    console = report.console()
    if connect is None:
        report.show_points(console, "lookahead", results)
    for result in results:
        report.show_summary(console, result)
    report.show_trouble(console, results)
    _finish("offline", out, benchmark, system, results)


@app.command()
@with_flags([*LOAD_FLAGS, *PACE_FLAGS, *MEASURING_FLAGS, *SYSTEM_FLAGS])
def serve(
    goodput: Goodput = None,
    connect: Connect = None,
    data_parallel_size: Replicas = None,
    config: ConfigFile = None,
    out: Out = None,
    trace: Trace = None,
    timeline: Timeline = None,
    **options: Any,
) -> None:
    """Requests that arrive over time: latencies as their clients see them, throughput, goodput."""
    system = _system(connect, data_parallel_size, config, options)
    report.check_writable(("--out", out))
    pictures = Wanted(trace, timeline)
    pictures.check(connect)
    benchmark = _benchmark(options, [build(Pace, _given(options))], goodput)
    results = _measure(system, benchmark, [{}], pictures)
    console = report.console()
    report.show_latencies(console, results[0]["median"])
    report.show_summary(console, results[0])
    report.show_trouble(console, results)
    _finish("serve", out, benchmark, system, results)


@app.command()
@with_flags([*LOAD_FLAGS, *SWEEP_PACE_FLAGS, *MEASURING_FLAGS, *SYSTEM_FLAGS])
def sweep(
    request_rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second; repeat it to sweep over several (default inf).")
    ] = None,
    max_concurrency: Annotated[
        list[int] | None, typer.Option(help="Most requests in flight at once; repeat it to sweep over several.")
    ] = None,
    goodput: Goodput = None,
    plot: Annotated[
        str | None, typer.Option(help="Picture to write: TTFT and ITL percentiles against the load (matplotlib).")
    ] = None,
    connect: Connect = None,
    data_parallel_size: Replicas = None,
    config: ConfigFile = None,
    out: Out = None,
    **options: Any,
) -> None:
    """`serve` at several request rates, or several concurrencies, on one system."""
    system = _system(connect, data_parallel_size, config, options)
    report.check_writable(("--out", out), ("--plot", plot))
    if plot is not None:
        report.require_matplotlib("--plot")
    rates, caps = request_rate or [], max_concurrency or []
    if len(rates) > 1 and len(caps) > 1:
        raise ConfigurationError("--request-rate and --max-concurrency have several values; sweep over one of them")
    if not rates and not caps:
        raise ConfigurationError("nothing to sweep over: repeat --request-rate or --max-concurrency")
    varied = "request_rate" if len(rates) > 1 or not caps else "max_concurrency"
    points: list[dict[str, float | None]] = [
        {"request_rate": rate, "max_concurrency": cap} for rate in rates or (None,) for cap in caps or (None,)
    ]
    paces = [build(Pace, _given({**options, **point})) for point in points]
    benchmark = _benchmark(options, paces, goodput)
    results = _measure(system, benchmark, [{}], Wanted(None, None))
    console = report.console()
    report.show_points(console, varied, results)
    report.show_trouble(console, results)
    if plot is not None:
        report.plot(plot, varied, results)
    _finish("sweep", out, benchmark, system, results)


@dataclass(frozen=True)
class _System:
    """What is measured: a running service, or the options of one to start."""

    connect: str | None
    options: dict[str, Any]
    replicas: int

    def described(self, varied: Collection[str]) -> dict[str, Any]:
        """Every option of the system, those that nobody gave included, but for those that the results tell."""
        if self.connect is not None:
            return {"connect": self.connect}
        address = "ipc:///unused"
        unused = {"scheduler", "address", "worker_address", "name", "keys", "insecure", "trace_dir", *LOGGING, *varied}
        worker = place_workers(self.options, 1, address)[0].config.model_dump(exclude=unused)
        worker["model"] = self.options.get("model", BUILTIN_NAME)
        scheduler = build(SchedulerConfig, self.options, address=address).model_dump(exclude=unused)
        return {"worker": worker, "scheduler": scheduler, "data_parallel_size": self.replicas}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _system(connect: str | None, replicas: int | None, config: Path | None, options: Mapping[str, Any]) -> _System:
    """The system's part of the flags, over the configuration file's. Raises ConfigurationError."""
    names = [*option_names(SYSTEM_FLAGS), "data_parallel_size"]
    flags = {name: options.get(name) for name in names} | {"data_parallel_size": replicas}
    chosen = merged(flags, read_file(config, names) if config else {})
    if connect is not None and (asked := sorted(set(chosen) - set(NEUTRAL))):
        given = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ConfigurationError(f"--connect names a running service, and these are for starting one: {given}")
    count = chosen.pop("data_parallel_size", 1)
    if isinstance(count, bool) or not isinstance(count, int):
        raise ConfigurationError(f"--data-parallel-size: must be a whole number, not {count!r}")
    return _System(connect, chosen, count)


def _benchmark(
    options: Mapping[str, Any], paces: Sequence[Pace], goodput: Sequence[str] | None, *, keep_arrivals: bool = True
) -> Benchmark:
    given = _given(options)
    limits = read_limits(goodput or [])
    return Benchmark(build(Load, given), paces, build(Measuring, given), limits, keep_arrivals)


def _measure(
    system: _System, benchmark: Benchmark, varied: Sequence[dict[str, Any]], pictures: Wanted
) -> list[report.Result]:
    """One system for each of `varied` (options on top of the others), measured at every pace; then the pictures of
    them."""
    results: list[report.Result] = []
    traces: list[SystemTrace] = []
    with ending_interrupts() as ending, TemporaryDirectory(prefix="tandem-trace-") as directory:
        try:
            for more in varied:
                options = {**system.options, **more}
                name = ", ".join(f"{name} {value}" for name, value in more.items()) or "the system"
                where = Path(directory, name)
                if pictures:
                    options["trace_dir"] = str(where)
                began = time.monotonic()
                with service(
                    system.connect, options, embed=True, scheduler_options=options, data_parallel_size=system.replicas
                ) as target:
                    ready_s = time.monotonic() - began
                    served, found = benchmark.measure(target)
                start = {} if system.connect is not None else {"ready_s": ready_s}
                results += [{**more, **start, "served": served, **one} for one in found]
                if pictures:
                    traces.append(load(name, where))
        except KeyboardInterrupt:
            ending.is_last = True
            note("Interrupted.")
            sys.exit(INTERRUPTED)
        pictures.write(traces)
    return results


def _finish(
    command: str, out: str | None, benchmark: Benchmark, system: _System, results: Sequence[report.Result]
) -> None:
    """Writes the report, and ends with exit code 1 if no request was completed."""
    if out is not None:
        options = {
            "load": benchmark.load.model_dump(),
            "measuring": benchmark.measuring.model_dump(),
            "goodput_ms": benchmark.limits,
            "system": system.described(results[0]),
        }
        report.write_json(out, command, options, results)
    if not any(run["figures"]["completed"] for result in results for run in result["runs"]):
        note("tandem: no request was completed")
        sys.exit(1)
