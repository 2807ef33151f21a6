"""The pipeline on a CPU: plans in, results out, buffers owned by one step at a time; and plans that make no sense."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.protocol.codec import decode, encode
from tandem.protocol.errors import ProtocolError
from tandem.protocol.messages import MAX_COUNT, StepPlan, StepResult
from tandem.worker import executor as executor_module
from tandem.worker.executor import ThreadExecutor
from tandem.worker.model import PagedModel
from tandem.worker.pipeline import Pipeline
from tandem.worker.rows import HostRows
from tandem.worker.staging import Lane

from support.deadlines import DEADLINE_S
from support.paged import load_tiny
from support.step_plans import ints, joining

BLOCK_SIZE = 16


def steady(step: int, **changes: Any) -> StepPlan:
    return StepPlan(epoch=1, registration=1, step=step, **changes)


class Rig:
    """A pipeline on a tiny model, its results in a queue."""

    def __init__(self, folder: Path, lookahead: int) -> None:
        self.model, self.own = load_tiny("llama", folder)
        self.model.allocate_kv_cache(32, BLOCK_SIZE)
        self.results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.pipeline = Pipeline(
            self.model,
            num_blocks=32,
            block_size=BLOCK_SIZE,
            slots=4,
            max_model_len=128,
            max_tokens=64,
            lookahead=lookahead,
            on_result=self.results.put,
            on_failure=self.failures.put,
        )

    def result(self) -> StepResult:
        return self.results.get(timeout=DEADLINE_S)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(self.own(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, lookahead=2)
    yield made
    made.pipeline.close(DEADLINE_S)


def test_a_row_decodes_from_device_memory_while_its_tokens_are_on_their_way(rig: Rig) -> None:
    """Three steps are launched before any result is looked at."""
    prompt = [5, 6, 7]
    rig.pipeline.launch(joining(0, 2, prompt, [9]))
    rig.pipeline.launch(steady(1))
    rig.pipeline.launch(steady(2))
    got = [rig.result() for _ in range(3)]
    assert [one.step for one in got] == [0, 1, 2]
    assert [int(one.token[0]) for one in got] == rig.greedy(prompt, 3)
    # The first has a chunk; of the others each reads what was there and the token that it computes.
    assert [one.kv_tokens for one in got] == [0, 4, 5]


def test_a_slot_and_its_blocks_go_to_another_row_while_steps_that_use_them_are_in_flight(rig: Rig) -> None:
    first, second = [5, 6, 7, 8], [50, 51]
    rig.pipeline.launch(joining(0, 1, first, [3]))
    rig.pipeline.launch(steady(1))
    rig.pipeline.launch(joining(2, 1, second, [3], leave=ints(1)))
    got = [int(rig.result().token[0])]
    rig.pipeline.launch(steady(3))
    got += [int(rig.result().token[0]) for _ in range(3)]
    assert got[:2] == rig.greedy(first, 2)
    assert got[2:] == rig.greedy(second, 2)


def test_a_step_during_which_the_machine_was_suspended_has_a_result_that_can_be_sent(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is an hour after the one before, which no field of microseconds can hold."""
    clock = SimpleNamespace(perf_counter_ns=itertools.count(1, 3_600 * 10**9).__next__)
    monkeypatch.setattr(executor_module, "time", clock)
    rig.pipeline.launch(joining(0, 2, [5, 6, 7], [9]))
    rig.pipeline.launch(steady(1))
    rig.result()
    result = rig.result()
    assert (result.busy_us, result.gap_us) == (MAX_COUNT, MAX_COUNT)
    sent = decode(encode(result), StepResult)
    assert (sent.busy_us, sent.gap_us) == (MAX_COUNT, MAX_COUNT)


def test_a_new_registration_starts_from_nothing(rig: Rig) -> None:
    rig.pipeline.launch(joining(0, 1, [5, 6], [3]))
    rig.pipeline.drain()
    assert rig.pipeline.idle
    rig.pipeline.reset()
    rig.pipeline.launch(joining(0, 1, [7, 8], [3]))
    rig.result()
    assert int(rig.result().token[0]) == rig.greedy([7, 8], 1)[0]


