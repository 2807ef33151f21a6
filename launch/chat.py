"""`tandem chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ..client import Client
from ..protocol.errors import RequestError
from .config import Options
from .connect import Service, service
from .progress import note
from .sampling import require_possible
from .signals import Ending, ending_interrupts
from .terminal import write_answer

HELP = "Enter sends, /reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer."
PROMPT = "> "


def chat(*, connect: str | None, worker_options: Options, sampling: Mapping[str, Any], system: str | None) -> None:
    """Answers what is read from stdin, line by line, until its end. Prompts and help appear on a terminal only."""
    require_possible(sampling)
    with ending_interrupts() as ending:
        try:
            with (
                service(connect, worker_options) as target,
                Client(target.address, keys=target.keys, insecure=target.insecure, name="tandem chat") as client,
            ):
                _Conversation(client, target, ending, sampling, system).run()
        except KeyboardInterrupt:
            ending.is_last = True
            print()


class _Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(
        self, client: Client, target: Service, ending: Ending, sampling: Mapping[str, Any], system: str | None
    ) -> None:
        self._client = client
        self._target = target
        self._ending = ending
        self._sampling = sampling
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._start)

    def run(self) -> None:
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            import readline  # noqa: F401  (gives input() its line editing)

            note(f"{self._client.model.name}. {HELP}")
        while True:
            try:
                line = input(PROMPT) if interactive else input()
            except EOFError:
                if interactive:
                    print()
                return
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            if text == "/reset":
                self._messages = list(self._start)
            elif text in ("/help", "/?"):
                note(HELP)
            elif text:
                self._answer(text)

    def _answer(self, text: str) -> None:
        """Streams the answer to one message. What a failed one leaves in the conversation is nothing."""
        asked = [*self._messages, {"role": "user", "content": text}]
        stream = self._client.stream(asked, **self._sampling)
        try:
            with stream:
                for chunk in stream:
                    write_answer(chunk.text)
            print(flush=True)
        except KeyboardInterrupt:
            if self._ending.asked or self._target.is_over:
                raise
            print(" [stopped]", flush=True)
        except RequestError as error:
            print(flush=True)
            note(f"{error}\n(/reset starts a new conversation.)")
            return
        self._messages = [*asked, {"role": "assistant", "content": stream.text}]
