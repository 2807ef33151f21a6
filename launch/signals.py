"""One way to be asked to end: SIGTERM and a closed terminal interrupt the main thread exactly as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
KICK = signal.SIGURG
KICKS = 20
KICK_EVERY_S = 0.05


class Ending:
    """Whether somebody asked the whole program to end, rather than pressed Ctrl-C in the midst of something."""

    def __init__(self) -> None:
        self.asked = False
        self.is_last = False
        """Set by a command that was interrupted and has nothing left to do but end the program: it does so with its own
        exit code, however often it is asked once more."""


@contextmanager
def ending_interrupts(*, once: bool = False) -> Iterator[Ending]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread. Call it there.

    With `once` only the first of them does. That is for a block that has nothing to do but end properly when it is
    interrupted: a second signal could strike anywhere in its `except` and `finally`, and stop the ending half-way.

    Otherwise SIGINT gets Python's own handler back even where the shell made it ignored (a job in the background),
    because the others arrive through it, and because asyncio.run turns it into a cancellation.
    """
    ending = Ending()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        ending.asked = True
        signal.raise_signal(signal.SIGINT)

    def interrupt_once(_number: int, _frame: FrameType | None) -> None:
        first, ending.asked = not ending.asked, True
        if first:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    with _attentive_main_thread():
        signal.signal(signal.SIGINT, interrupt_once if once else signal.default_int_handler)
        for number in ENDING:
            signal.signal(number, interrupt_once if once else interrupt)
        try:
            yield ending
        finally:
            for number, handler in before.items():
                after = signal.SIG_DFL if handler is None else handler
                signal.signal(number, signal.SIG_IGN if ending.is_last else after)


@contextmanager
def _attentive_main_thread() -> Iterator[None]:
    """While the block runs, the main thread's system calls are interrupted whichever thread a signal came to.

    Of several signals at once the kernel gives some, or all, to another thread. There Python only makes a note, for
    the main thread to read, which may sleep in its system call for good. A helper thread hears of each signal through
    the wakeup descriptor, and kicks the main thread with one whose handler does nothing: more than once, because a kick
    between the last look at the notes and the system call is lost.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    main = threading.main_thread().ident
    assert main is not None  # it is running this
    over = threading.Event()

    def kick() -> None:
        with open(reader, "rb", buffering=0) as numbers:
            while heard := numbers.read(64):
                for _ in range(KICKS if any(number != KICK for number in heard) else 0):
                    signal.pthread_kill(main, KICK)
                    if over.wait(KICK_EVERY_S):
                        return

    before = signal.signal(KICK, lambda _number, _frame: None)
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    helper = threading.Thread(target=kick, name="tandem-signals", daemon=True)
    helper.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        over.set()
        os.close(writer)
        helper.join()
        signal.signal(KICK, signal.SIG_DFL if before is None else before)


@contextmanager
def uninterrupted(*, redeliver: bool) -> Iterator[None]:
    """While the block runs nobody interrupts it, because it is ending things already, and soon done.

    Signals that come meanwhile are raised afterwards if `redeliver`, else forgotten. A no-op off the main thread,
    where no signal is handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    # A function and not SIG_IGN, which a child started meanwhile would inherit.
    before = {number: signal.signal(number, lambda got, _: seen.append(got)) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if redeliver:
            for got in dict.fromkeys(seen):
                signal.raise_signal(got)


def interrupt_main_thread() -> None:
    """Raises KeyboardInterrupt in the main thread, from any thread, even while it waits in a system call."""
    identity = threading.main_thread().ident
    if identity is not None:
        signal.pthread_kill(identity, signal.SIGINT)
