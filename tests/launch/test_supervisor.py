"""The supervisor with real children: readiness, death with last words, ending all, nobody left behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.launch.child import ChildSpec
from tandem.launch.relay import LAUNCHER, MOST_CHARACTERS, OWN_CHARACTERS, Relay
from tandem.launch.restarts import RestartPolicy
from tandem.launch.status import Failed, Progress, Ready, Status
from tandem.launch.supervisor import ChildDied, StartTimeout, Supervisor

from support.deadlines import DEADLINE_S
from support.processes import wait_until_gone

TESTS = Path(__file__).resolve().parents[1]


class Heard:
    """A listener that keeps all it hears."""

    def __init__(self) -> None:
        self.statuses: list[tuple[str, Status]] = []
        self.lines: list[tuple[str, str]] = []

    def status(self, name: str, status: Status) -> None:
        self.statuses.append((name, status))

    def output(self, name: str, line: str) -> None:
        self.lines.append((name, line))


def child(name: str, *behaviours: str) -> ChildSpec:
    return ChildSpec(name, "support.child", list(behaviours), {"PYTHONPATH": str(TESTS)})


@contextmanager
def supervisor(heard: Heard | None = None) -> Iterator[Supervisor]:
    one = Supervisor(heard or Heard())
    try:
        yield one
    finally:
        one.stop()


def test_ready_carries_what_the_child_said_and_stop_ends_it() -> None:
    with supervisor() as one:
        one.start(child("a", "ready"))
        pid = one.wait_ready("a", DEADLINE_S).details["pid"]
        one.stop()
        assert one.death is None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        one.stop()  # again: nothing happens


def test_statuses_and_output_reach_the_listener_in_order() -> None:
    heard = Heard()
    with supervisor(heard) as one:
        one.start(child("a", "say=hello", "progress=0.25", "nonsense", "ready"))
        one.wait_ready("a", DEADLINE_S)
        assert [status for _, status in heard.statuses[:2]] == [Progress("load", 0.25), Progress("odd", None)]
        assert isinstance(heard.statuses[2][1], Ready)
        one.stop()
    assert ("a", "hello") in heard.lines


@pytest.mark.parametrize(("given", "optimize"), [("", 0), ("1", 1), ("2", 1)])
def test_children_keep_their_docstrings(given: str, optimize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers needs its own."""
    monkeypatch.setenv("PYTHONOPTIMIZE", given)
    heard = Heard()
    with supervisor(heard) as one:
        one.start(child("a", "say_optimize", "ready"))
        one.wait_ready("a", DEADLINE_S)
        one.stop()
    assert ("a", f"optimize {optimize}") in heard.lines


@pytest.mark.parametrize(
    ("behaviours", "expected"),
    [
        (["say=the reason", "exit=3"], "a ended unexpectedly with exit code 3. Its last words:\n  the reason"),
        (["say=the reason", "kill"], "a was killed by SIGKILL. Its last words:\n  the reason"),
        (["exit=0"], "a ended unexpectedly with exit code 0, without a word."),
        (["mutter=half a li", "exit=1"], "a ended unexpectedly with exit code 1. Its last words:\n  half a li"),
        (["say=a traceback", "error=model 'x' does not exist", "exit=2"], "a: model 'x' does not exist"),
    ],
)
def test_a_child_that_ends_unasked_is_reported_with_its_last_words(behaviours: list[str], expected: str) -> None:
    with supervisor() as one:
        one.start(child("a", *behaviours))
        with pytest.raises(ChildDied) as died:
            one.wait_ready("a", DEADLINE_S)
        assert str(died.value) == expected


def test_only_the_last_words_are_kept_but_all_are_passed_on() -> None:
    heard = Heard()
    with supervisor(heard) as one:
        one.start(child("a", "say_lines=20000", "exit=1"))
        death = one.wait_for_death(DEADLINE_S)
        assert death is not None
        assert death.words == [f"line {number}" for number in range(19_970, 20_000)]
        assert [line for _, line in heard.lines] == [f"line {number}" for number in range(20_000)]


