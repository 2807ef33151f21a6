"""How many workers and streams one scheduler process carries before a GPU would wait:

    python -m tandem.bench.scheduler cluster --workers 4 --rows 256 --step-ms 12 --clients 256 --seconds 20
    python -m tandem.bench.scheduler cluster --step-ms 12 --sweep --profile --out result.json

The real scheduler process, simulated workers and simulated clients speak the real protocol over real sockets, all on
this machine. Each worker runs `rows` requests; slightly more are open, so that a slot is taken again at once. A step
takes as long as one on an H200 would (step_time.py), or `--step-ms`. A step *would have waited* if its plan came after
the end of the step before; timeline.py says how that is told on processors that the simulation shares with the
scheduler.

Needs psutil (the `test` extra).
"""

from __future__ import annotations

import json
import math
import pstats
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

from ...launch.child import ChildSpec
from ...launch.directory import PrivateDirectory
from ...launch.supervisor import PassThrough, Supervisor
from ...protocol.transport import Address
from ...scheduler.config import SchedulerConfig
from ..machine import describe_machine
from ..observer import Observer
from . import clients as clients_module
from . import workers as workers_module
from .calibration import calibrate
from .party import Party
from .report import holds, show_knee, show_profile, show_runs, summarise
from .setup import MAX_MODEL_LEN, Setup

READY_S = 60.0
REPORT_S = 30.0
WORKERS = 4
SWEEP = (1, 2, 4, 8, 16)


@contextmanager
def scheduler(address: str, options: dict[str, Any], profile: Path | None) -> Iterator[psutil.Process]:
    """The real process, as the launcher starts it."""
    config = SchedulerConfig.model_validate({"log_level": "warning", **options, "address": address})
    arguments = ["--config-json", config.model_dump_json()]
    module = "tandem.scheduler.main"
    if profile is not None:
        module, arguments = "tandem.bench.scheduler.profiled", [str(profile), *arguments]
    before = {child.pid for child in psutil.Process().children()}
    supervisor = Supervisor(PassThrough())
    try:
        supervisor.start(ChildSpec("scheduler", module, arguments))
        supervisor.wait_ready("scheduler", READY_S)
        (process,) = (child for child in psutil.Process().children() if child.pid not in before)
        yield process
        if supervisor.death is not None:
            raise supervisor.death
    finally:
        supervisor.stop()


def run_once(setup: Setup, num_workers: int, profile: Path | None = None) -> dict[str, Any]:
    """One cluster from start to end; returns what was measured in its window."""
    ratio = calibrate().ratio
    with ExitStack() as opened:
        directory = PrivateDirectory()
        opened.callback(directory.close)
        address = f"ipc://{directory.path}"
        process = opened.enter_context(scheduler(address, setup.scheduler_options, profile))
        worker_parties = [
            opened.enter_context(Party(workers_module.__name__, asdict(one)))
            for one in setup.worker_settings(Address(address).endpoint("workers"), num_workers)
        ]
        for party in worker_parties:
            party.hear("ready", READY_S)
        client_parties = [
            opened.enter_context(Party(clients_module.__name__, asdict(one)))
            for one in setup.client_settings(Address(address).endpoint("clients"), num_workers)
        ]
        for party in client_parties:
            party.hear("ready", READY_S)
        for party in client_parties:
            party.tell("open")
        _await_load(address, num_workers * setup.rows)
        time.sleep(setup.warm_up_s)
        before = _usage(process)
        for party in (*worker_parties, *client_parties):
            party.tell("begin")
        time.sleep(setup.seconds)
        usage = _difference(before, _usage(process))
        for party in (*worker_parties, *client_parties):
            party.tell("end")
        of_workers = [party.hear("report", REPORT_S) for party in worker_parties]
        of_clients = [party.hear("report", REPORT_S) for party in client_parties]
    return {"calibration_ratio": ratio, **summarise(num_workers, setup.rows, usage, of_workers, of_clients)}


def _await_load(address: str, rows: int) -> None:
    """Until nearly all rows of all workers are taken."""
    observer = Observer(address)
    try:
        observer.wait_until(lambda stats: stats.running >= 0.95 * rows)
    finally:
        observer.close()


def _usage(process: psutil.Process) -> dict[str, float]:
    """Processor seconds so far: of the scheduler, of its main thread alone, of all processes that are not ours."""
    threads = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    times = process.cpu_times()
    return {
        "at": time.monotonic(),
        "scheduler": times.user + times.system,
        "scheduler_main_thread": threads.get(process.pid, 0.0),
        "scheduler_main_thread_queued": _queued_s(process.pid),
        "others": _others_s(),
    }


