"""`tandem doctor`: what is installed, what a service with these options would use and why, and what stands in its
way."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bench.machine import output, package_version
from ..protocol.errors import ConfigurationError
from ..protocol.transport import Address, default_address, require_private
from ..scheduler.connections import OPEN_FILES
from ..worker.config import WorkerConfig
from .config import Options
from .connect import answers
from .system import place_workers, visible_gpus
from .tables import some, wide_console

PROBE_S = 600.0
"""Importing torch and transformers from a slow disk, and fetching a config from the hub."""
FEW_FILES = 4_096
"""Open files from which on a scheduler takes some two thousand connections."""
LITTLE_SHM = 64 << 20
REQUIRED = ("torch", "transformers", "numpy", "pyzmq", "msgpack", "uvloop", "pydantic", "tokenizers", "llguidance")
OPTIONAL = {
    "fastapi": "the HTTP gateway: pip install 'tandem-serve[http]'",
    "uvicorn": "the HTTP gateway: pip install 'tandem-serve[http]'",
    "prometheus-client": "/metrics: pip install 'tandem-serve[http]'",
    "flashinfer-python": "attention on CUDA in 16 bits: pip install 'tandem-serve[cuda]'",
    "triton": "our kernels and compiled models on CUDA; comes with torch for CUDA",
    "matplotlib": "pictures of benchmarks: pip install 'tandem-serve[bench]'",
}
NEED_CUDA = ("flashinfer-python", "triton")

Level = Literal["ok", "note", "warning", "problem"]
_MARKS: dict[Level, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "problem": ("problem", "red"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report. A `problem` keeps a service with these options from starting; a `warning` is worth mending;
    a `note` tells what is missing and maybe not missed."""

    topic: str
    says: str
    level: Level = "ok"


def doctor(worker_options: Options, *, as_json: bool) -> int:
    """Prints the report; returns the exit code: 1 if there is a problem, else 0. Raises ConfigurationError for options
    that are no options."""
    (place,) = place_workers(worker_options, 1, "ipc:///unused")
    console = Console(stderr=True, highlight=False)
    with console.status("looking around (torch takes some seconds) ..."):
        probed = _probe(place.config)
        found = [*_software(bool(probed.get("gpus"))), *_machine(probed), *_sockets(), *_plan(place.config, probed)]
    if as_json:
        print(json.dumps({"findings": [asdict(one) for one in found], "probe": probed}, indent=1), flush=True)
    else:
        _show(found)
    return int(any(one.level == "problem" for one in found))


def _show(found: list[Finding]) -> None:
    console = wide_console(160)
    table = Table.grid(padding=(0, 2))
    for one in found:
        word, colour = _MARKS[one.level]
        table.add_row(Text(word, style=colour), one.topic, Text(one.says))
    console.print(table)
    counts = {level: sum(one.level == level for one in found) for level in ("problem", "warning")}
    if counts["problem"]:
        console.print(f"\n{some(counts['problem'], 'problem')}: a service with these options would not start.")
    elif counts["warning"]:
        console.print(f"\nA service with these options would start; {some(counts['warning'], 'warning')}.")
    else:
        console.print("\nA service with these options would start.")


# --- what is there ----------------------------------------------------------------------------------------------------


def _software(has_gpu: bool) -> Iterator[Finding]:
    yield Finding(
        "tandem", f"{package_version('tandem-serve') or 'not installed, run from a source tree'}, {_python()}"
    )
    have = {name: package_version(name) for name in REQUIRED}
    missing = [name for name, found in have.items() if found is None]
    yield Finding("packages", ", ".join(f"{name} {found}" for name, found in have.items() if found))
    if missing:
        yield Finding("packages", f"missing: {', '.join(missing)}; install tandem-serve again", "problem")
    for name, purpose in OPTIONAL.items():
        found = package_version(name)
        if found is not None:
            yield Finding(name, found)
        elif has_gpu or name not in NEED_CUDA:
            yield Finding(name, f"not installed; it is for {purpose}", "warning" if name in NEED_CUDA else "note")


def _python() -> str:
    return f"Python {platform.python_version()} on {platform.system()} {platform.release()}"


