"""A device that computes nothing: it follows plans and knows how many tokens each step samples.

Columns indexed by slot; a step costs work for the rows that join, leave or compute chunks, and none for those that
decode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...protocol.errors import ProtocolError
from ...protocol.messages import StepPlan


@dataclass(frozen=True, slots=True)
class Executed:
    """What a step did."""

    decode_rows: int
    context_tokens: int
    """Of the decoding rows, before the step."""
    prefill_tokens: int
    completed: npt.NDArray[np.int32]
    """Slots whose chunk ended their known tokens, in the plan's order; each samples a token."""

    @property
    def sampled(self) -> int:
        return self.decode_rows + len(self.completed)


class SimulatedDevice:
    """The rows of one worker, as far as plans tell of them."""

    def __init__(self, slots: int) -> None:
        self._owned = np.zeros(slots, np.bool_)
        self._decoding = np.zeros(slots, np.bool_)
        self._remaining = np.zeros(slots, np.int64)
        """Known tokens that no step has computed yet."""
        self._context_base = np.zeros(slots, np.int64)
        """A decoding row has this many tokens of context plus one for each step that was executed."""
        self._length = np.zeros(slots, np.int64)
        self._num_decoding = 0
        self._sum_of_bases = 0
        self._steps = 0

    def execute(self, plan: StepPlan) -> Executed:
        """Executes the next plan. Raises ProtocolError if it does not follow from those before; the device must not be
        used then."""
        if plan.step != self._steps:
            raise ProtocolError(f"plan {plan.step} came where {self._steps} was due")
        if len(plan.leave):
            self._leave(plan.leave)
        if len(plan.join_slot):
            self._join(plan)
        if len(plan.grow_slot) and not self._owned[plan.grow_slot].all():
            raise ProtocolError(f"plan {plan.step} grows a slot that nobody owns")
        rows, context = self._num_decoding, self._sum_of_bases + self._num_decoding * self._steps
        completed, prefilled = plan.chunk_slot[:0], 0
        if len(plan.chunk_slot):
            completed, prefilled = self._compute_chunks(plan), int(plan.chunk_length.sum())
        self._steps += 1
        if len(completed):
            self._decoding[completed] = True
            # The token that this step samples is computed by the next: until then the context is what was known.
            self._context_base[completed] = self._length[completed] - self._steps
            self._num_decoding += len(completed)
            self._sum_of_bases += int(self._context_base[completed].sum())
        return Executed(rows, context, prefilled, completed)

    def decoding_slots(self) -> npt.NDArray[np.int64]:
        """Slots that the next step decodes unless its plan says that they leave, ascending."""
        return np.flatnonzero(self._decoding)

    def _leave(self, slots: npt.NDArray[np.int32]) -> None:
        if not self._owned[slots].all() or len(np.unique(slots)) != len(slots):
            raise ProtocolError(f"slots leave that nobody owns: {slots.tolist()}")
        over = slots[self._decoding[slots]]
        self._num_decoding -= len(over)
        self._sum_of_bases -= int(self._context_base[over].sum())
        self._decoding[slots] = False
        self._owned[slots] = False

    def _join(self, plan: StepPlan) -> None:
        slots = plan.join_slot
        if self._owned[slots].any() or len(np.unique(slots)) != len(slots):
            raise ProtocolError(f"slots join that are owned: {slots.tolist()}")
        self._owned[slots] = True
        self._length[slots] = plan.join_length
        self._remaining[slots] = plan.join_length - plan.join_computed
        if (self._remaining[slots] < 1).any():
            raise ProtocolError(f"plan {plan.step}: a row joins with nothing to compute")

    def _compute_chunks(self, plan: StepPlan) -> npt.NDArray[np.int32]:
        slots = plan.chunk_slot
        if not self._owned[slots].all() or self._decoding[slots].any() or len(np.unique(slots)) != len(slots):
            raise ProtocolError(f"plan {plan.step} has chunks of slots that are not in prefill: {slots.tolist()}")
        self._remaining[slots] -= plan.chunk_length
        if (plan.chunk_length < 1).any() or (self._remaining[slots] < 0).any():
            raise ProtocolError(f"plan {plan.step} has chunks that are empty or go past what is known")
        completed: npt.NDArray[np.int32] = slots[self._remaining[slots] == 0]
        return completed
