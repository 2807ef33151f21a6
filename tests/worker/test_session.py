"""The worker's session against a scheduler that the test plays over a real ROUTER: every order of greetings, ends and
failures. The model is tiny, threads and sockets are real."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import zmq

from tandem.protocol.codec import decode, encode
from tandem.protocol.errors import ServiceUnavailable
from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    FetchFile,
    FileChunk,
    FileInfo,
    Goodbye,
    Idle,
    ModelDescription,
    Ping,
    StepPlan,
    StepResult,
    UnknownPeer,
    VersionRefused,
    WorkerHello,
    WorkerWelcome,
)
from tandem.protocol.transport import Address, open_router
from tandem.worker import session as session_module
from tandem.worker.grammars.book import GrammarBook
from tandem.worker.grammars.checker import GrammarChecker
from tandem.worker.link import Failure, Link, Reachable
from tandem.worker.model import PagedModel
from tandem.worker.pipeline import Pipeline
from tandem.worker.session import Session
from tandem.worker.stopping import Stop

from support.deadlines import DEADLINE_S
from support.paged import load_tiny

NEVER_S = 3600.0
BLOCK_SIZE = 16
FILES = {"tokenizer.json": bytes(range(256)) * 8192}
M = TypeVar("M")


class Scheduler:
    """One side of the protocol, said by hand. `recv` gives the next message, which must be of the kind named; hellos
    and idleness that are not asked for are passed over."""

    def __init__(self, directory: Path) -> None:
        self._address = Address(f"ipc://{directory}")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = open_router(self._context, self._address.endpoint("workers"))
        self._route = b""

    def recv(self, kind: type[M]) -> M:
        while True:
            assert self._router.poll(int(DEADLINE_S * 1000)), f"no {kind.__name__} came"
            self._route, data = self._router.recv_multipart()
            message = decode(data, StepResult, Idle, WorkerHello, FileChunk, Goodbye)
            if isinstance(message, kind):
                return message
            assert isinstance(message, WorkerHello | Idle), f"{message} came where {kind.__name__} was due"

    def say(self, *messages: object) -> None:
        for message in messages:
            self._router.send_multipart([self._route, encode(message)])

    def welcome(self, epoch: int = 1, registration: int = 1) -> None:
        self.say(WorkerWelcome(version=PROTOCOL_VERSION, epoch=epoch, registration=registration))

    def close(self) -> None:
        self._router.close(0)
        self._context.term()


class Worker:
    """A session in a thread of its own, and what it raised."""

    def __init__(self, model: PagedModel, directory: Path, lookahead: int) -> None:
        self.link = Link(Address(f"ipc://{directory}"))
        self.pipeline = Pipeline(
            model,
            num_blocks=32,
            block_size=BLOCK_SIZE,
            slots=4,
            max_model_len=128,
            max_tokens=64,
            lookahead=lookahead,
            on_result=self.link.send,
            on_failure=lambda error: self.link.inbox.put(Failure(error)),
        )
        self.checker = GrammarChecker(GrammarBook(None, model.vocab_size, ()))
        self.session = Session(self.link, self.pipeline, hello(), FILES, self.checker)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.session.run()
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def end(self) -> BaseException | None:
        """Waits until the session is over; returns what it raised."""
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive(), "the session does not end"
        return self.error

    def close(self) -> None:
        self.link.inbox.put(Stop())
        self.end()
        self.checker.close()
        self.pipeline.close(DEADLINE_S)
        self.link.close()


def hello() -> WorkerHello:
    (name, data), *_ = FILES.items()
    return WorkerHello(
        version=PROTOCOL_VERSION,
        name="scripted",
        pid=1,
        instance=5,
        model=ModelDescription(name="m", architecture="a", dtype="float32", vocab_size=160, max_model_len=128),
        files=(FileInfo(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()),),
        num_blocks=32,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        lookahead=1,
    )


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


def first_plan(epoch: int = 1, registration: int = 1) -> StepPlan:
    """Three tokens of one greedy request."""
    return StepPlan(
        epoch=epoch,
        registration=registration,
        step=0,
        join_slot=ints(0),
        join_number=np.array([0], np.int64),
        join_attempt=ints(0),
        join_prompt_length=ints(3),
        join_length=ints(3),
        join_computed=ints(0),
        join_num_blocks=ints(1),
        join_token=ints(5, 6, 7),
        join_block=ints(2),
        join_temperature=np.zeros(1, np.float32),
        join_top_k=ints(0),
        join_top_p=np.ones(1, np.float32),
        join_seed=np.zeros(1, np.int64),
        chunk_slot=ints(0),
        chunk_length=ints(3),
    )


def next_plan(step: int, epoch: int = 1, registration: int = 1) -> StepPlan:
    return StepPlan(epoch=epoch, registration=registration, step=step)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PagedModel:
    made, _ = load_tiny("llama", tmp_path_factory.mktemp("llama"))
    made.allocate_kv_cache(32, BLOCK_SIZE)
    return made


@pytest.fixture
def directory() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ts-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def schedulers(directory: Path) -> Iterator[Callable[[], Scheduler]]:
    """Makes the scheduler of the directory; another one takes the place of the first."""
    made: list[Scheduler] = []

    def make() -> Scheduler:
        for former in made:
            former.close()
        made[:] = [Scheduler(directory)]
        return made[0]

    yield make
    for last in made:
        last.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unanswered hello is not repeated within the test."""
    monkeypatch.setattr(session_module, "HELLO_AFTER_S", NEVER_S)
    monkeypatch.setattr(session_module, "HELLO_EVERY_S", NEVER_S)


