"""What a model writes, shown on a terminal: its text, and nothing that the terminal would take for a command."""

from __future__ import annotations

import sys

_CONTROLS = {code: "\ufffd" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


def shown(text: str) -> str:
    """`text` with control characters, escape sequences among them, replaced by U+FFFD; line ends and tabs stay."""
    return text.translate(_CONTROLS)


def write_answer(text: str) -> None:
    """Writes a piece of an answer to stdout at once: as it is to a file or pipe, harmless to a terminal."""
    sys.stdout.write(shown(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
