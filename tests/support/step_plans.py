"""Plans for a pipeline that is driven by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tandem.protocol.messages import StepPlan


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


def joining(step: int, slot: int, tokens: list[int], blocks: list[int], **changes: Any) -> StepPlan:
    """A plan in which one greedy row joins and computes all its tokens."""
    plan = StepPlan(
        epoch=1,
        registration=1,
        step=step,
        join_slot=ints(slot),
        join_number=np.array([slot], np.int64),
        join_attempt=ints(0),
        join_prompt_length=ints(len(tokens)),
        join_length=ints(len(tokens)),
        join_computed=ints(0),
        join_num_blocks=ints(len(blocks)),
        join_token=ints(*tokens),
        join_block=ints(*blocks),
        join_temperature=np.zeros(1, np.float32),
        join_top_k=ints(0),
        join_top_p=np.ones(1, np.float32),
        join_seed=np.zeros(1, np.int64),
        chunk_slot=ints(slot),
        chunk_length=ints(len(tokens)),
    )
    return replace(plan, **changes)
