"""Which process a process id means, and how many files this one may open."""

from __future__ import annotations

import os
import resource

from .errors import ServiceUnavailable


def started_at(pid: int) -> int:
    """When the process started, in clock ticks since the machine did; 0 if that cannot be found out.

    Together with the id it names one process: ids are used again, and mean others in another container.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # pid (name) state …; the name may hold anything, the start time is the 20th field after it.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def open_process(pid: int, started: int) -> int | None:
    """A descriptor (pidfd) that becomes readable when that very process ends. None if there is no process of this id
    that belongs to this user and started then: it has ended, runs on another machine or in another container, or the id
    was made up."""
    if not 0 < pid < 2**31 or not started:
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        # Looked at after it was opened: from here on the id cannot mean another process, unless this one has ended.
        if started_at(pid) == started and os.stat(f"/proc/{pid}").st_uid == os.getuid():
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def allow_files(count: int) -> None:
    """Raises this process's soft limit on open files to `count`, or as far towards it as the hard one lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(hard, count)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def require_files(count: int) -> None:
    """Raises ServiceUnavailable unless this process may open so many more files: ZeroMQ ends the whole process where it
    cannot open one."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        raise ServiceUnavailable(
            f"a connection needs {count} more open files, but after {len(opened)}: {error.strerror}; close some, or "
            "raise the limit on them (ulimit -n)"
        ) from error
    finally:
        for fd in opened:
            os.close(fd)