def test_a_failing_step_is_reported_and_no_result_is_invented(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(PagedModel, "hidden", fail)
    rig.pipeline.launch(joining(0, 1, [5, 6], [3]))
    assert "on fire" in str(rig.failures.get(timeout=DEADLINE_S))
    assert rig.results.empty()
    with pytest.raises(RuntimeError, match="on fire"):
        rig.pipeline.drain(DEADLINE_S)
    with pytest.raises(RuntimeError, match="on fire"):
        rig.pipeline.launch(steady(1))


def test_a_result_that_cannot_be_handed_on_is_a_failure_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: StepResult) -> None:
        raise OSError("no way out")

    monkeypatch.setattr(rig.pipeline, "_on_result", refuse)
    rig.pipeline.launch(joining(0, 1, [5, 6], [3]))
    with pytest.raises(OSError, match="no way out"):
        rig.pipeline.drain(DEADLINE_S)
    assert "no way out" in str(rig.failures.get(timeout=DEADLINE_S))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Steps hang until it is set."""
    opened = threading.Event()
    hidden = PagedModel.hidden

    def waiting(self: PagedModel, batch: Any, **options: Any) -> Any:
        assert opened.wait(DEADLINE_S)
        return hidden(self, batch, **options)

    monkeypatch.setattr(PagedModel, "hidden", waiting)
    yield opened
    opened.set()


def test_a_plan_beyond_the_lookahead_is_refused_and_waits_for_nothing(rig: Rig, gate: threading.Event) -> None:
    rig.pipeline.launch(joining(0, 1, [5, 6], [3]))
    rig.pipeline.launch(steady(1))
    rig.pipeline.launch(steady(2))
    with pytest.raises(ProtocolError, match="plan 3 came while 3 steps are in flight"):
        rig.pipeline.launch(steady(3))
    gate.set()
    assert rig.pipeline.drain(DEADLINE_S)
    for _ in range(3):
        rig.result()
    rig.pipeline.reset()
    for step in range(12):  # each as soon as a result makes room, as a scheduler does
        rig.pipeline.launch(joining(0, 1, [5, 6], [3]) if step == 0 else steady(step))
        if step >= 2:
            rig.result()


def test_a_step_that_hangs_holds_up_neither_drain_nor_close_for_long(rig: Rig, gate: threading.Event) -> None:
    rig.pipeline.launch(joining(0, 1, [5, 6], [3]))
    assert not rig.pipeline.drain(0.01)
    assert not rig.pipeline.idle
    rig.pipeline.close(0.01)
    assert not gate.is_set()


def test_a_lane_is_not_written_before_its_step_is_over() -> None:
    """The most repeated failure elsewhere: a staging buffer rewritten before the copy from it ran."""
    lane = Lane(0, inputs=8, outputs=1, device=torch.device("cpu"))
    executor = ThreadExecutor()
    started, go_on = threading.Event(), threading.Event()
    lane.acquire()
    view = lane.put(ints(1, 2, 3))
    seen: list[list[int]] = []

    def blocked() -> None:
        started.set()
        go_on.wait(DEADLINE_S)

    other = Lane(1, inputs=8, outputs=1, device=torch.device("cpu"))
    other.acquire()
    executor.launch(other, blocked, 0)
    event = executor.launch(lane, lambda: seen.append(view.tolist()), 0)
    assert started.wait(DEADLINE_S)
    assert not lane.free  # the step that owns it has not even begun
    with pytest.raises(RuntimeError, match="lane 0 still belongs"):
        lane.acquire()
    go_on.set()
    event.wait()
    lane.release()
    lane.acquire()
    lane.put(ints(7, 8, 9))
    assert seen == [[1, 2, 3]]
    executor.close(DEADLINE_S)


@pytest.mark.parametrize(
    ("plan", "story"),
    [
        (steady(0), "tokens"),
        (steady(0, leave=ints(1)), "not in use"),
        (steady(0, grow_slot=ints(1), grow_block=ints(1)), "not in use"),
        (joining(0, 4, [1], [1]), "outside 0 to 3"),
        (joining(0, -1, [1], [1]), "outside 0 to 3"),
        (joining(0, 1, [1], [32]), "block id"),
        (joining(0, 1, [1], [-1]), "block id"),
        (joining(0, 1, [1] * 17, [1]), "no block"),
        (joining(0, 1, [1], [1], chunk_length=ints(2)), "known tokens"),
        (joining(0, 1, [1], [1], chunk_length=ints(0)), "known tokens"),
        (joining(0, 1, [1], [1], join_num_blocks=ints(2)), "join_num_blocks"),
        (joining(0, 1, [1], [1], join_length=ints(5)), "join_length"),
        (joining(0, 1, [1], [1], join_top_k=ints()), "join columns"),
        (joining(0, 1, [1], [1], join_computed=ints(3)), "known tokens"),
        (joining(0, 1, [1] * 65, [1, 2, 3, 4, 5]), "64 a step"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: StepPlan, story: str) -> None:
    rows = HostRows(slots=4, width=8, num_blocks=32, max_tokens=64, vocab_size=160)
    with pytest.raises(ProtocolError, match=story):
        rows.apply(plan, BLOCK_SIZE)
