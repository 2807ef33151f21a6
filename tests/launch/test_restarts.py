"""Children that end or hang are started again, but not for ever, and not if there is no hope."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.launch import supervisor as supervisor_module
from tandem.launch.child import ChildSpec
from tandem.launch.relay import LAUNCHER
from tandem.launch.restarts import RestartHistory, RestartPolicy
from tandem.launch.status import Ready, Status
from tandem.launch.supervisor import ChildDied, Supervisor

from support.deadlines import DEADLINE_S

pytestmark = pytest.mark.thorough

TESTS = Path(__file__).resolve().parents[1]
POLICY = RestartPolicy(max_restarts=3, first_delay_s=0.01)


class Heard:
    """A listener that can be waited on."""

    def __init__(self) -> None:
        self.ready: list[tuple[str, int]] = []
        self.lines: list[str] = []
        self._news = threading.Condition()

    def status(self, name: str, status: Status) -> None:
        if isinstance(status, Ready):
            with self._news:
                self.ready.append((name, status.details["pid"]))
                self._news.notify_all()

    def output(self, name: str, line: str) -> None:
        if name == LAUNCHER:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(condition, DEADLINE_S), (self.ready, self.lines)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def one(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr(supervisor_module, "LOOK_S", 0.05)
    monkeypatch.setattr(supervisor_module, "UNKNOWN_S", 0.3)
    made = Supervisor(heard)
    yield made
    made.stop()


def child(name: str, *behaviours: str, restart: RestartPolicy | None = POLICY) -> ChildSpec:
    return ChildSpec(name, "support.child", list(behaviours), {"PYTHONPATH": str(TESTS)}, restart=restart)


def test_a_child_that_was_ready_is_started_again(one: Supervisor, heard: Heard, tmp_path: Path) -> None:
    one.start(child("a", "ready", f"first_life={tmp_path}/lived:kill"))
    one.start(child("b", "ready"))
    heard.wait(lambda: sorted(name for name, _ in heard.ready) == ["a", "a", "b"])
    assert one.death is None
    assert heard.lines == ["a was killed by SIGKILL; starting it again in 0.01 s"]
    assert one.wait_ready("a").details["pid"] == [pid for name, pid in heard.ready if name == "a"][-1]


def test_a_child_that_was_never_ready_is_not(one: Supervisor, heard: Heard) -> None:
    one.start(child("a", "error=no such model", "exit=2"))
    with pytest.raises(ChildDied, match="^a: no such model$"):
        one.wait_ready("a", DEADLINE_S)
    assert heard.lines == []


def test_one_that_was_ready_once_gets_all_its_chances(one: Supervisor, heard: Heard, tmp_path: Path) -> None:
    """Later lives fail before they are ready: a GPU whose memory is not free yet, for example."""
    one.start(child("a", f"later_life={tmp_path}/lived:exit=5", f"first_life={tmp_path}/lived:ready", "exit=4"))
    death = one.wait_for_death(DEADLINE_S)
    assert death is not None
    assert death.how == "ended unexpectedly with exit code 5, the last of 4 early ends in a row"
    assert [line.split("; ")[1] for line in heard.lines] == [f"starting it again in {s} s" for s in (0.01, 0.02, 0.04)]


def test_a_child_that_falls_silent_is_killed_and_started_again(one: Supervisor, heard: Heard, tmp_path: Path) -> None:
    one.start(replace(child("a", "ready", "beat", f"first_life={tmp_path}/lived:freeze"), silence_s=1.0))
    heard.wait(lambda: len(heard.ready) == 2)
    assert heard.lines[0].startswith("a gave no sign of life for ")
    assert " and was killed; starting it again" in heard.lines[0]
    with pytest.raises(ProcessLookupError):
        os.kill(heard.ready[0][1], 0)


def test_a_child_that_its_scheduler_has_given_up_is_killed_and_started_again(one: Supervisor, heard: Heard) -> None:
    """It says itself that it is fine; what counts is the other's word."""
    one.start(child("keeper", "ready", "beat="))
    one.start(replace(child("a", "ready", "beat"), known_to="keeper"))
    heard.wait(lambda: [name for name, _ in heard.ready].count("a") == 2)
    assert "a was given up by the keeper for " in heard.lines[0]
    assert [name for name, _ in heard.ready].count("keeper") == 1


