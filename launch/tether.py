"""Runs a module as a child that cannot outlive its parent: `python -m tandem.launch.tether PARENT MODULE ARGUMENT…`.

The kernel sends SIGKILL when the thread that started the child ends, so even a launcher that was killed leaves no
process behind. The thread counts, not the process: whoever starts a tethered child keeps the starting thread alive.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def command(module: str, arguments: list[str]) -> list[str]:
    """The command line that runs `module` tethered to the calling process. -P: the working directory is no place to
    import from."""
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), module, *arguments]


def main() -> None:
    """Ties this process to its parent and becomes the module."""
    parent, module, *arguments = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):
        sys.exit(1)  # the parent ended before the tie was made
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
