"""Executes plans, one step queued behind the other.

                 plan N+1                        result N
    host thread ── layout, lane, launch ──┐   ┌── wait for the event, read the lane ── result thread
                                          ▼   │
    device         … step N ─────────── step N+1 …

The host thread lays out and launches a step as soon as its plan is there, while the step before still runs; the result
thread sleeps until a step's tokens are in host memory and hands them on. Neither waits for the other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np

from ..protocol.errors import ProtocolError
from ..protocol.messages import StepPlan, StepResult
from .executor import StepEvent, open_executor
from .model import PagedModel
from .rows import HostRows
from .staging import Lane, input_capacity
from .state import DeviceState, stage


class Pipeline:
    """One worker's batch. `launch` is called from one thread; `on_result` and `on_failure` are called from the result
    thread."""

    def __init__(
        self,
        model: PagedModel,
        *,
        num_blocks: int,
        block_size: int,
        slots: int,
        max_model_len: int,
        max_tokens: int,
        lookahead: int,
        on_result: Callable[[StepResult], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._model = model
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._slots = slots
        self._max_tokens = max_tokens
        self._width = -(-max_model_len // block_size)
        self._on_result = on_result
        self._on_failure = on_failure
        capacity = input_capacity(slots, num_blocks, max_tokens)
        self._lanes = [
            Lane(index, inputs=capacity, outputs=slots, device=model.device) for index in range(lookahead + 1)
        ]
        self._executor = open_executor(model.device)
        self._launched: queue.SimpleQueue[tuple[StepPlan, Lane, int, StepEvent] | None] = queue.SimpleQueue()
        self._next_step = 0
        self._finished_steps = 0
        self._progress = threading.Condition()
        self.reset()
        self._thread = threading.Thread(target=self._return_results, name="results", daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Forgets all rows, for a new registration. Nothing may be in flight (see `drain`)."""
        self._rows = HostRows(self._slots, self._width, self._num_blocks, self._max_tokens)
        self._state = DeviceState(self._model, slots=self._slots, width=self._width, block_size=self._block_size)
        self._next_step = self._finished_steps = 0

    @property
    def next_step(self) -> int:
        return self._next_step

    @property
    def idle(self) -> bool:
        """Everything launched has come to its end."""
        return self._finished_steps == self._next_step

    def launch(self, plan: StepPlan) -> None:
        """Queues a plan's step. Waits only if more than lookahead + 1 steps are in flight, which no scheduler plans.

        Raises ProtocolError for a plan out of turn or that does not follow from those before; the pipeline is then
        unusable until `drain` and `reset`.
        """
        if plan.step != self._next_step:
            raise ProtocolError(f"plan {plan.step} came where plan {self._next_step} was due")
        step = self._rows.apply(plan, self._block_size)
        lane = self._lanes[plan.step % len(self._lanes)]
        lane.acquire()
        staged = stage(step, lane)
        sampled = len(step.sampled_rows)
        state = self._state
        event = self._executor.launch(lane, lambda: state.run(staged), sampled)
        self._next_step += 1
        self._launched.put((plan, lane, sampled, event))

    def drain(self) -> None:
        """Waits until everything launched has come to its end."""
        with self._progress:
            self._progress.wait_for(lambda: self._finished_steps == self._next_step)

    def close(self) -> None:
        """Waits for what is in flight and ends the threads."""
        self._launched.put(None)
        self._thread.join()
        self._executor.close()

    def _return_results(self) -> None:
        while (entry := self._launched.get()) is not None:
            plan, lane, sampled, event = entry
            try:
                busy_us, gap_us = event.wait()
            except BaseException as error:  # noqa: BLE001 - reported by the owner of the process, which ends
                self._on_failure(error)
                return
            token = lane.sampled_host[:sampled].numpy().astype(np.int32, copy=True)
            lane.release()
            result = StepResult(
                epoch=plan.epoch,
                registration=plan.registration,
                step=plan.step,
                token=token,
                busy_us=busy_us,
                gap_us=0 if plan.after_idle else gap_us,
            )
            self._on_result(result)
            with self._progress:
                self._finished_steps += 1
                self._progress.notify_all()
