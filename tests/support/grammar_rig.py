"""A pipeline of a tiny model, driven plan by plan, whose rows may follow grammars."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.protocol.messages import StepPlan, StepResult
from tandem.protocol.structured import StructuredOutputsParams
from tandem.worker.grammars.book import GrammarBook
from tandem.worker.grammars.masks import MaskThread
from tandem.worker.pipeline import Pipeline

from support import step_plans
from support.deadlines import DEADLINE_S
from support.paged import load_tiny, quiet
from support.step_plans import ints
from support.tiny_models import EOS, VOCAB, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def joining(step: int, slot: int, wanted: StructuredOutputsParams | None, **changes: Any) -> StepPlan:
    """A plan in which a row of two tokens joins, with a grammar or without."""
    grammar: dict[str, Any] = {} if wanted is None else {"grammars": (wanted,), "join_grammar": ints(0)}
    return step_plans.joining(step, slot, [5, 6], [slot], **grammar, **changes)


@contextmanager
def masks_held_back() -> Iterator[threading.Event]:
    """Until it is set, no mask is filled."""
    may, fill = threading.Event(), MaskThread._fill

    def waiting(self: MaskThread, step: Any) -> None:
        assert may.wait(DEADLINE_S)
        fill(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskThread, "_fill", waiting)
        try:
            yield may
        finally:
            may.set()


class Rig:
    def __init__(self, folder: Path, lookahead: int = 2, **options: Any) -> None:
        """`options`: of the model."""
        model, _ = load_tiny("llama", folder, **options)
        if model.device.type == "cuda":
            model.compile()
        model.allocate_kv_cache(8, 16)
        self.results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.pipeline = Pipeline(
            model,
            num_blocks=8,
            block_size=16,
            slots=4,
            max_model_len=64,
            max_tokens=32,
            lookahead=lookahead,
            on_result=self.results.put,
            on_failure=self.failures.put,
            grammars=GrammarBook(TOKENIZER.to_str().encode(), VOCAB, (EOS,)),
        )
        if model.compiled:
            self.pipeline.capture([1, 2, 4], quiet)

    def result(self) -> StepResult:
        return self.results.get(timeout=DEADLINE_S)