class Blocked(Heard):
    """A listener that does not return from the first line that it hears until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.may_return = threading.Event(), threading.Event()

    def output(self, name: str, line: str) -> None:
        super().output(name, line)
        self.heard.set()
        self.may_return.wait()


def test_a_listener_that_does_not_return_holds_nothing() -> None:
    """A terminal that is stopped: a child that ends is started again, its death for good is noticed, the end comes."""
    heard = Blocked()
    with supervisor(heard) as one:
        spec = child("a", "say=hello", "ready", "kill")
        one.start(replace(spec, restart=RestartPolicy(max_restarts=2, first_delay_s=0.01)))
        death = one.wait_for_death(DEADLINE_S)
        assert death is not None
        assert death.how == "was killed by SIGKILL, the last of 3 early ends in a row"
        one.stop()
        assert heard.lines == [("a", "hello")]
        heard.may_return.set()


def test_nobody_waits_for_the_end_of_what_is_said_without_end() -> None:
    """As by a child that writes faster than a terminal shows it, while another has ended."""

    class Echo(Heard):
        def __init__(self) -> None:
            super().__init__()
            self.goes_on = True

        def output(self, name: str, line: str) -> None:
            super().output(name, line)
            if self.goes_on:
                one.tell(line)  # before this one counts as heard

    heard = Echo()
    with supervisor(heard) as one:
        one.start(child("a", "say=hello", "ready"))
        try:
            one.wait_ready("a", DEADLINE_S)
        finally:
            heard.goes_on = False
    assert heard.lines[0] == ("a", "hello")


def test_what_does_not_fit_is_counted_and_told_in_its_place() -> None:
    heard = Blocked()
    passed = threading.Event()
    relay = Relay(heard, passed.set)
    relay.output("a", "first")
    assert heard.heard.wait(DEADLINE_S)
    line = "x" * (MOST_CHARACTERS // 4 - OWN_CHARACTERS)
    for _ in range(7):
        relay.output("a", line)
    relay.status("a", Progress("load", 0.5))
    heard.may_return.set()
    while relay.passed_on < relay.put:
        assert passed.wait(DEADLINE_S)
        passed.clear()
    relay.output("a", "last")
    relay.close()
    assert heard.lines == [
        *[("a", "first"), *[("a", line)] * 4],
        *[(LAUNCHER, "3 lines left out here: nobody read them"), ("a", "last")],
    ]
    assert heard.statuses == []


def test_empty_lines_do_not_pile_up_before_a_listener_that_does_not_return() -> None:
    heard = Blocked()
    relay = Relay(heard, lambda: None)
    relay.output("a", "first")
    assert heard.heard.wait(DEADLINE_S)
    fit = MOST_CHARACTERS // OWN_CHARACTERS
    for _ in range(fit + 10):
        relay.output("a", "")
    heard.may_return.set()
    relay.close()
    assert heard.lines == [("a", "first"), *[("a", "")] * fit]


def test_death_of_one_ends_the_others_and_the_first_death_is_kept() -> None:
    with supervisor() as one:
        one.start(child("a", "ready"))
        survivor = one.wait_ready("a", DEADLINE_S).details["pid"]
        one.start(child("b", "ready", "exit=7"))
        death = one.wait_for_death(DEADLINE_S)
        assert death is not None
        assert (death.name, death.how) == ("b", "ended unexpectedly with exit code 7")
        wait_until_gone(survivor)
        assert one.death is death


def test_on_death_is_called_once() -> None:
    deaths: list[str] = []
    one = Supervisor(Heard(), lambda death: deaths.append(death.name))
    try:
        one.start(child("a", "ready", "exit=1"))
        one.start(child("b", "ready", "exit=1"))
        one.wait_for_death(DEADLINE_S)
    finally:
        one.stop()
    assert len(deaths) == 1


def test_a_stubborn_child_is_killed_after_the_grace() -> None:
    one = Supervisor(Heard())
    one.start(child("a", "stubborn", "ready"))
    pid = one.wait_ready("a", DEADLINE_S).details["pid"]
    one.stop(grace_s=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_last_child_is_asked_when_the_others_are_gone() -> None:
    heard = Heard()
    with supervisor(heard) as one:
        keeper = child("keeper", "say_at_end=over", "ready")
        one.start(ChildSpec(keeper.name, keeper.module, keeper.arguments, keeper.environment, last=True))
        one.start(child("slow", "say_at_end=first", "slow_end=0.5", "ready"))
        for name in ("keeper", "slow"):
            one.wait_ready(name, DEADLINE_S)
        one.stop()
    assert heard.lines == [("slow", "first"), ("keeper", "over")]


def test_the_last_child_ends_even_after_a_stubborn_one() -> None:
    heard = Heard()
    one = Supervisor(heard)
    keeper = child("keeper", "say_at_end=over", "ready")
    one.start(ChildSpec(keeper.name, keeper.module, keeper.arguments, keeper.environment, last=True))
    one.start(child("a", "stubborn", "ready"))
    for name in ("keeper", "a"):
        one.wait_ready(name, DEADLINE_S)
    one.stop(grace_s=2.0)
    assert heard.lines == [("keeper", "over")]


def test_a_grandchild_does_not_survive_its_parent() -> None:
    heard = Heard()
    with supervisor(heard) as one:
        one.start(child("a", "grandchild", "ready"))
        one.wait_ready("a", DEADLINE_S)
        one.stop()
    (line,) = [line for _, line in heard.lines if line.startswith("grandchild")]
    wait_until_gone(int(line.split()[1]))


def test_start_timeout() -> None:
    with supervisor() as one:
        one.start(child("a"))
        with pytest.raises(StartTimeout, match="a was not ready after 0.1 seconds"):
            one.wait_ready("a", 0.1)


def test_a_module_that_does_not_exist_is_a_death_with_words() -> None:
    with supervisor() as one:
        one.start(ChildSpec("a", "tandem.no_such_module", []))
        death = one.wait_for_death(DEADLINE_S)
        assert death is not None
        assert "No module named tandem.no_such_module" in str(death)


def test_children_outlive_the_thread_that_asked_for_them() -> None:
    """The kernel ties a child to the thread that started it: that must be the supervisor's own."""
    with supervisor() as one:
        asking = threading.Thread(target=one.start, args=(child("a", "ready"),))
        asking.start()
        asking.join()
        pid = one.wait_ready("a", DEADLINE_S).details["pid"]
        assert one.wait_for_death(0.3) is None
        os.kill(pid, 0)


