"""Runs a module as a child that cannot outlive its parent: `python -m tandem.launch.tether PARENT MODULE ARGUMENT…`.

The kernel sends SIGKILL when the thread that started the child ends, so even a launcher that was killed leaves no
process behind. The thread counts, not the process: whoever starts a tethered child keeps the starting thread alive.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import signal
import sys
from typing import NoReturn

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
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise  # a message for stderr, which Python prints
        leave(end.code or 0)


def leave(code: int) -> NoReturn:
    """Ends the process after exit handlers and flushes, but without taking the interpreter apart: with torch and
    transformers loaded that takes seconds, and the kernel does it at once."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