def _machine(probed: dict[str, Any]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding(
        "processor",
        f"{some(cores, 'core')}, {_memory() / 2**30:.1f} GiB of memory",
        "ok" if cores > 1 else "warning",
    )
    drivers = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")  # a line for each GPU
    driver = None if drivers is None else drivers.splitlines()[0]
    for index, gpu in enumerate(probed.get("gpus", ())):
        size = f"{gpu['memory'] / 2**30:.1f} GiB"
        rest = f"compute capability {gpu['capability']}, driver {driver or 'unknown'}"
        yield Finding(f"GPU {index}", f"{gpu['name']}, {size}, {rest}")
    if not probed.get("gpus"):
        yield _no_gpu(probed, driver)
    else:
        yield from _compilers()
    yield _shared_memory()


def _no_gpu(probed: dict[str, Any], driver: str | None) -> Finding:
    """Why there is no GPU to be used: none is there, or torch and the driver do not get on."""
    if not driver and not visible_gpus():
        return Finding("GPU", "none; models run on the processor", "note")
    torch = f"torch {probed.get('torch')}"
    if probed.get("cuda") is None:
        return Finding("GPU", f"one is there, but {torch} is built without CUDA; install torch for CUDA", "warning")
    said = f" ({probed['cuda_said']})" if probed.get("cuda_said") else ""
    return Finding(
        "GPU",
        f"one is there, but {torch} for CUDA {probed['cuda']} cannot use it with driver {driver or 'unknown'}{said}; "
        "update the driver, or look at CUDA_VISIBLE_DEVICES",
        "warning",
    )


def _compilers() -> Iterator[Finding]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or next(
        (str(path) for path in (Path(home or "/usr/local/cuda", "bin", "nvcc"),) if path.is_file()), None
    )
    if nvcc:
        yield Finding("nvcc", nvcc)
    else:
        yield Finding(
            "nvcc",
            "not found; FlashInfer compiles kernels with it on first use (set CUDA_HOME, or install the CUDA toolkit)",
            "warning",
        )
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler:
        yield Finding("C compiler", compiler)
    else:
        yield Finding("C compiler", "not found; without one models run uncompiled and without CUDA graphs", "warning")


def _shared_memory() -> Finding:
    try:
        there = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", f"cannot be looked at: {error.strerror}", "warning")
    size = there.f_frsize * there.f_blocks
    text = f"{size / 2**20:,.0f} MiB"
    if size <= LITTLE_SHM:
        return Finding("/dev/shm", f"{text}; some libraries of CUDA need more (docker run --shm-size=1g)", "warning")
    return Finding("/dev/shm", text)


def _sockets() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if most < FEW_FILES:
        advice = f"; each client takes one of a scheduler, so raise the hard limit (ulimit -Hn {OPEN_FILES}, as root)"
        yield Finding("open files", f"at most {most}{advice}", "warning")
    else:
        yield Finding("open files", f"a scheduler may have {most:,}")
    try:
        address = default_address()
        yield _service_at(address)
    except ConfigurationError as error:
        yield Finding("address", str(error), "problem")


def _service_at(address: Address) -> Finding:
    """What is at the address that commands use by default. Raises ConfigurationError if it is no good."""
    if not address.is_ipc:
        return Finding("address", f"{address.url}, from $TANDEM_ADDRESS")
    address.endpoint("clients")  # whose length has a limit
    if address.directory.exists():
        require_private(address.directory)
        if answers(address):
            return Finding("address", f"{address.url}, where a service runs now")
    return Finding("address", f"{address.url}, where no service runs now")


# --- what would be used -----------------------------------------------------------------------------------------------


def _probe(config: WorkerConfig) -> dict[str, Any]:
    """What the worker's own code says; see worker/probe.py."""
    command = [sys.executable, "-P", "-m", "tandem.worker.probe", "--config-json", config.model_dump_json()]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"looking at the model took over {PROBE_S:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        return {"problem": f"looking at the model failed: {last}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _plan(config: WorkerConfig, probed: dict[str, Any]) -> Iterator[Finding]:
    if "device" in probed:
        yield Finding("device", f"{probed['device']} (--device {config.device})")
    if "architecture" in probed:
        yield from _model(config, probed)
    if "problem" in probed:
        yield Finding("options", probed["problem"], "problem")


def _model(config: WorkerConfig, probed: dict[str, Any]) -> Iterator[Finding]:
    gib = 2**30
    weights = probed["weight_bytes"] / gib
    kept = " in 8 bits" if config.quantization else ""
    yield Finding(
        "model",
        f"{config.served_model_name or config.model}: {probed['architecture']}, {probed['layers']} layers, "
        f"{probed['dtype']}, {weights:.2f} GiB of weights{kept}, context of {probed['max_model_len']:,} tokens",
    )
    why = probed["why_not_flashinfer"]
    yield Finding("attention", probed["attention_backend"] + (f": not FlashInfer, because {why}" if why else ""))
    if "num_blocks" in probed:
        yield from _memory_of(config, probed)
    yield Finding(
        "steps",
        f"up to {config.max_num_seqs} requests and {config.max_num_batched_tokens:,} tokens, {config.lookahead} queued "
        f"ahead; {'compiled' if probed['compiles'] else 'operation by operation'}"
        f"{', in CUDA graphs' if probed['captures'] else ''}",
    )


def _memory_of(config: WorkerConfig, probed: dict[str, Any]) -> Iterator[Finding]:
    blocks, size, gib = probed["num_blocks"], config.block_size, 2**30
    tokens, cache = blocks * size, blocks * probed["block_bytes"] / gib
    about = (
        "at most (the rest is measured at start: what the largest step takes) " if probed["measured_at_start"] else ""
    )
    full = tokens // probed["max_model_len"]
    yield Finding(
        "KV cache",
        f"{about}{blocks:,} blocks of {size} tokens in {probed['kv_dtype']}, {cache:.2f} GiB: {tokens:,} tokens, or "
        f"{some(full, 'request')} of full length",
        "ok" if full > 1 else "warning",
    )
    needed = probed["weight_bytes"] + blocks * probed["block_bytes"]
    if probed["device"] == "cpu" and needed > _memory():
        there = f"this machine has {_memory() / gib:.1f} GiB"
        yield Finding("memory", f"weights and KV cache take {needed / gib:.1f} GiB, and {there}", "problem")


def _memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
