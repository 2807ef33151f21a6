"""`tandem chat`: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..client import Client
from .config import Options
from .connect import Service
from .dialogue import Dialogue, hold
from .signals import Ending


def chat(*, connect: str | None, worker_options: Options, sampling: Mapping[str, Any], system: str | None) -> None:
    """Answers messages from stdin, one a line, until its end."""
    hold(
        lambda client, target, ending: _Conversation(client, target, ending, sampling, system),
        name="tandem chat",
        connect=connect,
        worker_options=worker_options,
        sampling=sampling,
    )


class _Conversation(Dialogue):
    """Each answer follows the messages so far."""

    HELP = "Enter sends, /reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer."

    def __init__(
        self, client: Client, target: Service, ending: Ending, sampling: Mapping[str, Any], system: str | None
    ) -> None:
        super().__init__(client, target, ending, sampling)
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)

    def command(self, name: str) -> bool:
        if name != "/reset":
            return False
        self._messages = list(self._start)
        return True

    def answer(self, line: str) -> None:
        """What a failed answer leaves in the conversation is nothing."""
        asked = [*self._messages, {"role": "user", "content": line.strip()}]
        text = self.stream(asked, advice="\n(/reset starts a new conversation.)")
        if text is not None:
            self._messages = [*asked, {"role": "assistant", "content": text}]
