"""`tandem stats`: a running service's figures, once or over and over."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from ..client import Client
from ..client.stats import Histogram, Stats, WorkerStats
from .connect import running
from .signals import ending_interrupts
from .tables import some, wide_console
from .terminal import shown

CONNECT_S = 10.0
PLAIN_WIDTH = 160
"""Columns where no terminal says how many there are."""
_LATENCIES = {
    "time to first token": "time_to_first_token_seconds",
    "between tokens": "inter_token_latency_seconds",
    "waiting for a place": "request_queue_time_seconds",
    "whole request": "e2e_request_latency_seconds",
    "planning a step": "plan_time_seconds",
}


def stats(
    connect: str | None,
    *,
    keys: str | None = None,
    insecure: bool = False,
    watch: bool,
    interval_s: float,
    as_json: bool,
) -> None:
    """Prints the figures of the service that `connect` names (default: this user's); with `watch` every `interval_s`
    seconds until Ctrl-C, and then rates and shares are those of the time since the last reading."""
    target = running(connect, keys, insecure)
    with (
        ending_interrupts(once=True) as ending,
        Client(target.address, keys=keys, insecure=insecure, connect_timeout=CONNECT_S, name="tandem stats") as client,
    ):
        try:
            if watch:
                _watch(client, interval_s, as_json)
            else:
                _show_once(client, as_json)
        except KeyboardInterrupt:
            ending.is_last = True


def _show_once(client: Client, as_json: bool) -> None:
    found = client.stats()
    if as_json:
        print(json.dumps(as_plain(found)), flush=True)
    else:
        wide_console(PLAIN_WIDTH).print(picture(client.model.name, found, None, 0.0))


def _watch(client: Client, interval_s: float, as_json: bool) -> None:
    console, before, at = wide_console(PLAIN_WIDTH), None, 0.0
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            found, now = client.stats(), time.monotonic()
            if as_json:
                print(json.dumps(as_plain(found)), flush=True)
            elif console.is_terminal:
                live.update(picture(client.model.name, found, before, now - at), refresh=True)
            else:
                console.print(picture(client.model.name, found, before, now - at))
            before, at = found, now
            time.sleep(interval_s)


def as_plain(value: Any) -> Any:
    """A message as what JSON knows; columns as lists."""
    if is_dataclass(value):
        return {field.name: as_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [as_plain(one) for one in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def picture(model: str, found: Stats, before: Stats | None, seconds: float) -> RenderableType:
    """Tables of a reading; with the reading `before`, `seconds` earlier, what happened since."""
    if before is not None and before.epoch != found.epoch:
        before = None  # the scheduler has been started again
    return Group(_service(model, found, before, seconds), _workers(found, before), _latencies(found, before))


def _service(model: str, found: Stats, before: Stats | None, seconds: float) -> Table:
    over = found.uptime_s if before is None else seconds
    generated = found.generation_tokens - (before.generation_tokens if before else 0)
    prompts = found.prompt_tokens - (before.prompt_tokens if before else 0)
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{shown(model)}, up {found.uptime_s:,.0f} s, {some(found.clients, 'client')}",
        "requests": f"{found.running} running, {found.waiting} waiting",
        "ended": _kinds(found.finished) or "none",
        "refused": _kinds(found.refusals) or "none",
        "tokens": f"{found.prompt_tokens:,} of prompts, {found.generation_tokens:,} generated; "
        + (f"{prompts / over:,.1f}/s and {generated / over:,.1f}/s" if over > 0 else "")
        + ("" if before else " on average"),
        "prefix cache": f"{_share(found.cached_tokens, found.looked_up_tokens)} hits, {found.evicted_blocks:,} blocks "
        f"given away; {found.preemptions:,} preemptions",
        "workers": f"{found.joined_workers} joined, {found.lost_workers} lost, {found.restarted_workers} restarted; "
        f"{found.moved} attempts moved, {found.resumptions} resumptions",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _workers(found: Stats, before: Stats | None) -> Table:
    table = Table("worker", "state", "running", "KV used", "in flight", "steps", "step p50", "gap p50", "gap p99")
    table.add_column("idle" if before else "idle (all)")
    table.add_column("of the floor")
    earlier = {worker.registration: worker for worker in before.workers} if before else {}
    for worker in found.workers:
        then = earlier.get(worker.registration)
        busy, gap = (_since(worker, then, name) for name in ("busy_us", "gap_us"))
        decode, floor = (_since(worker, then, name) for name in ("decode_busy_us", "decode_floor_us"))
        was = then.histograms if then else ()
        step = _between(worker.histograms, was, "step_time_seconds")
        gaps = _between(worker.histograms, was, "step_gap_seconds")
        table.add_row(
            shown(worker.name),
            worker.state,
            f"{worker.running}",
            f"{1 - worker.free_blocks / max(1, worker.num_blocks):.1%}",
            f"{worker.in_flight} of {worker.lookahead + 1}",
            f"{worker.steps:,}",
            *(_ms(value) for value in (quantile(step, 0.5), quantile(gaps, 0.5), quantile(gaps, 0.99))),
            _share(gap, busy + gap),
            _share(floor, decode) if floor else "–",
        )
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _latencies(found: Stats, before: Stats | None) -> Table:
    table = Table("ms", "count", "mean", "p50", "p90", "p99")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, name in _LATENCIES.items():
        one = _between(found.histograms, before.histograms if before else (), name)
        if one is None:
            continue
        count = int(one.counts.sum())
        mean = one.total / count if count else None
        table.add_row(title, f"{count:,}", _ms(mean), *(_ms(quantile(one, share)) for share in (0.5, 0.9, 0.99)))
    return table


def _since(worker: WorkerStats, then: WorkerStats | None, name: str) -> int:
    return int(getattr(worker, name)) - (int(getattr(then, name)) if then else 0)


def _between(after: Sequence[Histogram], before: Sequence[Histogram], name: str) -> Histogram | None:
    """What a histogram got between two readings; all of it without an earlier one."""
    now = next((one for one in after if one.name == name), None)
    then = next((one for one in before if one.name == name), None)
    if now is None or then is None:
        return now
    return Histogram(name=name, bounds=now.bounds, counts=now.counts - then.counts, total=now.total - then.total)


def quantile(histogram: Histogram | None, share: float) -> float | None:
    """About the value that `share` of the observations are not above, as Prometheus estimates it: evenly spread within
    a bucket. None without observations."""
    if histogram is None or not histogram.counts.sum():
        return None
    cumulated = np.cumsum(histogram.counts)
    at = int(np.searchsorted(cumulated, share * cumulated[-1]))
    if at >= len(histogram.bounds):
        return histogram.bounds[-1]
    low = histogram.bounds[at - 1] if at else 0.0
    below = int(cumulated[at - 1]) if at else 0
    part = (share * int(cumulated[-1]) - below) / int(histogram.counts[at])
    return low + (histogram.bounds[at] - low) * part


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {shown(kind)}" for kind, count in sorted(counts.items()))


def _share(part: float, of: float) -> str:
    return f"{part / of:.2%}" if of else "–"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:,.2f}"