def _others_s() -> float:
    """With their children that have ended; those that nobody has waited for are missing."""
    me = psutil.Process()
    ours = {me.pid, *(child.pid for child in me.children(recursive=True))}
    total = 0.0
    for process in psutil.process_iter(["cpu_times"]):
        times = process.info["cpu_times"]
        if process.pid not in ours and times is not None:
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _queued_s(pid: int) -> float:
    """How long a process's main thread has been ready to run in all while others had the processors; NaN if the system
    does not say."""
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return math.nan


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Cores in use on the average; without what the system does not tell."""
    seconds = after["at"] - before["at"]
    cores = {name: (after[name] - before[name]) / seconds for name in before if name != "at"}
    return {name: value for name, value in cores.items() if not math.isnan(value)}


def main(
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=256, show_default="4")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that run on each worker.")] = 256,
    step_ms: Annotated[float | None, typer.Option(min=0.1, help="Length of every step; else as on an H200.")] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Each with a connection of its own.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.1, help="Measured, after the warm-up.")] = 20.0,
    warm_up: Annotated[float, typer.Option(min=0.0, help="Seconds under full load before.")] = 4.0,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    least_output: Annotated[int, typer.Option(min=1, help="Tokens of the shortest answers.")] = 200,
    most_output: Annotated[int, typer.Option(min=1, help="Tokens of the longest answers.")] = 400,
    lookahead: Annotated[int, typer.Option(min=0, max=8, help="Plans that a worker holds beyond the running one.")] = 1,
    worker_processes: Annotated[int, typer.Option(min=1, help="That the workers are spread over.")] = 1,
    client_processes: Annotated[int, typer.Option(min=1, help="That the clients are spread over.")] = 2,
    high_priority: Annotated[bool, typer.Option(help="Ask for high priority for the simulated workers.")] = True,
    scheduler_json: Annotated[str, typer.Option(help="More fields of SchedulerConfig, as a JSON object.")] = "{}",
    sweep: Annotated[bool, typer.Option(help="1, 2, 4, 8, 16 workers, until GPUs would wait.")] = False,
    profile: Annotated[
        bool,
        typer.Option(
            help="Run the scheduler under cProfile, which slows it, and show it; after a sweep, in one more run with "
            "the most workers that it came to."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Load one scheduler process with simulated workers and clients."""
    if least_output > most_output or prompt_tokens + most_output > MAX_MODEL_LEN:
        raise typer.BadParameter(f"prompt and output must fit into {MAX_MODEL_LEN} tokens, and least ≤ most output")
    if sweep and workers is not None:
        raise typer.BadParameter("a sweep has its own numbers of workers: leave --workers out", param_hint="--workers")
    setup = Setup(
        rows=rows,
        step_s=None if step_ms is None else step_ms / 1e3,
        clients=clients,
        seconds=seconds,
        warm_up_s=warm_up,
        prompt_tokens=prompt_tokens,
        least_output=least_output,
        most_output=most_output,
        lookahead=lookahead,
        worker_processes=worker_processes,
        client_processes=client_processes,
        high_priority=high_priority,
        scheduler_options=json.loads(scheduler_json),
    )
    console = Console()
    report: dict[str, Any] = {"settings": asdict(setup), "step_time": asdict(setup.step_time)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile" if profile else None
        if sweep:
            report["runs"] = _sweep(setup, console)
            if file is not None:
                console.print("profile …")
                report["profiled_run"] = run_once(setup, report["runs"][-1]["workers"], file)
        else:
            report["runs"] = [run_once(setup, workers or WORKERS, file)]
        show_runs(console, report["runs"])
        if sweep:
            show_knee(console, report["runs"])
        if file is not None:
            report["profile"] = show_profile(console, pstats.Stats(str(file)))
    if out is not None:
        out.write_text(json.dumps({**report, "machine": describe_machine()}, indent=1) + "\n")


def _sweep(setup: Setup, console: Console) -> list[dict[str, Any]]:
    """Twice as many workers each time, until too many steps would have waited. Another program may have been in the
    way, so two runs of three decide."""
    runs: list[dict[str, Any]] = []
    for num_workers in SWEEP:
        here: list[dict[str, Any]] = []
        while (verdict := holds(here)) is None:
            console.print(f"{num_workers} workers …")
            here.append(run_once(setup, num_workers))
        runs += here
        if not verdict:
            break
    return runs
