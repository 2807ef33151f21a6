"""Gates: the order of tickets, and a pipeline whose device, played by a thread here, waits at them for masks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.protocol.messages import StepPlan
from tandem.protocol.structured import StructuredOutputsParams
from tandem.worker import pipeline as pipeline_module
from tandem.worker.executor import StepEvent
from tandem.worker.gate import Gate, open_gates
from tandem.worker.grammars.masks import MaskThread
from tandem.worker.staging import Lane

from support.deadlines import DEADLINE_S
from support.grammar_rig import TOKENIZER, Rig, joining, masks_held_back
from support.step_plans import ints

ABC = StructuredOutputsParams(regex="abc")


class Watched(Gate):
    """A thread stands in for the stream."""

    def __init__(self) -> None:
        super().__init__(None, torch.zeros(1, dtype=torch.int32))
        self.moved = threading.Condition()
        self.reached = threading.Event()

    def passes(self, ticket: int) -> bool:
        """As the device compares: (int32_t)(*address - value) >= 0."""
        return (int(self._number[0]) - ticket) % 2**32 < 2**31

    def open(self, ticket: int) -> bool:
        with self.moved:
            opened = super().open(ticket)
            self.moved.notify_all()
            return opened

    def break_open(self) -> None:
        with self.moved:
            super().break_open()
            self.moved.notify_all()

    def wait(self, ticket: int, stream: Any) -> None:
        self.reached.set()
        with self.moved:
            assert self.moved.wait_for(lambda: self.passes(ticket), DEADLINE_S)


@pytest.mark.parametrize("last", [0, 5, 2**31 - 2, 2**32 - 2])
def test_a_ticket_passes_once_it_or_a_later_one_is_opened(last: int) -> None:
    gate = Watched()
    gate._last = last
    assert gate.open(last)
    tickets = [gate.close() for _ in range(3)]
    assert [gate.passes(ticket) for ticket in tickets] == [False] * 3
    for count, ticket in enumerate(tickets, start=1):
        assert gate.open(ticket)
        assert [gate.passes(one) for one in tickets] == [index < count for index in range(3)]


@pytest.mark.parametrize("last", [0, 2**32 - 2])
def test_a_broken_gate_stays_open_and_says_so(last: int) -> None:
    gate = Watched()
    gate._last = last
    ticket, later = gate.close(), gate.close()
    gate.break_open()
    assert not gate.open(ticket)
    assert gate.passes(later)
    assert gate.passes(gate.close())


@pytest.mark.parametrize("refusal", ["missing", "an error"])
def test_where_the_device_cannot_wait_there_are_no_gates(
    refusal: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    zeros, refused = torch.zeros, SimpleNamespace(name="CUDA_ERROR_NOT_SUPPORTED")
    driver = SimpleNamespace(
        cuStreamWaitValue32=lambda *_: (refused,),
        CUstreamWaitValue_flags=SimpleNamespace(CU_STREAM_WAIT_VALUE_GEQ=0),
        CUresult=SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS")),
    )
    bindings = ModuleType("cuda.bindings")
    if refusal == "an error":
        monkeypatch.setattr(bindings, "driver", driver, raising=False)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    assert open_gates(torch.device("cuda"), lookahead=1) == [None, None]
    assert len(caplog.records) == 1
    assert open_gates(torch.device("cuda"), lookahead=2) == [None] * 3
    assert open_gates(torch.device("cpu"), lookahead=0) == [None]
    assert len(caplog.records) == 1


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    made = [Watched() for _ in range(3)]
    monkeypatch.setattr(pipeline_module, "open_gates", lambda *_: made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return made


@pytest.fixture
def masks_may_come() -> Iterator[threading.Event]:
    with masks_held_back() as may:
        yield may


def test_the_device_waits_and_what_takes_many_launches_is_not_queued_behind_it(
    tmp_path: Path, gates: list[Watched], masks_may_come: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    started: list[int] = []
    launch = rig.pipeline._executor.launch

    def noting(lane: Lane, compute: Any, sampled: int) -> StepEvent:
        started.append(lane.step)
        assert lane.step == 0 or masks_may_come.is_set()
        return launch(lane, compute, sampled)

    monkeypatch.setattr(rig.pipeline._executor, "launch", noting)
    rig.pipeline.launch(joining(0, 1, ABC))
    assert gates[0].reached.wait(DEADLINE_S)
    rig.pipeline.launch(joining(1, 2, None))
    rig.pipeline.launch(StepPlan(epoch=1, registration=1, step=2))
    masks_may_come.set()
    got = [rig.result() for _ in range(3)]
    assert started == [0, 1, 2]
    assert [one.step for one in got] == [0, 1, 2]
    assert "".join(str(TOKENIZER.id_to_token(int(one.token[0]))) for one in got) == "abc"
    assert rig.pipeline.drain(DEADLINE_S)
    rig.pipeline.reset()
    rig.pipeline.launch(joining(0, 1, ABC))
    assert TOKENIZER.id_to_token(int(rig.result().token[0])) == "a"
    rig.pipeline.close(DEADLINE_S)


def test_what_was_sampled_without_masks_is_no_result(
    tmp_path: Path, gates: list[Watched], masks_may_come: threading.Event
) -> None:
    """A worker ends while masks take too long: its gates are broken open, and the masks come when it is too late."""
    rig = Rig(tmp_path)
    rig.pipeline.launch(joining(0, 1, ABC))
    assert gates[0].reached.wait(DEADLINE_S)
    ended = threading.Event()

    def end() -> None:
        rig.pipeline.close(0.05)
        ended.set()

    closing = threading.Thread(target=end)
    closing.start()
    with gates[0].moved:
        assert gates[0].moved.wait_for(lambda: gates[0]._broken, DEADLINE_S)
    masks_may_come.set()
    assert "ending" in str(rig.failures.get(timeout=DEADLINE_S))
    closing.join(DEADLINE_S)
    assert ended.is_set()
    assert rig.results.empty()
    rig.pipeline._thread.join(DEADLINE_S)
    assert rig.pipeline._masks is not None
    rig.pipeline._masks._thread.join(DEADLINE_S)


def test_a_mask_thread_that_fails_leaves_nobody_at_a_gate(
    tmp_path: Path, gates: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        assert gates[0].reached.wait(DEADLINE_S)
        raise RuntimeError("masks are out")

    monkeypatch.setattr(MaskThread, "_fill", fail)
    rig = Rig(tmp_path)
    rig.pipeline.launch(joining(0, 1, ABC))
    assert "masks are out" in str(rig.failures.get(timeout=DEADLINE_S))
    with pytest.raises(RuntimeError, match="masks are out"):
        rig.pipeline.drain(DEADLINE_S)
    rig.pipeline.close(DEADLINE_S)
    assert rig.results.empty()
    assert rig.failures.empty()


@pytest.mark.parametrize("wanted", [None, ABC], ids=["free", "structured"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_the_rows_that_fill_the_head_up(
    wanted: StructuredOutputsParams | None, temperature: float, tmp_path: Path
) -> None:
    found = []
    for sizes in ((), (1, 2, 4), (8,)):
        rig = Rig(tmp_path / str(len(sizes)))
        rig.pipeline._state.head_rows = sizes
        for step, slot in enumerate((0, 2, 3)):
            chosen = {"join_temperature": np.array([temperature], np.float32), "join_seed": np.array([slot], np.int64)}
            rig.pipeline.launch(joining(step, slot, wanted if slot == 2 else None, **chosen))
        found.append([rig.result().token.tolist() for _ in range(3)])
        rig.pipeline.launch(StepPlan(epoch=1, registration=1, step=3, leave=ints(2)))  # the only one with a grammar
        rig.pipeline.launch(StepPlan(epoch=1, registration=1, step=4))
        found[-1] += [rig.result().token.tolist() for _ in range(2)]
        rig.pipeline.close(DEADLINE_S)
    assert [len(tokens) for tokens in found[0]] == [1, 2, 3, 2, 2]
    assert found == [found[0]] * 3
