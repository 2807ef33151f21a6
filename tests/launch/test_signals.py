"""Being asked to end, more than once and at bad moments."""

from __future__ import annotations

import select
import signal
import threading

import pytest

from tandem.launch.signals import ending_interrupts

from support.deadlines import DEADLINE_S

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
def test_a_second_signal_does_not_stop_the_ending_half_way(first: signal.Signals, second: signal.Signals) -> None:
    story = []
    with ending_interrupts(once=True) as ending:
        try:
            signal.raise_signal(first)
            story.append("not interrupted")
        except KeyboardInterrupt:
            signal.raise_signal(second)
            story.append("excepted")
        finally:
            signal.raise_signal(second)
            story.append("cleared away")
    assert story == ["excepted", "cleared away"]
    assert ending.asked


@pytest.mark.parametrize("number", ALL)
def test_without_once_each_signal_interrupts(number: signal.Signals) -> None:
    with ending_interrupts() as ending:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert ending.asked is (number is not signal.SIGINT)


@pytest.mark.parametrize("once", [True, False])
def test_the_handlers_before_come_back(once: bool) -> None:
    before = [signal.getsignal(number) for number in ALL]
    with ending_interrupts(once=once):
        assert [signal.getsignal(number) for number in ALL] != before
    assert [signal.getsignal(number) for number in ALL] == before


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("number", ALL)
def test_a_signal_that_comes_to_another_thread_wakes_the_main_thread(number: signal.Signals, once: bool) -> None:
    # The kernel does this on its own when several signals come at once.
    thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), number))

    def wait() -> None:
        thread.start()
        select.poll().poll(DEADLINE_S * 1000)
        raise AssertionError("not interrupted")

    with ending_interrupts(once=once), pytest.raises(KeyboardInterrupt):
        wait()
    thread.join()
