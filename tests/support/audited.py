"""Runs a module of ours under an audit hook: `python -m support.audited LOG STRICT MODULE ARGUMENT…`.

Writes a line to the file LOG for everything that must never happen: from the beginning, unpickling, shells and new
processes; once a file STRICT exists, also turning text or bytes into code, and loading a module or a library.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback

NEVER = ("pickle.find_class", "os.system", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "pty.spawn")
NOT_ONCE_STRICT = ("subprocess.Popen", "exec", "compile", "marshal.loads", "code.__new__", "import", "ctypes.dlopen")


def install(log: str, strict: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in NEVER or (event in NOT_ONCE_STRICT and os.path.exists(strict)):
            where = "".join(traceback.format_stack(limit=8)[:-1])
            os.write(descriptor, f"{event} {arguments!r:.200}\n{where}\n".encode())

    sys.addaudithook(hook)


if __name__ == "__main__":
    log, strict, module, *rest = sys.argv[1:]
    install(log, strict)
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
