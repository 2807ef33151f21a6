"""A place in a CUDA stream where the device waits for the host, so that the host need not wait for anything.

What a step does once its grammar masks are there can be queued before they are, and so can the next step: the stream
stops at the gate by itself (cuStreamWaitValue32 on a number in pinned host memory) and goes on within microseconds when
the number is written.

Nothing that opening a gate takes may wait for the device, or it waits for ever. What could make it wait is a queue that
is full: a launch then waits for the device, and with it, perhaps, every other call of CUDA and (by some launchers) the
interpreter. So little is ever queued behind a closed gate (see Pipeline.launch), and there are gates only where the
host is a single step ahead: all that a step's masks follow from is on the host before the step behind it is launched.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Final

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MOST_LOOKAHEAD: Final = 1
"""Steps that the host may be ahead where there are gates."""
_TICKETS: Final = 1 << 32
_FAR: Final = 1 << 30


def open_gates(device: torch.device, lookahead: int) -> list[Gate | None]:
    """One for each step that may be in flight. None each where the device cannot wait for the host: on a CPU, with a
    driver or an installation that lacks it (which a warning tells), or where the host is further ahead."""
    none: list[Gate | None] = [None] * (lookahead + 1)
    if device.type != "cuda" or lookahead > MOST_LOOKAHEAD:
        return none
    try:
        from cuda.bindings import driver

        gates = [Gate(driver, torch.zeros(1, dtype=torch.int32, pin_memory=True)) for _ in none]
        ticket = gates[0].close()
        gates[0].open(ticket)
        gates[0].wait(ticket, torch.cuda.current_stream(device))
    except (ImportError, RuntimeError) as error:
        log.warning("steps with structured output are queued ahead up to their sampling only: %s", error)
        return none
    return [*gates]


class Gate:
    """Tickets are handed out in order, for one waiting stream at a time."""

    def __init__(self, driver: Any, opened: Tensor) -> None:
        """`driver`: cuda.bindings.driver. `opened`: [1] int32, pinned: where the device looks."""
        self._driver = driver
        self._opened = opened
        self._number = opened.numpy().view("u4")
        self._last = 0
        self._lock = threading.Lock()
        self._broken = False

    def close(self) -> int:
        """A ticket for which nobody passes until it is opened."""
        self._last = (self._last + 1) % _TICKETS
        return self._last

    def open(self, ticket: int) -> bool:
        """Who waits for this ticket or an older one goes on, now or when he comes. False if everybody does already,
        since the gate is broken."""
        with self._lock:
            if self._broken:
                return False
            self._number[0] = ticket
            return True

    def break_open(self) -> None:
        """Everybody passes from now on: nobody is left to open it. Not for a gate that will be used again."""
        with self._lock:
            self._broken = True
            self._number[0] = (self._last + _FAR) % _TICKETS

    def wait(self, ticket: int, stream: torch.cuda.Stream) -> None:
        """Lets what is queued on the stream from now on wait for the ticket; waits for nothing itself. Raises
        RuntimeError if the driver refuses."""
        (error,) = self._driver.cuStreamWaitValue32(
            stream.cuda_stream,
            self._opened.data_ptr(),
            ticket,
            self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ,
        )
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver cannot make a stream wait for the host: {error.name}")