def test_nobody_is_judged_while_the_one_that_should_know_is_gone(
    one: Supervisor, heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "UNKNOWN_S", 1.5)  # far more than a life takes from one word to the next
    one.start(replace(child("a", "ready"), known_to="keeper"))
    pid = one.wait_ready("a", DEADLINE_S).details["pid"]
    # Its first life knows nobody and ends before that counts; its second knows the child.
    policy = RestartPolicy(max_restarts=3, first_delay_s=2.0)
    first = [f"first_life={tmp_path}/lived:alive=", f"first_life={tmp_path}/later:kill"]
    one.start(child("keeper", "ready", f"later_life={tmp_path}/lived:beat={pid}", *first, restart=policy))
    heard.wait(lambda: [name for name, _ in heard.ready].count("keeper") == 2)
    one.start(child("b", "ready"))
    one.wait_ready("b", DEADLINE_S)
    assert [line.split()[0] for line in heard.lines] == ["keeper"]
    assert one.wait_ready("a").details["pid"] == pid


def test_a_drained_child_is_neither_started_again_nor_a_death(one: Supervisor, heard: Heard) -> None:
    one.start(child("b", "ready"))
    one.wait_ready("b", DEADLINE_S)
    one.start(child("a", "ready", "drained", "exit=0"))
    heard.wait(lambda: bool(heard.lines))
    assert heard.lines == ["a was drained and has ended"]
    assert one.death is None
    assert "a" not in one.ready


def test_a_child_that_is_not_ready_again_in_time_is_killed(one: Supervisor, heard: Heard, tmp_path: Path) -> None:
    spec = child("a", f"later_life={tmp_path}/lived:freeze", f"first_life={tmp_path}/lived:ready", "kill")
    one.start(replace(spec, ready_within_s=0.3))
    heard.wait(lambda: len(heard.lines) == 2)
    assert "was not ready" in heard.lines[1]


def test_stopping_does_not_wait_for_a_restart(heard: Heard) -> None:
    one = Supervisor(heard)
    one.start(child("a", "ready", "kill", restart=RestartPolicy(max_restarts=3, first_delay_s=600)))
    heard.wait(lambda: bool(heard.lines))
    began = time.monotonic()
    one.stop()
    assert time.monotonic() - began < DEADLINE_S
    assert len(heard.ready) == 1


def test_a_supervisor_that_stood_still_does_not_blame_its_children(heard: Heard, tmp_path: Path) -> None:
    """Both are frozen for longer than the child may be silent, as when a container is paused."""
    one = Supervisor(heard)
    try:
        one.start(replace(child("a", "ready", "beat"), silence_s=2.5))
        pid = one.wait_ready("a", DEADLINE_S).details["pid"]
        # The supervisor's thread is held up by its own listener; the child, by a signal.
        held = threading.Event()
        os.kill(pid, signal.SIGSTOP)

        def hold() -> None:
            held.wait(DEADLINE_S)

        one._ask(hold)
        threading.Timer(3.5, held.set).start()
        assert held.wait(DEADLINE_S)
        os.kill(pid, signal.SIGCONT)
        one.start(child("b", "ready"))
        one.wait_ready("b", DEADLINE_S)
        assert heard.lines == []
        assert one.wait_ready("a").details["pid"] == pid
    finally:
        one.stop()


def test_delays_double_and_a_stable_life_forgets_the_failures() -> None:
    history = RestartHistory(RestartPolicy(max_restarts=3, stable_s=10, first_delay_s=1, longest_delay_s=3))
    assert history.ended(0) is None, "it was never ready"
    history = RestartHistory(RestartPolicy(max_restarts=3, stable_s=10, first_delay_s=1, longest_delay_s=3))
    history.ready(0)
    assert [history.ended(5), history.ended(6)] == [1, 2]
    history.ready(10)
    assert history.ended(19) == 3
    history.ready(20)
    assert history.ended(30) == 1
    history.ready(31)
    assert [history.ended(n) for n in (32, 33, 34)] == [2, 3, None]
