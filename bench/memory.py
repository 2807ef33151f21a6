"""The memory of a system's processes while a load runs: resident, and on the GPU."""

from __future__ import annotations

import asyncio
import os
import time

import numpy as np

from .machine import output
from .processes import command_line, descendants, resident_bytes

SAMPLE_S = 0.5
"""Between two readings of the processes' memory."""
GPU_SAMPLE_S = 5.0
MEBI = 1 << 20
TETHER = "tandem.launch.tether"
"""What runs each process's module, so that it ends with its parent."""


class Memory:
    """Resident memory of this process (the client) and of all that it has started, read every SAMPLE_S; what these
    have on GPUs, every GPU_SAMPLE_S, if `gpu`."""

    def __init__(self, *, gpu: bool = False) -> None:
        self.readings: dict[str, list[tuple[float, int]]] = {}
        """By process: seconds since the beginning, bytes."""
        self._names = {os.getpid(): "client"} | {pid: _name(pid) for pid in descendants(os.getpid())}
        self._began = time.monotonic()
        self._gpu = gpu

    async def watch(self) -> None:
        """Until it is cancelled."""
        if self._gpu:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch_resident())
                group.create_task(self._watch_gpu())
        else:
            await self._watch_resident()

    async def _watch_resident(self) -> None:
        while True:
            for pid, name in self._names.items():
                try:
                    size = resident_bytes(pid)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                self._read(f"{name} ({pid})", size)
            await asyncio.sleep(SAMPLE_S)

    async def _watch_gpu(self) -> None:
        query = ("nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
        while True:
            for line in (await asyncio.to_thread(output, *query) or "").splitlines():
                pid, mebibytes = (part.strip() for part in line.split(","))
                if int(pid) in self._names and mebibytes.isdigit():
                    self._read(f"{self._names[int(pid)]} ({pid}), GPU", int(mebibytes) * MEBI)
            await asyncio.sleep(GPU_SAMPLE_S)

    def _read(self, name: str, size: int) -> None:
        self.readings.setdefault(name, []).append((time.monotonic() - self._began, size))

    def report(self) -> dict[str, dict[str, float]]:
        """For each process MiB at the beginning, halfway and at the end, and how many a minute the second half's
        straight line rises."""
        found = {}
        for name, readings in self.readings.items():
            times, sizes = np.array(readings).T
            second = times >= times[-1] / 2
            rise = np.polyfit(times[second], sizes[second] / MEBI, 1)[0] if second.sum() > 1 else 0.0
            found[name] = {
                "first_mib": round(sizes[0] / MEBI, 1),
                "half_mib": round(sizes[second][0] / MEBI, 1),
                "last_mib": round(sizes[-1] / MEBI, 1),
                "second_half_mib_per_minute": round(60 * float(rise), 2),
            }
        return found


def _name(pid: int) -> str:
    modules = [word for word in command_line(pid) if word.startswith("tandem.") and word != TETHER]
    return modules[0].removeprefix("tandem.").removesuffix(".main") if modules else "helper"
