"""What is written to stderr without a buffer."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import threading

from tandem.launch.stderr import _unbuffered

CAPACITY = 65_536


def test_a_signal_during_a_write_loses_nothing() -> None:
    """It ends a write to a full pipe with as much as went in so far."""
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, CAPACITY)
    handled, found = threading.Event(), bytearray()
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.set())

    def read() -> None:
        while not _is_full(writes):
            os.sched_yield()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        while piece := os.read(reads, CAPACITY):
            found.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        _unbuffered(writes, "utf-8", "strict").write("x" * 4 * CAPACITY + "\n")
    finally:
        os.close(writes)
        reader.join()
        os.close(reads)
        signal.signal(signal.SIGUSR1, before)
        _unbuffered.cache_clear()
    assert handled.is_set()
    assert found == b"x" * 4 * CAPACITY + b"\n"


def _is_full(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return not poll.poll(0)
