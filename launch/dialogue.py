"""Lines in, streamed answers out: what `tandem chat` and `tandem complete` share."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from ..client import Client
from ..protocol.errors import RequestError
from .config import Options
from .connect import Service, service
from .progress import note
from .sampling import require_possible
from .signals import Ending, ending_interrupts
from .terminal import write_answer

PROMPT = "> "


class Dialogue(ABC):
    """Answers what is read from stdin, line by line, until its end. Prompts and help appear on a terminal only."""

    HELP: str

    def __init__(self, client: Client, target: Service, ending: Ending, sampling: Mapping[str, Any]) -> None:
        self._client = client
        self._target = target
        self._ending = ending
        self._sampling = sampling

    @abstractmethod
    def answer(self, line: str) -> None:
        """Answers one line, which is as it was typed and not blank."""

    def command(self, name: str) -> bool:
        """Does what a line like /reset asks for; False if it is no command here, but something to answer."""
        return False

    def run(self) -> None:
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            import readline  # noqa: F401  (gives input() its line editing)

            note(f"{self._client.model.name}. {self.HELP}")
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
            if text in ("/help", "/?"):
                note(self.HELP)
            elif text and not self.command(text):
                self.answer(line)

    def stream(self, prompt: Any, *, advice: str = "") -> str | None:
        """Prints an answer as it comes and returns it, as far as it came if Ctrl-C stopped it; None if it failed,
        which was then told, with the advice."""
        stream = self._client.stream(prompt, **self._sampling)
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
            note(f"{error}{advice}")
            return None
        return stream.text


def hold(
    make: Callable[[Client, Service, Ending], Dialogue],
    *,
    name: str,
    connect: str | None,
    worker_options: Options,
    sampling: Mapping[str, Any],
) -> None:
    """Connects as `name`, to a service that is started for it if there is none, and holds a dialogue to its end."""
    require_possible(sampling)
    with ending_interrupts() as ending:
        try:
            with (
                service(connect, worker_options) as target,
                Client(target.address, keys=target.keys, insecure=target.insecure, name=name) as client,
            ):
                make(client, target, ending).run()
        except KeyboardInterrupt:
            ending.is_last = True
            print()
