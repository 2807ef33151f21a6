"""A pipeline of a tiny model, driven plan by plan, whose rows may follow grammars."""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tandem.protocol.messages import StepPlan, StepResult
from tandem.protocol.structured import StructuredOutputsParams
from tandem.worker.grammars.book import GrammarBook
from tandem.worker.pipeline import Pipeline

from support.deadlines import DEADLINE_S
from support.paged import load_tiny, quiet
from support.tiny_models import EOS, VOCAB, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


def joining(step: int, slot: int, wanted: StructuredOutputsParams | None, **changes: Any) -> StepPlan:
    plan = StepPlan(
        epoch=1,
        registration=1,
        step=step,
        join_slot=ints(slot),
        join_number=np.array([slot], np.int64),
        join_attempt=ints(0),
        join_prompt_length=ints(2),
        join_length=ints(2),
        join_computed=ints(0),
        join_num_blocks=ints(1),
        join_token=ints(5, 6),
        join_block=ints(slot),
        join_temperature=np.zeros(1, np.float32),
        join_top_k=ints(0),
        join_top_p=np.ones(1, np.float32),
        join_seed=np.zeros(1, np.int64),
        chunk_slot=ints(slot),
        chunk_length=ints(2),
    )
    if wanted is not None:
        plan = replace(plan, grammars=(wanted,), join_grammar=ints(0))
    return replace(plan, **changes)


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
