"""A place in a CUDA stream where the device waits for the host, so that the host need not wait for anything.

What a step does once its grammar masks are there can be queued before they are, and so can the next step: the stream
stops at the gate by itself (cuStreamWaitValue32 on a number in pinned host memory) and goes on within microseconds when
the number is written.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Final

import torch

log = logging.getLogger(__name__)

_TICKETS: Final = 1 << 32
_FAR: Final = 1 << 30


def open_gate(device: torch.device) -> Gate | None:
    """None where the device cannot wait for the host: a CPU, or a driver or an installation that lacks it."""
    if device.type != "cuda":
        return None
    try:
        from cuda.bindings import driver
    except ImportError:
        log.warning("the package cuda-bindings is missing: steps with structured output cannot be queued ahead whole")
        return None
    gate = Gate(driver)
    try:
        ticket = gate.close()
        gate.open(ticket)
        gate.wait(ticket, torch.cuda.current_stream(device))
    except RuntimeError as error:
        log.warning("steps with structured output cannot be queued ahead whole: %s", error)
        return None
    return gate


class Gate:
    """Tickets are handed out in order, for one waiting stream at a time."""

    def __init__(self, driver: Any) -> None:
        """`driver`: cuda.bindings.driver"""
        self._driver = driver
        self._opened = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._number = self._opened.numpy().view("u4")
        self._address = self._opened.data_ptr()
        self._last = 0
        self._lock = threading.Lock()
        self._broken = False

    def close(self) -> int:
        """A ticket for which nobody passes until it is opened."""
        self._last = (self._last + 1) % _TICKETS
        return self._last

    def open(self, ticket: int) -> None:
        """Who waits for this ticket or an older one goes on, now or when he comes."""
        with self._lock:
            if not self._broken:
                self._number[0] = ticket

    def break_open(self) -> None:
        """Everybody passes from now on: nobody is left to open it. Not for a gate that will be used again."""
        with self._lock:
            self._broken = True
            self._number[0] = (self._last + _FAR) % _TICKETS

    def wait(self, ticket: int, stream: torch.cuda.Stream) -> None:
        """Lets what is queued on the stream from now on wait for the ticket; waits for nothing itself. Raises
        RuntimeError if the driver refuses."""
        (error,) = self._driver.cuStreamWaitValue32(
            stream.cuda_stream, self._address, ticket, self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        )
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver cannot make a stream wait for the host: {error.name}")