@pytest.fixture
def scheduler(schedulers: Callable[[], Scheduler]) -> Scheduler:
    return schedulers()


@pytest.fixture
def worker(model: PagedModel, directory: Path, scheduler: Scheduler) -> Iterator[Worker]:
    """Connects to `scheduler`."""
    made = Worker(model, directory, lookahead=1)
    yield made
    made.close()


def register(scheduler: Scheduler, epoch: int = 1, registration: int = 1) -> None:
    scheduler.recv(WorkerHello)
    scheduler.welcome(epoch, registration)


def compute(scheduler: Scheduler, epoch: int = 1, registration: int = 1) -> list[int]:
    """Three steps from the first on; their tokens."""
    scheduler.say(first_plan(epoch, registration), next_plan(1, epoch, registration))
    results = [scheduler.recv(StepResult)]
    scheduler.say(next_plan(2, epoch, registration))
    results += [scheduler.recv(StepResult) for _ in range(2)]
    assert [(one.epoch, one.registration, one.step) for one in results] == [(epoch, registration, n) for n in range(3)]
    return [int(one.token[0]) for one in results]


def test_files_are_fetched_then_plans_are_computed_then_the_worker_leaves(scheduler: Scheduler, worker: Worker) -> None:
    info = scheduler.recv(WorkerHello).files[0]
    got = b""
    while len(got) < info.size:
        scheduler.say(FetchFile(name=info.name, offset=len(got)))
        chunk = scheduler.recv(FileChunk)
        assert (chunk.name, chunk.offset) == (info.name, len(got))
        assert chunk.data
        got += chunk.data
    assert hashlib.sha256(got).hexdigest() == info.sha256
    scheduler.welcome()
    compute(scheduler)
    worker.link.inbox.put(Stop())
    assert scheduler.recv(Goodbye).reason == "stopped"
    assert worker.end() is None


def test_a_hello_that_is_not_answered_is_repeated_and_both_answers_do(scheduler: Scheduler, worker: Worker) -> None:
    scheduler.recv(WorkerHello)
    scheduler.recv(WorkerHello)
    scheduler.welcome(registration=1)
    tokens = compute(scheduler, registration=1)
    scheduler.welcome(registration=2)  # of the second hello: its plans begin anew
    assert compute(scheduler, registration=2) == tokens
    assert worker.error is None


def test_a_welcome_that_is_repeated_changes_nothing(patient: None, scheduler: Scheduler, worker: Worker) -> None:
    register(scheduler)
    compute(scheduler)
    scheduler.welcome()
    scheduler.say(next_plan(3))
    assert scheduler.recv(StepResult).step == 3


def test_a_welcome_with_steps_in_flight_waits_for_them(patient: None, scheduler: Scheduler, worker: Worker) -> None:
    register(scheduler)
    scheduler.say(first_plan(), next_plan(1))
    scheduler.welcome(registration=2)
    scheduler.say(next_plan(2), first_plan(registration=2))  # the former registration's plans are nobody's now
    found = [scheduler.recv(StepResult) for _ in range(3)]
    assert [(one.registration, one.step) for one in found] == [(1, 0), (1, 1), (2, 0)]
    assert found[0].token.tolist() == found[2].token.tolist()


