"""What a step costs the scheduler, without sockets and other processes:

    python -m tandem.bench.scheduler core
    python -m tandem.bench.scheduler core --size 1024 --load steady --load churn --steps 2000 --out result.json

One worker with room for all rows, lookahead 1, blocks of 16 tokens, prefix cache on. Each step is timed in pieces, µs:

    intake    Submit messages of new requests: decoded by the client port and turned into events
    decode    the bytes of the worker's StepResult become a message
    handle    the core commits the tokens and plans the next step
    encode    the StepPlan becomes bytes
    deliver   the client port groups tokens by client and makes messages of them (real code, a socket that discards)

    step  =  handle + encode, "plan + commit + encode"

The garbage collector is set as in the scheduler process. A calibration loop runs before and after each case: its ratio
says how slow the machine was at that moment. Targets are held against the median as measured, not corrected by it.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ...scheduler.main import calm_collector
from ..machine import describe_machine
from .calibration import calibrate
from .drive import CLIENTS, Driver, Steps
from .loads import LOADS

SIZES = (64, 256, 1_024, 4_096)
WARM_UP_STEPS = 150
FILL_STEPS = 300
"""More than it takes until all rows run."""
MAX_MODEL_LEN = 8_192
TARGET_US = {64: 120.0, 256: 150.0, 1_024: 300.0, 4_096: 900.0}
"""Median of a step under steady decode."""
TARGET_BYTES = {1_024: 1_024}
"""p99 of a plan under steady decode."""
MOST_CHURN = 2.0
"""Times the steady step."""
LEAST_WIDTH = 140
"""Columns of the table where the output is no terminal."""


def measure(load_name: str, size: int, steps: int, clients: int, prefix_caching: bool) -> dict[str, Any]:
    """One case, as it goes into the report."""
    load = LOADS[load_name](size, steps + WARM_UP_STEPS + FILL_STEPS)
    before = calibrate()
    driver = Driver(load, MAX_MODEL_LEN, clients, prefix_caching)
    driver.warm_up(WARM_UP_STEPS)
    measured = driver.run(steps)
    after = calibrate()
    ratio = (before.ratio + after.ratio) / 2
    return {"load": load_name, "running": size, "calibration_ratio": ratio, **describe(measured)}


def describe(steps: Steps) -> dict[str, Any]:
    """Median, mean, p99 and worst of each column."""
    pieces = {**steps.pieces, "step": steps.step, "step_and_decode": steps.step + steps.pieces["decode"]}
    return {
        "us": {name: _distribution(column / 1e3) for name, column in pieces.items()},
        "plan_bytes": _distribution(steps.plan_bytes),
        "rows": float(steps.rows.mean()),
        "joined": float(steps.joined.mean()),
        "chunk_tokens": float(steps.chunk_tokens.mean()),
        "steps_with_chunks": float((steps.chunk_tokens > 0).mean()),
        "client_messages": float(steps.client_messages.mean()),
        "cached_share_of_prompts": steps.cached_share,
    }


def _distribution(column: Any) -> dict[str, float]:
    ordered = sorted(column.tolist())
    return {
        "median": statistics.median(ordered),
        "mean": statistics.fmean(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "worst": ordered[-1],
    }


def judge(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target that these cases can tell about, and whether it holds."""
    by_case = {(case["load"], case["running"]): case for case in cases}
    verdicts = []
    for (load, running), case in by_case.items():
        median = case["us"]["step"]["median"]
        if load == "steady":
            if running in TARGET_US:
                verdicts.append(_verdict(f"steady step at {running:,}, median µs", median, TARGET_US[running]))
            if running in TARGET_BYTES:
                size = case["plan_bytes"]["p99"]
                verdicts.append(_verdict(f"steady plan at {running:,}, p99 bytes", size, TARGET_BYTES[running]))
        steady = by_case.get(("steady", running))
        if load == "churn" and steady is not None:
            times = median / steady["us"]["step"]["median"]
            verdicts.append(_verdict(f"churn at {running:,}, times the measured steady step", times, MOST_CHURN))
            if running in TARGET_US:
                limit = MOST_CHURN * TARGET_US[running]
                verdicts.append(
                    _verdict(f"churn step at {running:,}, median µs, twice the steady target", median, limit)
                )
    return verdicts


def _verdict(what: str, measured: float, target: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "target": target, "holds": measured <= target}


def main(
    size: Annotated[list[int] | None, typer.Option(min=1, help="Running requests; may be given several times.")] = None,
    load: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(LOADS)}; several times for some.")] = None,
    steps: Annotated[int, typer.Option(min=10, max=3_000, help="Steps measured in each case.")] = 1_000,
    clients: Annotated[int, typer.Option(min=1, help="Clients that the requests are spread over.")] = CLIENTS,
    prefix_caching: Annotated[bool, typer.Option(help="Keep blocks of requests that ended.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure the scheduler's time for a step."""
    for name in load or ():
        if name not in LOADS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(LOADS)}", param_hint="--load")
    calm_collector()
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)
    console.print("µs a step, medians but where it says otherwise; step = handle + encode; cal.: calibration loop\n")
    cases = []
    calibration = calibrate()
    for name in load or LOADS:
        found = [measure(name, one, steps, clients, prefix_caching) for one in size or SIZES]
        _show(console, name, found)
        cases += found
    verdicts = judge(cases)
    _show_verdicts(console, verdicts)
    console.print(f"calibration loop {calibration.median_us:,.0f} µs, {calibration.ratio:.2f} × the reference machine")
    if out is not None:
        settings = {"steps": steps, "clients": clients, "prefix_caching": prefix_caching, "lookahead": 1}
        report = {"settings": settings, "calibration": calibration.report(), "cases": cases, "targets": verdicts}
        out.write_text(json.dumps({**report, "machine": describe_machine()}, indent=1) + "\n")


def _show(console: Console, name: str, cases: list[dict[str, Any]]) -> None:
    console.print(f"[b]{name}[/]: {LOADS[name].says}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (
        "running|rows|joined|chunk\ntokens|intake|decode|handle|encode|[b]step|[b]p99|step +\ndecode|deliver\nmean|p99|"
        "plan\nbytes|p99|cal."
    ).split("|"):
        table.add_column(heading, justify="right")
    for case in cases:
        us, size = case["us"], case["plan_bytes"]
        columns = [us[piece]["median"] for piece in ("intake", "decode", "handle", "encode", "step")]
        columns += [us["step"]["p99"], us["step_and_decode"]["median"], us["deliver"]["mean"], us["deliver"]["p99"]]
        columns += [size["median"], size["p99"]]
        table.add_row(
            f"{case['running']:,}",
            f"{case['rows']:,.0f}",
            f"{case['joined']:.2f}",
            f"{case['chunk_tokens']:,.0f}",
            *(f"{value:,.0f}" for value in columns),
            f"× {case['calibration_ratio']:.2f}",
        )
    console.print(table)


def _show_verdicts(console: Console, verdicts: list[dict[str, Any]]) -> None:
    if not verdicts:
        return
    table = Table("target", "at most", "measured", "holds")
    for one in verdicts:
        holds = "[green]yes[/]" if one["holds"] else "[red]no[/]"
        table.add_row(one["what"], f"{one['target']:,g}", f"{one['measured']:,.2f}", holds)
    console.print(table)
