"""The real core and the real client port, without sockets, in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from ...protocol.messages import ModelDescription
from ...protocol.transport import LOCAL, LoopSocket, Sent
from ...scheduler.client_port import ClientPort
from ...scheduler.core import Core
from ...scheduler.events import Event
from ...scheduler.policy import Policy
from .loads import VOCAB

EPOCH = 1_790_000_000_000_000_000
"""As wide on the wire as that of a real scheduler, which is its time of birth in ns."""


def build_core(prefix_caching: bool) -> Core:
    """A core that admits whatever has room, however long its steps get."""
    return Core(EPOCH, Policy(enable_prefix_caching=prefix_caching, mixed_step_target_s=0.0))


def build_client_port(core: Core, post: Callable[[Event], None], clock: VirtualClock) -> ClientPort:
    return ClientPort(EPOCH, 3_600.0, post, clock.time, core, clock.call_later)


def describe_model(max_model_len: int) -> ModelDescription:
    return ModelDescription(
        name="simulated",
        architecture="none",
        dtype="none",
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        eos_token_ids=(2, 3),
    )


@dataclass(slots=True)
class Timer:
    """As much of asyncio.TimerHandle as callers use."""

    at: float
    callback: Callable[[], None] | None

    def cancel(self) -> None:
        self.callback = None

    def when(self) -> float:
        return self.at


@dataclass(slots=True)
class VirtualClock:
    """Time that stands still until it is advanced, seconds."""

    now: float = 0.0
    _timers: list[tuple[float, int, Timer]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self.now + delay, callback)
        heapq.heappush(self._timers, (timer.at, next(self._order), timer))
        return timer

    def run_due(self) -> None:
        """Calls back everything whose time has come."""
        while self._timers and self._timers[0][0] <= self.now:
            _, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()


class DiscardingSocket(LoopSocket):
    """Takes every message at once, counts it and forgets it."""

    def __init__(self) -> None:  # no ZeroMQ socket, and so nothing that the base class would set up
        self.sender = LOCAL
        self.messages = 0
        self.bytes = 0

    def send(self, frames: list[bytes]) -> Sent:
        self.messages += 1
        self.bytes += len(frames[-1])
        return Sent.QUEUED

    def wire(self) -> None:
        """There is no connection."""

    def close(self, linger_ms: int = 0) -> None:
        """Nothing is open."""
