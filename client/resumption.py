"""Open requests that no scheduler works on: they wait for a service, or for room in it, and are then sent again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ..protocol.errors import ModelChanged, TandemError
from ..protocol.messages import ModelDescription
from .stream import TokenStream

MAX_REPAIRS: Final = 5
"""A request whose stream breaks so often without a token between is given up."""
SEND_RETRY_S: Final = 0.01
"""ZeroMQ does not say when a full queue has room again."""
SHORTEST_WAIT_S: Final = 0.05
LONGEST_WAIT_S: Final = 5.0
"""Between these lies how long an overloaded service is left alone, whatever it asks for."""

_DECISIVE: Final = ("architecture", "dtype", "vocab_size", "max_model_len", "eos_token_ids", "weights")


class Resumptions:
    """Requests that wait, in the order in which they came, each with the time from which on it may be sent.

    Nothing is sent before `open`, nor after `close`; what is added waits meanwhile.
    """

    def __init__(self, submit: Callable[[TokenStream], bool]) -> None:
        """`submit` sends a request with a new ticket, and is False if there was no room for it. A TandemError that it
        raises fails the request."""
        self._submit = submit
        self._due: dict[TokenStream, float] = {}
        """Loop times."""
        self._timer: tuple[float, asyncio.Handle] | None = None
        """When it next looks for what is due; uvloop's own handles do not always know."""
        self._open = False

    def __len__(self) -> int:
        return len(self._due)

    def add(self, stream: TokenStream, wait_s: float = 0.0) -> None:
        """Takes in an open request, which is sent no earlier than after `wait_s` seconds."""
        stream.resumed = True
        self._due[stream] = asyncio.get_running_loop().time() + wait_s
        if self._open:
            self._send_in(wait_s)

    def wait_out(self, stream: TokenStream, retry_after: float) -> None:
        """Takes in a request that an overloaded service refused, to be tried again."""
        self.add(stream, min(max(retry_after, SHORTEST_WAIT_S), LONGEST_WAIT_S))

    def repair(self, stream: TokenStream, error: TandemError) -> None:
        """Takes in a request whose stream is broken, or fails it with `error` if that has happened too often."""
        if len(stream.history.generated) > stream.repaired_at:
            stream.repairs = 0
        stream.repaired_at = len(stream.history.generated)
        stream.repairs += 1
        if stream.repairs > MAX_REPAIRS:
            stream.fail(error)
        else:
            self.add(stream)

    def discard(self, stream: TokenStream) -> bool:
        """Whether it was waiting here."""
        return self._due.pop(stream, None) is not None

    def fail_all(self, error: TandemError) -> None:
        """Ends every request that waits."""
        due, self._due = self._due, {}
        for stream in due:
            stream.fail(error)

    def open(self, model: ModelDescription) -> None:
        """There is a service with this model: sends what is due, and from now on whatever becomes due. What began with
        another model fails with ModelChanged."""
        self._open = True
        for stream in list(self._due):
            difference = _difference(stream.history.model, model)
            if difference:
                del self._due[stream]
                stream.fail(ModelChanged(f"the service came back with another model: {difference}"))
        self._send_due()

    def close(self) -> None:
        """There is no service any more."""
        self._open = False
        self._stop_timer()

    def _send_in(self, wait_s: float) -> None:
        loop = asyncio.get_running_loop()
        when = loop.time() + wait_s
        if self._timer is None or self._timer[0] > when:
            self._stop_timer()
            self._timer = when, loop.call_at(when, self._send_due)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer[1].cancel()
            self._timer = None

    def _send_due(self) -> None:
        self._stop_timer()
        now = asyncio.get_running_loop().time()
        for stream in [stream for stream, at in self._due.items() if at <= now]:
            try:
                if not self._submit(stream):
                    self._send_in(SEND_RETRY_S)
                    return
            except TandemError as error:
                stream.fail(error)
            self._due.pop(stream, None)
        if self._due:
            self._send_in(max(0.0, min(self._due.values()) - now))


def _difference(before: ModelDescription | None, now: ModelDescription) -> str:
    """The first field by which a continuation could differ; empty if there is none."""
    for name in _DECISIVE:
        was, is_now = getattr(before, name, None), getattr(now, name)
        if before is not None and was != is_now:
            return f"{name} was {was!r} and is now {is_now!r}"
    return ""
