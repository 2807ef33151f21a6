"""What a benchmark found, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..launch.tables import wide_console
from ..protocol.errors import ConfigurationError
from .client_process import SDK
from .machine import describe_machine
from .metrics import LATENCIES, PERCENTILES, Figures

BUSY_CLIENT = 0.8
"""Share of a core from which on a client process may be what was measured."""
PLAIN_WIDTH = 200
"""Columns where no terminal says how many there are."""

Result = dict[str, Any]
"""One point: what it varied, the medians of its runs' figures, and the runs."""


def check_writable(*files: tuple[str, str | None]) -> None:
    """Raises ConfigurationError before anything is measured whose result could not be written. Of each file the flag
    and the path, if it is given."""
    for name, path in files:
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigurationError(f"{name}: there is no folder {Path(path).absolute().parent}")


def require_matplotlib(flag: str) -> None:
    """Raises ConfigurationError if what a flag asks for cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise ConfigurationError(f"{flag} needs matplotlib, which is not installed: pip install 'tandem-serve[bench]'")


def write_json(path: str, command: str, options: dict[str, Any], results: Sequence[Result]) -> None:
    """The whole report: options, results, and the machine that this ran on. Raises ConfigurationError."""
    report = {"command": command, **options, "results": list(results), "machine": describe_machine()}
    try:
        Path(path).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--out: cannot write {path}: {error.strerror}") from error


def console() -> Console:
    """For stdout."""
    return wide_console(PLAIN_WIDTH)


def show_points(out: Console, varied: Sequence[str], results: Sequence[Result]) -> None:
    """A line for each point: what it varied, and medians of its runs."""
    goodput = "request_goodput" in results[0]["median"]
    table = Table(*varied, "ok", "failed", "requests/s", "output tok/s", "total tok/s", header_style="")
    for heading in [*(["good/s"] if goodput else []), "of first", *_POINT_LATENCIES, "step ms", "idle"]:
        table.add_column(heading)
    for column in table.columns:
        column.justify = "right"
    for result in results:
        median: Figures = result["median"]
        cells = [
            *(_shown(result[name]) for name in varied),
            _shown(median["completed"], 0),
            _shown(median["failed"], 0),
            _shown(median["request_throughput"]),
            _shown(median["output_throughput"], 0),
            _shown(median["total_token_throughput"], 0),
        ]
        if goodput:
            cells.append(_shown(median["request_goodput"]))
        cells.append(_shown(_ratio(median["output_throughput"], results[0]["median"]["output_throughput"]), 3))
        cells += [_shown(median[name], 1) for name in _POINT_LATENCIES.values()]
        cells += [_shown(median["step_ms"]), _percent(median["idle_share"])]
        table.add_row(*cells)
    out.print(table)


_POINT_LATENCIES = {
    f"{name.upper()} p{percent}": f"p{percent}_{name}_ms" for name in ("ttft", "tpot", "itl") for percent in (50, 99)
}


def show_latencies(out: Console, median: Figures) -> None:
    """One point in full: latencies down, their mean and percentiles across."""
    table = Table("ms", "mean", *(f"p{percent}" for percent in PERCENTILES), header_style="")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in LATENCIES:
        kinds = ["mean", *(f"p{percent}" for percent in PERCENTILES)]
        table.add_row(name.upper(), *(_shown(median[f"{kind}_{name}_ms"]) for kind in kinds))
    out.print(table)


def show_summary(out: Console, result: Result) -> None:
    """What a table of latencies leaves out: counts, throughputs, device, clients."""
    median: Figures = result["median"]
    ratio = f" ({_percent(result['of_first_backend'])} of the SDK's)" if "of_first_backend" in result else ""
    through = "" if result["backend"] == SDK else " over HTTP"
    good = f", {_shown(median['request_goodput'])} good" if "request_goodput" in median else ""
    out.print(
        f"{_shown(median['completed'], 0)} requests completed{through}, {_shown(median['failed'], 0)} failed, in "
        f"{_shown(median['duration_s'])} s: {_shown(median['request_throughput'])} requests/s{good}, "
        f"{_shown(median['output_throughput'], 0)} output tokens/s{ratio}, "
        f"{_shown(median['total_token_throughput'], 0)} tokens/s in all; "
        f"{_shown(median['tokens_per_delivery'])} tokens a delivery"
    )
    out.print(
        f"device: {_shown(median['steps'], 0)} steps of {_shown(median['step_ms'])} ms, idle between them "
        f"{_percent(median['idle_share'])}; prefix cache hits {_percent(median['prefix_cache_hit_rate'])}, "
        f"{_shown(median['preemptions'], 0)} preemptions"
    )
    if median["gateway_cpu_us_per_token"] is not None:
        shares = [share for run in result["runs"] for share in run["gateway_cpu_share"]]
        count = len(result["runs"][0]["gateway_cpu_share"])
        out.print(
            f"HTTP: {count} {'gateway' if count == 1 else 'gateways'}, the busiest used {max(shares):.0%} of a core; "
            f"{_shown(median['gateway_cpu_us_per_token'], 1)} µs of processor time a token"
        )


def show_trouble(out: Console, results: Sequence[Result]) -> None:
    """What failed, by kind; how busy the client was, and whether it may be what was measured."""
    runs = [run for result in results for run in result["runs"]]
    for number, run in enumerate(runs, 1):
        for kind, failed in run["failures"].items():
            text = f"run {number} of {len(runs)}: {failed['count']} failed with {kind}, the first: "
            out.print(text + failed["first_message"], markup=False)
    shares = [share for run in runs for share in run["client_cpu_share"]]
    late = max(run["figures"]["p99_client_late_ms"] or 0.0 for run in runs)
    processes = len(runs[0]["client_cpu_share"])
    out.print(
        f"client: {processes} {'process' if processes == 1 else 'processes'}, the busiest used {max(shares):.0%} of a "
        f"core and came to its requests {late:.1f} ms late (p99)"
    )
    if max(shares) > BUSY_CLIENT:
        out.print("The client may have been the bottleneck: try a larger --client-processes.")


def plot(path: str, varied: str, results: Sequence[Result]) -> None:
    """TTFT and ITL percentiles against the load, as a picture. Raises ConfigurationError if it cannot be written."""
    figure = import_module("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
    labels = [_shown(result[varied]) for result in results]
    for axes, name in zip(figure.subplots(1, 2), ("ttft", "itl"), strict=True):
        for percent in PERCENTILES:
            values = [result["median"][f"p{percent}_{name}_ms"] for result in results]
            found = [float("nan") if value is None else value for value in values]
            axes.plot(range(len(labels)), found, marker="o", label=f"p{percent}")
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlabel=varied.replace("_", " "), ylabel=f"{name.upper()}, ms", ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--plot: cannot write {path}: {error}") from error


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _shown(value: object, digits: int = 2) -> str:
    if isinstance(value, float):
        return f"{value:,.{digits}f}" if digits or value != int(value) else f"{value:,.0f}"
    return "–" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
