"""`tandem bench offline | serve | sweep`. Flags are the fields of the load, the pace and the measuring, and those of
the system that is started for the benchmark unless `--connect` names a running one."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..launch.config import build, merged, read_file
from ..launch.connect import NEUTRAL, Service, service
from ..launch.options import Group, flags, option_names, with_flags
from ..launch.progress import note
from ..launch.serve import require_http_packages
from ..launch.signals import ending_interrupts
from ..launch.system import BUILTIN_NAME, place_workers
from ..protocol.errors import ConfigurationError
from ..scheduler.config import SchedulerConfig
from ..worker.config import WorkerConfig
from . import report
from .client_process import BACKENDS, OPENAI, SDK
from .findings import shown_model
from .http_target import HttpTarget, gateways, given
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

Backend = Annotated[
    list[str] | None,
    typer.Option(
        metavar="sdk|openai",
        help="What requests go through: the client SDK (default) or HTTP, with server-sent events. Given twice, both "
        "are measured in turns and compared.",
    ),
]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        help="HTTP of the service that --connect names, with the key in $OPENAI_API_KEY; else gateways are started for "
        "the benchmark."
    ),
]
ApiServerCount = Annotated[
    int | None, typer.Option(help="How many gateways are started; they share a port (default 1).")
]

_DEFAULT_LOOKAHEAD = WorkerConfig.model_fields["lookahead"].default

app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
@with_flags([*LOAD_FLAGS, *MEASURING_FLAGS, *OFFLINE_SYSTEM_FLAGS])
def offline(
    connect: Connect = None,
    backend: Backend = None,
    base_url: BaseUrl = None,
    api_server_count: ApiServerCount = None,
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
    through = _through(backend, base_url, api_server_count, connect)
    depths: Any = system.options.pop("lookahead", _DEFAULT_LOOKAHEAD)
    varied = [{"lookahead": depth} for depth in (depths if isinstance(depths, list) else [depths])]
    benchmark = _benchmark(options, [Pace()], [], through, keep_arrivals=False)
    results = _measure(system, benchmark, varied if connect is None else [{}], pictures, through)
    console = report.console()
    columns = [*(["lookahead"] if connect is None else []), *through.column]
    if columns:
        report.show_points(console, columns, results)
    for result in results:
        report.show_summary(console, result)
    report.show_trouble(console, results)
    _finish("offline", out, benchmark, system, through, results)


@app.command()
@with_flags([*LOAD_FLAGS, *PACE_FLAGS, *MEASURING_FLAGS, *SYSTEM_FLAGS])
def serve(
    goodput: Goodput = None,
    connect: Connect = None,
    backend: Backend = None,
    base_url: BaseUrl = None,
    api_server_count: ApiServerCount = None,
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
    through = _through(backend, base_url, api_server_count, connect)
    benchmark = _benchmark(options, [build(Pace, _given(options))], goodput, through)
    results = _measure(system, benchmark, [{}], pictures, through)
    console = report.console()
    if through.column:
        report.show_points(console, through.column, results)
    for result in results:
        report.show_latencies(console, result["median"])
        report.show_summary(console, result)
    report.show_trouble(console, results)
    _finish("serve", out, benchmark, system, through, results)


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
    backend: Backend = None,
    base_url: BaseUrl = None,
    api_server_count: ApiServerCount = None,
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
    through = _through(backend, base_url, api_server_count, connect)
    if plot is not None and through.column:
        raise ConfigurationError("--plot: draws one --backend")
    benchmark = _benchmark(options, paces, goodput, through)
    results = _measure(system, benchmark, [{}], Wanted(None, None), through)
    console = report.console()
    report.show_points(console, [varied, *through.column], results)
    report.show_trouble(console, results)
    if plot is not None:
        report.plot(plot, varied, results)
    _finish("sweep", out, benchmark, system, through, results)


@dataclass(frozen=True)
class _System:
    """What is measured: a running service, or the options of one to start."""

    connect: str | None
    options: dict[str, Any]
    replicas: int

    def described(self, varied: Collection[str]) -> dict[str, Any]:
        """Every option of the system, those that nobody gave included, but for those that the results tell; of one that
        runs already the kind of its address, ipc or tcp."""
        if self.connect is not None:
            return {"connect": self.connect.partition(":")[0]}
        address = "ipc:///unused"
        unused = {"scheduler", "address", "worker_address", "name", "keys", "insecure", "trace_dir", *LOGGING, *varied}
        worker = place_workers(self.options, 1, address)[0].config.model_dump(exclude=unused)
        worker["model"] = shown_model(self.options.get("model", BUILTIN_NAME))
        scheduler = build(SchedulerConfig, self.options, address=address).model_dump(exclude=unused)
        return {"worker": worker, "scheduler": scheduler, "data_parallel_size": self.replicas}


@dataclass(frozen=True)
class _Through:
    """What requests go through."""

    backends: list[str]
    base_url: str | None
    api_server_count: int

    @property
    def column(self) -> list[str]:
        """Of tables, if there is something to tell apart."""
        return ["backend"] if len(self.backends) > 1 else []

    @contextmanager
    def open(self, service: Service) -> Iterator[HttpTarget | None]:
        """HTTP for the time of the block, if it is asked for."""
        if OPENAI not in self.backends:
            yield None
        elif self.base_url is not None:
            yield given(self.base_url)
        else:
            with gateways(service, self.api_server_count) as found:
                yield found

    def described(self) -> dict[str, Any]:
        http = {"base_url": self.base_url} if self.base_url else {"api_server_count": self.api_server_count}
        return {"backends": self.backends, **(http if OPENAI in self.backends else {})}


def _through(backends: list[str] | None, base_url: str | None, count: int | None, connect: str | None) -> _Through:
    chosen = backends or [SDK]
    for name in chosen:
        if name not in BACKENDS:
            raise ConfigurationError(f"--backend: must be {' or '.join(BACKENDS)}, not {name!r}")
    if len(set(chosen)) < len(chosen):
        raise ConfigurationError(f"--backend: {chosen[0]} is given twice")
    if OPENAI in chosen:
        require_http_packages()
        if base_url is not None and connect is None:
            raise ConfigurationError("--base-url: needs --connect, the address of the service behind it")
        if base_url is not None and count is not None:
            raise ConfigurationError("--api-server-count: --base-url names gateways that run already")
    elif base_url is not None or count is not None:
        flag = "--base-url" if base_url is not None else "--api-server-count"
        raise ConfigurationError(f"{flag}: only with --backend openai")
    return _Through(chosen, base_url, 1 if count is None else count)


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
    options: Mapping[str, Any],
    paces: Sequence[Pace],
    goodput: Sequence[str] | None,
    through: _Through,
    *,
    keep_arrivals: bool = True,
) -> Benchmark:
    given = _given(options)
    limits = read_limits(goodput or [])
    return Benchmark(build(Load, given), paces, build(Measuring, given), limits, keep_arrivals, through.backends)


def _measure(
    system: _System, benchmark: Benchmark, varied: Sequence[dict[str, Any]], pictures: Wanted, through: _Through
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
                    with through.open(target) as http:
                        served, found = benchmark.measure(target, http)
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
    command: str,
    out: str | None,
    benchmark: Benchmark,
    system: _System,
    through: _Through,
    results: Sequence[report.Result],
) -> None:
    """Writes the report, and ends with exit code 1 if no request was completed."""
    if out is not None:
        options = {
            "load": benchmark.load.model_dump(),
            "measuring": benchmark.measuring.model_dump(),
            "goodput_ms": benchmark.limits,
            "system": system.described(results[0]),
            "through": through.described(),
        }
        report.write_json(out, command, options, results)
    if not any(run["figures"]["completed"] for result in results for run in result["runs"]):
        note("tandem: no request was completed")
        sys.exit(1)