def test_unknown_peer_twice_is_one_new_registration(patient: None, scheduler: Scheduler, worker: Worker) -> None:
    register(scheduler)
    tokens = compute(scheduler)
    scheduler.recv(Idle)  # so nothing is in flight
    scheduler.say(UnknownPeer(epoch=1), UnknownPeer(epoch=1))
    register(scheduler, registration=2)
    scheduler.say(first_plan(registration=2))
    while not isinstance(message := scheduler.recv(object), StepResult):
        assert not isinstance(message, WorkerHello), "the second UnknownPeer was taken for news"
    assert message.token[0] == tokens[0]


def test_unknown_peer_before_the_welcome_answers_what_was_sent_before(
    patient: None, scheduler: Scheduler, worker: Worker
) -> None:
    scheduler.recv(WorkerHello)
    scheduler.say(UnknownPeer(epoch=1), UnknownPeer(epoch=1))
    scheduler.welcome()
    scheduler.say(first_plan())
    while not isinstance(message := scheduler.recv(object), StepResult):
        assert not isinstance(message, WorkerHello)


def test_a_registered_worker_tells_its_idleness_at_its_own_pace(
    patient: None, scheduler: Scheduler, worker: Worker
) -> None:
    """Not at the pace of hellos, which is an hour here."""
    register(scheduler)
    compute(scheduler)
    for _ in range(2):
        idle = scheduler.recv(Idle)
        assert (idle.epoch, idle.registration, idle.step) == (1, 1, 3)


def test_a_question_is_answered_after_the_plans_before_it(patient: None, scheduler: Scheduler, worker: Worker) -> None:
    """So an answer that awaits a step means that its plan, sent before the question, is lost."""

    def answer(number: int) -> tuple[int, int, int]:
        scheduler.say(Ping(), Ping(number=number))
        while not (isinstance(said := scheduler.recv(object), Idle) and said.heard >= number):
            assert not isinstance(said, WorkerHello)
        return said.registration, said.step, said.heard

    register(scheduler)
    assert answer(1) == (1, 0, 1)
    scheduler.say(first_plan(), next_plan(1))
    assert answer(2) == (1, 2, 2)
    scheduler.say(UnknownPeer(epoch=1))
    register(scheduler, 1, 2)
    assert answer(1) == (2, 0, 1)


def test_idleness_is_told_soon_after_each_spell_of_work(
    patient: None, monkeypatch: pytest.MonkeyPatch, scheduler: Scheduler, worker: Worker
) -> None:
    """And not only at the pace of one that stays idle, which is an hour here."""
    monkeypatch.setattr(session_module, "IDLE_AFTER_S", NEVER_S)
    register(scheduler)
    compute(scheduler)
    assert scheduler.recv(Idle).step == 3
    scheduler.say(next_plan(3))
    assert scheduler.recv(StepResult).step == 3
    assert scheduler.recv(Idle).step == 4


def test_a_scheduler_that_can_be_reached_again_is_told_of_idleness_at_once(
    patient: None, monkeypatch: pytest.MonkeyPatch, scheduler: Scheduler, worker: Worker
) -> None:
    """It may be another one, which answers that it does not know the worker."""
    for name in ("FIRST_IDLE_AFTER_S", "IDLE_AFTER_S"):
        monkeypatch.setattr(session_module, name, NEVER_S)
    register(scheduler)
    compute(scheduler)
    assert worker.pipeline.drain(DEADLINE_S)
    worker.link.inbox.put(Reachable())
    assert scheduler.recv(Idle).step == 3


def test_a_scheduler_that_is_born_again_is_registered_with(
    schedulers: Callable[[], Scheduler], model: PagedModel, directory: Path
) -> None:
    first = schedulers()
    worker = Worker(model, directory, lookahead=1)
    try:
        register(first, epoch=1)
        tokens = compute(first)
        second = schedulers()
        second.recv(Idle)
        second.say(UnknownPeer(epoch=2))
        register(second, epoch=2, registration=1)  # numbers of registrations begin anew with an epoch
        assert compute(second, epoch=2) == tokens
    finally:
        worker.close()


def test_a_worker_that_is_there_first_greets_the_scheduler_when_it_comes(
    patient: None, schedulers: Callable[[], Scheduler], model: PagedModel, directory: Path
) -> None:
    worker = Worker(model, directory, lookahead=1)
    try:
        scheduler = schedulers()
        register(scheduler)
        compute(scheduler)
    finally:
        worker.close()


