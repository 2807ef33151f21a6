"""What a model writes, shown on a terminal: its text, and nothing that the terminal would take for a command."""

from __future__ import annotations

import errno
import io
import os
import sys

_CONTROLS = {code: "\ufffd" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Why stdout may refuse what is written, besides a reader that is gone."""


def prepare_stdio() -> None:
    """Makes stdin, stdout and stderr streams that can be used whatever the program was given.

    One that is closed becomes /dev/null, before a socket takes its number; characters that an encoding lacks are
    escaped, and bytes that are no text arrive as surrogates, which requests refuse by name.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """What was not written yet is given up, or Python would try once more when it ends."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)


def shown(text: str) -> str:
    """`text` with control characters, escape sequences among them, replaced by U+FFFD; line ends and tabs stay."""
    return text.translate(_CONTROLS)


def write_answer(text: str) -> None:
    """Writes a piece of an answer to stdout at once: as it is to a file or pipe, harmless to a terminal."""
    sys.stdout.write(shown(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
