"""What a run of the simulated cluster showed, as figures and as tables."""

from __future__ import annotations

import math
import pstats
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from .clients import GAP_BIN_MS, GAP_BINS

MOST_WAITED = 0.001
"""Share of steps that may have made a GPU wait."""
LEAST_WIDTH = 140
"""Columns of a table where the output is no terminal."""
RUNS_BESIDE = 2
PROFILE_LINES = 25
OURS = ("scheduler/", "protocol/")


def summarise(
    num_workers: int,
    rows: int,
    cores: dict[str, float],
    of_workers: Sequence[dict[str, Any]],
    of_clients: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Joins the reports of all processes of one run. `cores`: processors that the scheduler used."""
    devices = [worker for party in of_workers for worker in party["workers"]]
    seconds = of_workers[0]["seconds"]
    steps = sum(device["steps"] for device in devices)
    busy_s, waited_s, still_s = (
        sum(device[name] for device in devices) for name in ("busy_s", "waited_s", "stood_still_s")
    )
    gaps = np.zeros(GAP_BINS, np.int64)
    for party in of_clients:
        np.add.at(gaps, party["gap_bins"], party["gap_counts"])
    return {
        "workers": num_workers,
        "rows": rows,
        "seconds": seconds,
        "steps": steps,
        "waited_share": sum(device["waited"] for device in devices) / max(1, steps),
        "waited_share_as_seen": sum(device["waited_as_seen"] for device in devices) / max(1, steps),
        "idle_share": waited_s / max(1e-9, busy_s + waited_s),
        "stood_still_share": still_s / (seconds * num_workers),
        "step_ms": busy_s / max(1, steps) * 1e3,
        "slack_us": _percentiles([slack for device in devices for slack in device["slack_us"]], low=True),
        "result_late_us": _percentiles([late for device in devices for late in device["late_us"]]),
        "rows_in_use": sum(device["sampled"] for device in devices) / max(1, steps),
        "sampled_per_s": sum(device["sampled"] for device in devices) / seconds,
        "delivered_per_s": sum(party["tokens"] / party["seconds"] for party in of_clients),
        "client_messages_per_s": sum(party["messages"] / party["seconds"] for party in of_clients),
        "requests_finished": sum(party["finished"] for party in of_clients),
        "first_token_ms": _percentiles([one for party in of_clients for one in party["first_token_ms"]]),
        "gap_ms": _histogram_percentiles(gaps),
        "workers_nice": max(party["nice"] for party in of_workers),
        "cores": {
            **cores,
            "simulated_workers": sum(party["cpu_s"] / party["seconds"] for party in of_workers),
            "simulated_clients": sum(party["cpu_s"] / party["seconds"] for party in of_clients),
        },
    }


def _percentiles(values: Sequence[float], low: bool = False) -> dict[str, float]:
    """The worst are the highest, or with `low` the lowest."""
    if not values:
        return {}
    shares = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "worst": 100.0}
    return {name: float(np.percentile(values, 100.0 - share if low else share)) for name, share in shares.items()}


def _histogram_percentiles(bins: Any) -> dict[str, float]:
    """Of values counted in bins of GAP_BIN_MS: upper ends of bins."""
    total = int(bins.sum())
    if not total:
        return {}
    below = np.cumsum(bins)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "worst": 1.0}
    return {name: (int(np.searchsorted(below, share * total)) + 1) * GAP_BIN_MS for name, share in shares.items()}


def show_runs(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """One column a run, workers × rows at its head."""
    console.width = max(console.width, LEAST_WIDTH)
    for first in range(0, len(runs), RUNS_BESIDE):
        some = runs[first : first + RUNS_BESIDE]
        table = Table("", *(f"{run['workers']} × {run['rows']}" for run in some), box=box.SIMPLE_HEAD)
        for column in table.columns[1:]:
            column.justify = "right"
        for heading, cell in _LINES:
            table.add_row(heading, *(cell(run) for run in some))
        console.print(table)


def _worst(name: str, digits: int = 0) -> Any:
    def cell(run: dict[str, Any]) -> str:
        found = run[name]
        return " / ".join(f"{found[one]:,.{digits}f}" for one in ("p50", "p99", "p99.9", "worst")) if found else "–"

    return cell


_LINES: tuple[tuple[str, Any], ...] = (
    ("steps measured", lambda run: f"{run['steps']:,}"),
    ("[b]steps that would have waited", lambda run: f"[b]{run['waited_share']:.3%}"),
    ("  with results that the simulation sent late", lambda run: f"{run['waited_share_as_seen']:.3%}"),
    ("devices idle for want of a plan", lambda run: f"{run['idle_share']:.3%}"),
    ("step, ms", lambda run: f"{run['step_ms']:.2f}"),
    ("tokens of a step", lambda run: f"{run['rows_in_use']:.1f}"),
    ("slack of plans, µs: p50 / p99 / p99.9 / worst", _worst("slack_us")),
    ("results sent late, µs: p50 / p99 / p99.9 / worst", _worst("result_late_us")),
    ("devices stood still as the simulation slept", lambda run: f"{run['stood_still_share']:.3%}"),
    ("tokens/s sampled", lambda run: f"{run['sampled_per_s']:,.0f}"),
    ("tokens/s delivered", lambda run: f"{run['delivered_per_s']:,.0f}"),
    ("messages/s to clients", lambda run: f"{run['client_messages_per_s']:,.0f}"),
    ("requests finished", lambda run: f"{run['requests_finished']:,}"),
    ("gap between a request's tokens, ms", _worst("gap_ms", 1)),
    ("first token after submission, ms", _worst("first_token_ms", 0)),
    ("cores: scheduler", lambda run: f"{run['cores']['scheduler']:.2f}"),
    ("cores: its main thread", lambda run: f"{run['cores']['scheduler_main_thread']:.2f}"),
    ("  wanted a core and had none", lambda run: f"{run['cores'].get('scheduler_main_thread_queued', math.nan):.2f}"),
    ("cores: simulated workers", lambda run: f"{run['cores']['simulated_workers']:.2f}"),
    ("cores: simulated clients", lambda run: f"{run['cores']['simulated_clients']:.2f}"),
    ("cores: processes of others, at least", lambda run: f"{max(0.0, run['cores']['others']):.2f}"),
    ("calibration loop before the run", lambda run: f"× {run['calibration_ratio']:.2f}"),
    ("priority of the simulated workers", lambda run: f"nice {run['workers_nice']}"),
)


def holds(runs: Sequence[dict[str, Any]]) -> bool | None:
    """Whether few enough steps would have waited: as the first run says if it is a good one, else as two of three do.
    None: more runs are needed."""
    good = sum(run["waited_share"] <= MOST_WAITED for run in runs)
    if good == 2 or (good == 1 and len(runs) == 1):
        return True
    return False if len(runs) - good == 2 else None


def show_knee(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    """What the sweep says in the end."""
    for num_workers in dict.fromkeys(run["workers"] for run in runs):
        here = [run for run in runs if run["workers"] == num_workers]
        shares = ", ".join(f"{run['waited_share']:.3%}" for run in here)
        verdict = "held" if holds(here) else "too many"
        console.print(
            f"{num_workers} workers, {num_workers * here[0]['rows']:,} streams, "
            f"{max(run['delivered_per_s'] for run in here):,.0f} tokens/s: {shares} of the steps would have waited; "
            f"at most {MOST_WAITED:.1%}: {verdict}",
            highlight=False,
        )
    console.print(_knee(runs), highlight=False)


def _knee(runs: Sequence[dict[str, Any]]) -> str:
    """How many streams one scheduler process carries, as a sentence."""
    counts = list(dict.fromkeys(run["workers"] for run in runs))
    held = [one for one in counts if holds([run for run in runs if run["workers"] == one])]
    rows = runs[0]["rows"]
    if not held:
        return f"Here one scheduler process does not carry {counts[0]} × {rows:,} streams."
    carried = f"Here one scheduler process carries {held[-1]} × {rows:,} = {held[-1] * rows:,} streams"
    return f"{carried}." if held == counts else f"{carried}, and {counts[-1]} × {rows:,} no more."


def show_profile(console: Console, stats: pstats.Stats) -> dict[str, list[dict[str, Any]]]:
    """Which functions took most of the scheduler's main thread, by their own time, and which of our own by their time
    with what they called; returns both lists."""
    found = [
        {
            "function": f"{_short(file)}:{line} {name}" if line else name,
            "calls": calls,
            "own_s": own,
            "with_callees_s": cumulative,
        }
        for (file, line, name), (_, calls, own, cumulative, _) in stats.stats.items()  # type: ignore[attr-defined]
    ]
    total = sum(one["own_s"] for one in found)
    of_ours = [one for one in found if one["function"].startswith(OURS)]
    by_own = sorted(found, key=lambda one: -one["own_s"])[:PROFILE_LINES]
    by_all = sorted(of_ours, key=lambda one: -one["with_callees_s"])[:PROFILE_LINES]
    console.print("profile of the scheduler's main thread, from its start to its end; waiting for sockets included")
    for title, lines in (("by own time", by_own), ("ours, with what they call", by_all)):
        table = Table("own time", "with callees", "calls", "function", box=box.SIMPLE_HEAD, title=title)
        for one in lines:
            shares = (f"{one['own_s'] / total:.1%}", f"{one['with_callees_s'] / total:.1%}")
            table.add_row(*shares, f"{one['calls']:,}", one["function"])
        console.print(table)
    return {"by_own_time": by_own, "ours_with_callees": by_all}


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])
