"""What a test may not leave behind: threads, child processes, open file descriptors.

`snapshot()` before, `leaked(before, deadline_s)` after. Threads and processes are waited for with their own events
(join, wait); file descriptors have no event, so they are looked at again until the deadline. `end_descendants(before)`
is for what a failed test has left.
"""

import contextlib
import gc
import os
import threading
import time
from dataclasses import dataclass

import psutil

from support.deadlines import DEADLINE_S

# Opened once by a library on first use and kept for the life of the process; by what /proc/self/fd says of them.
KEPT_FILES = ("/dev/nvidia", "/dev/urandom", "/dev/null", "/proc/", "/sys/", "anon_inode:[io_uring]")
# tqdm starts one monitor thread for the whole process with its first bar.
KEPT_THREADS = ("TMonitor",)

MARK = "TANDEM_TEST_PROCESS"
"""Environment variable of all descendants: the pid of the process that runs the tests."""


@dataclass(frozen=True)
class Snapshot:
    """Threads by identity, children by (pid, start time), file descriptors by (number, target)."""

    threads: frozenset[threading.Thread]
    children: frozenset[psutil.Process]
    files: frozenset[tuple[int, str]]


def snapshot() -> Snapshot:
    """What the process holds now."""
    return Snapshot(
        threads=frozenset(t for t in threading.enumerate() if type(t).__name__ not in KEPT_THREADS),
        children=frozenset(psutil.Process().children(recursive=True)),
        files=frozenset(_open_files()),
    )


def leaked(before: Snapshot, deadline_s: float, *, check_files: bool = True) -> list[str]:
    """What came to be since `before` and is still there `deadline_s` seconds from now, one line each; [] is clean."""
    end = time.monotonic() + deadline_s
    now = snapshot()
    for thread in now.threads - before.threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, end - time.monotonic()))
    psutil.wait_procs(list(now.children - before.children), timeout=max(0.0, end - time.monotonic()))

    now = snapshot()
    if check_files and now.files - before.files:
        gc.collect()  # a socket or file in a reference cycle is not a leak
        never = threading.Event()
        while (now := snapshot()).files - before.files and time.monotonic() < end:
            never.wait(0.01)

    found = [f"thread {t.name!r} ({type(t).__name__}) still runs" for t in now.threads - before.threads]
    found += [f"child process {_describe(p)} still exists" for p in now.children - before.children]
    if check_files:
        found += [f"file descriptor {fd} is still open: {target}" for fd, target in sorted(now.files - before.files)]
    return found


def mark_descendants() -> None:
    """Lets `end_descendants` know the processes that this one starts from now on, and those that they start."""
    os.environ[MARK] = str(os.getpid())


def end_descendants(before: Snapshot) -> None:
    """Kills every process that descends from this one, also those whose parents are gone, except those that were there
    `before` and theirs. Returns when they are gone."""
    spared = {psutil.Process(), *before.children}
    for process in before.children:
        with contextlib.suppress(psutil.NoSuchProcess):
            spared.update(process.children(recursive=True))
    doomed = [one for one in psutil.process_iter() if one not in spared and _is_marked(one)]
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(doomed, timeout=DEADLINE_S)


def _is_marked(process: psutil.Process) -> bool:
    try:
        return process.environ().get(MARK) == str(os.getpid())
    except psutil.Error:  # gone, or not ours
        return False


def _open_files() -> list[tuple[int, str]]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the descriptor that listed the directory
        if not target.startswith(KEPT_FILES):
            found.append((int(name), target))
    return found


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({process.status()}: {' '.join(process.cmdline())[:200]})"
    except psutil.NoSuchProcess:
        return f"{process.pid} (gone meanwhile)"