def test_an_interrupt_reaches_the_waiting_owner() -> None:
    # A shell makes its jobs in the background ignore SIGINT, and the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with supervisor() as one:
            one.start(child("a"))
            timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))

            def wait() -> None:  # the signal may come as soon as the timer runs
                timer.start()
                one.wait_ready("a", DEADLINE_S)

            with pytest.raises(KeyboardInterrupt):
                wait()
            timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


LAUNCHER_SCRIPT = """
import sys, signal
from tandem.launch.child import ChildSpec
from tandem.launch.supervisor import PassThrough, Supervisor
one = Supervisor(PassThrough())
one.start(ChildSpec("a", "support.child", ["stubborn", "ready"], {"PYTHONPATH": sys.argv[1]}))
print(one.wait_ready("a", 60).details["pid"], flush=True)
signal.pause()
"""


def test_even_a_killed_launcher_leaves_no_orphan() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", LAUNCHER_SCRIPT, str(TESTS)], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        launcher.kill()
        wait_until_gone(pid)


NOBODY_READS = """
import sys
from tandem.launch.child import ChildSpec
from tandem.launch.supervisor import PassThrough, Supervisor
one = Supervisor(PassThrough())
one.start(ChildSpec("a", "support.child", ["say_lines=20000", "exit=1"], {"PYTHONPATH": sys.argv[1]}))
print(one.wait_for_death(60).how, flush=True)
one.stop()
"""


def test_a_program_ends_as_ever_though_nobody_reads_its_stderr() -> None:
    command = [sys.executable, "-P", "-c", NOBODY_READS, str(TESTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ended unexpectedly with exit code 1\n"
        assert program.wait(DEADLINE_S) == 0
        assert program.stderr is not None
        assert program.stderr.readline() == "[a] line 0\n"


def test_failed_is_a_status() -> None:
    heard = Heard()
    with supervisor(heard) as one:
        one.start(child("a", "error=because", "exit=1"))
        one.wait_for_death(DEADLINE_S)
    assert ("a", Failed("because")) in heard.statuses
