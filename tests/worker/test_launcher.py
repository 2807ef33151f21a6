"""Steps that wait for masks, on an executor that queues on its caller's thread as CUDA's does: the host thread never
waits, and the order stays."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.protocol.messages import StepPlan
from tandem.protocol.structured import StructuredOutputsParams
from tandem.worker import pipeline as pipeline_module
from tandem.worker.executor import StepTimes
from tandem.worker.grammars.masks import MaskThread, StepMasks
from tandem.worker.launcher import Launcher
from tandem.worker.staging import Lane

from support.deadlines import DEADLINE_S
from support.grammar_rig import TOKENIZER, Rig, joining
from support.step_plans import ints
from support.tiny_models import EOS


class OnTheCallersThread:
    """Queues a step by running it, as far as the caller is concerned."""

    holds_caller = True

    def launch(self, lane: Lane, compute: Callable[[], None], sampled: int) -> OnTheCallersThread:
        lane.send()
        compute()
        lane.fetch(sampled)
        return self

    def hold(self, until: Callable[[], None]) -> None:
        until()

    def wait(self) -> None:
        pass

    def times(self) -> StepTimes:
        return StepTimes(0, 0, 0)

    def close(self, timeout_s: float) -> None:
        pass


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Masks are not there before it is set."""
    opened = threading.Event()
    wait = MaskThread.wait

    def waiting(self: MaskThread, step: StepMasks) -> None:
        assert opened.wait(DEADLINE_S)
        wait(self, step)

    monkeypatch.setattr(MaskThread, "wait", waiting)
    yield opened
    opened.set()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(pipeline_module, "open_executor", lambda *_: OnTheCallersThread())
    made = Rig(tmp_path)
    yield made
    made.pipeline.close(DEADLINE_S)


def test_the_host_thread_does_not_wait_for_masks_and_steps_stay_in_order(rig: Rig, gate: threading.Event) -> None:
    rig.pipeline.launch(joining(0, 1, StructuredOutputsParams(regex="abc")))
    rig.pipeline.launch(joining(1, 2, None))  # has no grammar of its own to wait for, but the row before it has
    rig.pipeline.launch(StepPlan(epoch=1, registration=1, step=2))
    assert rig.results.empty()
    gate.set()
    got = [rig.result() for _ in range(3)]
    assert [one.step for one in got] == [0, 1, 2]
    assert "".join(str(TOKENIZER.id_to_token(int(one.token[0]))) for one in got) == "abc"
    assert rig.pipeline.drain(DEADLINE_S)
    rig.pipeline.launch(StepPlan(epoch=1, registration=1, step=3))
    assert int(rig.result().token[0]) == EOS
    rig.pipeline.launch(StepPlan(epoch=1, registration=1, step=4, leave=ints(1)))
    assert len(rig.result().token) == 1  # again launched by the host thread itself


def test_a_grammar_that_fails_is_told_with_its_row(rig: Rig) -> None:
    generated = joining(0, 1, StructuredOutputsParams(regex="abc"), join_prompt_length=ints(1))
    rig.pipeline.launch(generated)
    result = rig.result()
    assert result.failed.tolist() == [0]
    assert "cannot be followed" in result.failed_error[0]


def test_a_new_registration_forgets_grammars(rig: Rig) -> None:
    rig.pipeline.launch(joining(0, 1, StructuredOutputsParams(regex="abc")))
    rig.result()
    assert rig.pipeline.drain(DEADLINE_S)
    rig.pipeline.reset()
    rig.pipeline.launch(joining(0, 1, StructuredOutputsParams(regex="xyz")))
    assert TOKENIZER.id_to_token(int(rig.result().token[0])) == "x"


def test_a_mask_thread_that_fails_fails_the_pipeline(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("masks are out")

    monkeypatch.setattr(MaskThread, "_fill", fail)
    rig.pipeline.launch(joining(0, 1, StructuredOutputsParams(regex="abc")))
    assert "masks are out" in str(rig.failures.get(timeout=DEADLINE_S))
    with pytest.raises(RuntimeError, match="masks are out"):
        rig.pipeline.drain(DEADLINE_S)


def test_what_need_not_wait_is_started_by_its_caller() -> None:
    launcher = Launcher(on_failure=lambda error: None)
    threads: queue.SimpleQueue[str] = queue.SimpleQueue()
    for waits in (False, True):
        launcher.launch(lambda: threads.put(threading.current_thread().name), waits=waits)
    names = [threads.get(timeout=DEADLINE_S) for _ in range(2)]
    launcher.close(DEADLINE_S)
    assert names == [threading.current_thread().name, "launches"]
