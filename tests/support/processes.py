"""Waiting for processes that are not our children."""

import os
import select

from support.deadlines import DEADLINE_S


def wait_until_gone(pid: int, deadline_s: float = DEADLINE_S) -> None:
    """Blocks until the process has ended; raises TimeoutError if it lives on."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([pidfd], [], [], deadline_s)[0]:
            raise TimeoutError(f"process {pid} still lives after {deadline_s:g} s")
    finally:
        os.close(pidfd)