def test_a_worker_that_finds_no_scheduler_says_so_once_and_goes_on(
    schedulers: Callable[[], Scheduler],
    model: PagedModel,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(session_module, "HELLO_AFTER_S", 0.001)
    monkeypatch.setattr(session_module, "HELLO_EVERY_S", 0.004)
    told = threading.Event()

    def notice(record: logging.LogRecord) -> bool:
        if "has answered" in record.getMessage():
            told.set()
        return True

    caplog.handler.addFilter(notice)
    worker = Worker(model, directory, lookahead=1)
    try:
        assert told.wait(DEADLINE_S)
        scheduler = schedulers()
        register(scheduler)
        compute(scheduler)
    finally:
        worker.close()
    assert caplog.text.count(f"no scheduler has answered at ipc://{directory} yet") == 1


def test_a_scheduler_that_leaves_is_greeted_again(patient: None, scheduler: Scheduler, worker: Worker) -> None:
    register(scheduler)
    scheduler.say(first_plan(), next_plan(1), Goodbye(reason="stopping"), Goodbye(reason="stopping"))
    assert [scheduler.recv(StepResult).step for _ in range(2)] == [0, 1]
    register(scheduler, registration=2)
    compute(scheduler, registration=2)


@pytest.mark.parametrize(
    ("refusal", "story"),
    [
        (VersionRefused(version=PROTOCOL_VERSION + 1), f"protocol version {PROTOCOL_VERSION + 1}"),
        (Goodbye(reason="differs in vocab_size", final=True), "refuses this worker: differs in vocab_size"),
    ],
)
def test_a_refusal_is_final(refusal: object, story: str, scheduler: Scheduler, worker: Worker) -> None:
    scheduler.recv(WorkerHello)
    scheduler.say(refusal)
    error = worker.end()
    assert isinstance(error, ServiceUnavailable)
    assert story in str(error)
    assert story in scheduler.recv(Goodbye).reason


@pytest.mark.parametrize("plan", [next_plan(5), replace(first_plan(), chunk_length=ints(9))])
def test_a_plan_that_cannot_be_executed_is_a_new_registration(
    plan: StepPlan, patient: None, scheduler: Scheduler, worker: Worker
) -> None:
    register(scheduler)
    scheduler.say(plan)
    register(scheduler, registration=2)
    compute(scheduler, registration=2)


class Step:
    """A step that hangs until `go` is set and fails then."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> Any:
        self.begun.set()
        self.go.wait(DEADLINE_S)
        raise RuntimeError("the device is on fire")


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Step]:
    made = Step()
    monkeypatch.setattr(PagedModel, "hidden", lambda *_, **__: made())
    yield made
    made.go.set()


def test_a_failing_step_ends_the_session_and_the_scheduler_is_told(
    scheduler: Scheduler, step: Step, worker: Worker
) -> None:
    register(scheduler)
    step.go.set()
    scheduler.say(first_plan())
    assert "the device is on fire" in scheduler.recv(Goodbye).reason
    assert "the device is on fire" in str(worker.end())


@pytest.mark.parametrize(
    "waiting", [Stop(), Goodbye(reason="stopping"), UnknownPeer(epoch=2)], ids=lambda one: type(one).__name__
)
def test_a_step_that_fails_while_something_else_waits_ends_the_session(
    waiting: object, scheduler: Scheduler, step: Step, worker: Worker
) -> None:
    """The failure comes to the inbox behind what is waiting, which must not wait for the step in turn."""
    register(scheduler)
    scheduler.say(first_plan(), next_plan(1))
    assert step.begun.wait(DEADLINE_S)
    worker.link.inbox.put(waiting)
    step.go.set()
    scheduler.recv(Goodbye)
    error = worker.end()
    # If the second plan was still on its way when the step failed, its launch tells of the failure before the Stop.
    assert "on fire" in str(error) or (error is None and isinstance(waiting, Stop))


def test_a_step_that_hangs_does_not_keep_a_worker_from_leaving(
    monkeypatch: pytest.MonkeyPatch, scheduler: Scheduler, step: Step, worker: Worker
) -> None:
    monkeypatch.setattr(session_module, "LEAVE_S", 0.05)
    register(scheduler)
    scheduler.say(first_plan())
    assert step.begun.wait(DEADLINE_S)
    worker.link.inbox.put(Stop())
    assert scheduler.recv(Goodbye).reason == "stopped"
    assert worker.end() is None
    assert not step.go.is_set()
    step.go.set()
