"""Where the device waits for the host: in the order of tickets, and in steps whose masks are not there yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.protocol.messages import StepPlan
from tandem.protocol.structured import StructuredOutputsParams
from tandem.worker.gate import Gate, open_gates
from tandem.worker.grammars.masks import MaskThread

from support.deadlines import DEADLINE_S
from support.grammar_rig import TOKENIZER, Rig, joining, masks_held_back

pytestmark = pytest.mark.gpu


@pytest.fixture
def gate() -> Iterator[Gate]:
    made, _ = open_gates(torch.device("cuda"), lookahead=1)
    assert made is not None
    yield made
    made.break_open()


class Queued:
    """A number that the device doubles behind a gate, on a stream of its own."""

    def __init__(self, gate: Gate, ticket: int) -> None:
        self.stream = torch.cuda.Stream()
        self.before, self.after = torch.cuda.Event(), torch.cuda.Event()
        self.number = torch.ones(1, device="cuda")
        self.number *= 1  # loads its kernel, for which the driver would wait for the device behind the gate
        torch.cuda._sleep(1)  # and so for this
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.before.record()
            gate.wait(ticket, self.stream)
            self.number *= 2
            self.after.record()

    def waits(self) -> bool:
        """For as long as another stream takes for a hundred times as much."""
        self.before.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            torch.cuda.current_stream().synchronize()
        return not self.after.query()

    def passes(self) -> bool:
        self.after.synchronize()
        return self.number.tolist() == [2.0]


def test_the_device_waits_until_its_ticket_is_opened(gate: Gate) -> None:
    ticket = gate.close()
    queued = Queued(gate, ticket)
    assert queued.waits()
    gate.open(ticket)
    assert queued.passes()
    assert Queued(gate, ticket).passes()  # it came when the gate was open
    assert Queued(gate, gate.close()).waits()


@pytest.mark.parametrize("last", [2**31 - 2, 2**32 - 2])
def test_numbers_may_run_over(gate: Gate, last: int) -> None:
    gate._last = last
    gate.open(last)
    for _ in range(3):
        ticket = gate.close()
        queued = Queued(gate, ticket)
        assert queued.waits()
        gate.open(ticket)
        assert queued.passes()


def test_a_broken_gate_stays_open(gate: Gate) -> None:
    ticket, later = gate.close(), gate.close()
    queued = Queued(gate, later)
    assert queued.waits()
    gate.break_open()
    assert queued.passes()
    gate.open(ticket)
    assert Queued(gate, gate.close()).passes()


@pytest.fixture
def masks_may_come() -> Iterator[threading.Event]:
    with masks_held_back() as may:
        yield may


def test_steps_are_queued_whole_before_the_masks_are_there(tmp_path: Path, masks_may_come: threading.Event) -> None:
    """One by graphs of pieces and one by graphs; whatever of them waited for the device would wait for ever."""
    rig = Rig(tmp_path, lookahead=1, device="cuda")
    try:
        for slot, at_once in ((0, True), (1, False)):  # the first loads what is loaded on first use
            if at_once:
                masks_may_come.set()
            first = rig.pipeline.next_step
            rig.pipeline.launch(joining(first, slot, StructuredOutputsParams(regex="abc")))
            rig.pipeline.launch(StepPlan(epoch=1, registration=1, step=first + 1))
            assert rig.pipeline._launcher._thread is None
            masks_may_come.set()
            got = [rig.result() for _ in range(2)]
            masks_may_come.clear()
            assert [one.step for one in got] == [first, first + 1]
            assert "".join(str(TOKENIZER.id_to_token(int(one.token[slot]))) for one in got) == "ab"
            assert rig.pipeline.drain(DEADLINE_S)
    finally:
        masks_may_come.set()
        rig.pipeline.close(DEADLINE_S)


def test_steps_of_many_launches_are_not_queued_behind_a_gate(tmp_path: Path, masks_may_come: threading.Event) -> None:
    """Without graphs they wait on a thread of their own, and the host thread does not."""
    rig = Rig(tmp_path, lookahead=1, device="cuda")
    rig.pipeline._graphs, rig.pipeline._model._pieces = None, None
    masks_may_come.set()
    rig.pipeline.launch(joining(0, 0, StructuredOutputsParams(regex="xyz")))  # loads what is loaded on first use
    try:
        assert TOKENIZER.id_to_token(int(rig.result().token[0])) == "x"
        assert rig.pipeline.drain(DEADLINE_S)
        masks_may_come.clear()
        rig.pipeline.launch(joining(1, 1, StructuredOutputsParams(regex="abc")))
        rig.pipeline.launch(StepPlan(epoch=1, registration=1, step=2))
        assert rig.pipeline._launcher._thread is not None
        masks_may_come.set()
        assert "".join(str(TOKENIZER.id_to_token(int(rig.result().token[1]))) for _ in range(2)) == "ab"
    finally:
        masks_may_come.set()
        rig.pipeline.close(DEADLINE_S)


def test_a_mask_thread_that_fails_leaves_no_device_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("masks are out")

    monkeypatch.setattr(MaskThread, "_fill", fail)
    rig = Rig(tmp_path, lookahead=1, device="cuda")
    rig.pipeline.launch(joining(0, 1, StructuredOutputsParams(regex="abc")))
    assert "masks are out" in str(rig.failures.get(timeout=DEADLINE_S))
    with pytest.raises(RuntimeError, match="masks are out"):
        rig.pipeline.drain(DEADLINE_S)
    torch.cuda.synchronize()
    rig.pipeline.close(DEADLINE_S)
    assert rig.results.empty()
