"""Which slots of the device batch follow a grammar, as the plans have made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ProtocolError
from ...protocol.messages import StepPlan
from ...protocol.structured import StructuredOutputsParams


@dataclass(frozen=True, slots=True)
class JoiningRow:
    """A row that gets a grammar, and what it has generated."""

    slot: int
    wanted: StructuredOutputsParams
    generated: list[int]


@dataclass(frozen=True, slots=True)
class GrammarStep:
    """What grammars have to do with one step."""

    leave: Sequence[int]
    """Slots that lose theirs before the step …"""
    join: Sequence[JoiningRow]
    """… and those that get one."""
    slots: Sequence[int]
    """[G]: slots with a grammar that the step samples for …"""
    at: NDArray[np.int32]
    """[G]: … where among the sampled rows …"""
    decodes: Sequence[bool]
    """[G]: … and whether the step before sampled for them too."""


class GrammarSlots:
    """The host's column of rows that have a grammar."""

    def __init__(self, slots: int) -> None:
        self._has = np.zeros(slots, np.bool_)
        self._count = 0

    def apply(self, plan: StepPlan, sampled_slots: NDArray[np.int32], decode_rows: int) -> GrammarStep | None:
        """Moves the column past a plan; None if no row had a grammar or has one. `sampled_slots`: the slots that the
        step samples for, `decode_rows` decoding ones first. Raises ProtocolError for columns that do not fit."""
        if not self._count and not len(plan.join_grammar):
            return None
        leave = plan.leave[self._has[plan.leave]]
        self._has[leave] = False
        join = self._join(plan) if len(plan.join_grammar) else []
        self._count += len(join) - len(leave)
        at = np.flatnonzero(self._has[sampled_slots]).astype(np.int32)
        return GrammarStep(
            leave=leave.tolist(),
            join=join,
            slots=sampled_slots[at].tolist(),
            at=at,
            decodes=(at < decode_rows).tolist(),
        )

    def _join(self, plan: StepPlan) -> list[JoiningRow]:
        which = plan.join_grammar
        if len(which) != len(plan.join_slot) or int(which.min()) < -1 or int(which.max()) >= len(plan.grammars):
            raise ProtocolError(f"plan {plan.step}: join_grammar does not fit join_slot or grammars")
        ends = np.cumsum(plan.join_length)
        starts = ends - plan.join_length + plan.join_prompt_length
        rows = [
            JoiningRow(int(plan.join_slot[i]), plan.grammars[which[i]], plan.join_token[starts[i] : ends[i]].tolist())
            for i in np.flatnonzero(which >= 0)
        ]
        self._has[[row.slot for row in rows]] = True
        return rows
