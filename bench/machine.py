"""What a measurement was made on: a figure without it cannot be compared with another."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "triton", "flashinfer-python", "numpy", "pyzmq", "msgpack")


def describe_machine() -> dict[str, Any]:
    """GPU and driver (or processor), cores, Python, package versions and the checkout's commit."""
    return {
        "gpu": output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := package_version(name))},
        "commit": os.environ.get("TANDEM_COMMIT")
        or output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }


def package_version(name: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def output(*command: str) -> str | None:
    """A command's output; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
