"""Executes plans, one step queued behind the other.

                 plan N+1                        result N
    host thread ── layout, lane, launch ──┐   ┌── wait for the event, read the lane ── result thread
                                          ▼   │
    device         … step N ─────────── step N+1 …

The host thread lays out and launches a step as soon as its plan is there, while the step before still runs; the result
thread sleeps until a step's tokens are in host memory and hands them on. Neither waits for the other. In a step with
rows that follow a grammar the device stops before sampling until the mask thread (grammars/masks.py), which needs the
tokens of the step before, has opened the lane's gate; where there is no gate, the step is launched up to its sampling,
and the rest follows when the masks are there. No other step pays for that.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from ..protocol.errors import ProtocolError
from ..protocol.messages import MAX_COUNT, StepPlan, StepResult
from ..protocol.tracing import NO_TRACER, Tracer
from .executor import StepEvent, open_executor
from .features import StepFeatures
from .gate import open_gates
from .grammars.book import GrammarBook
from .grammars.masks import MaskThread, StepMasks
from .graphs import DecodeGraphs
from .launcher import Launcher
from .logprobs import unpack
from .model import PagedModel
from .pieces import piece_sizes
from .rows import HostRows, Step
from .staging import Lane, input_capacity
from .state import DeviceState, stage, stage_masks


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step between its plan and its result."""

    plan: StepPlan
    step: Step
    lane: Lane
    masks: StepMasks | None
    ticket: int = 0
    """For the lane's gate, which stands before what needs the masks."""


MOST_LAYERS: Final = 64
"""Of a model whose steps with chunks may be queued behind a closed gate. By graphs of pieces they take some nine
launches a layer; a driver is said to queue about a thousand."""
LAY_OUT, LAUNCH = range(2)
"""Kinds of spans of the host thread's track …"""
HAND_ON = 0
"""… and of the result thread's."""


class Pipeline:
    """One worker's batch. `launch` is called from one thread; `on_result` and `on_failure` are called from the result
    thread.

    What a step or `on_result` raises goes to `on_failure`, once. From then on `launch` and `drain` raise it too, and
    the pipeline is good for nothing but `close`.
    """

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
        grammars: GrammarBook | None = None,
        tracer: Tracer = NO_TRACER,
        nvtx: bool = False,
    ) -> None:
        """Without `grammars`, rows that are to follow one fail."""
        self._model = model
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._slots = slots
        self._max_tokens = max_tokens
        self._width = -(-max_model_len // block_size)
        self._on_result = on_result
        self._on_failure = on_failure
        self._book = grammars or GrammarBook(None, model.vocab_size, ())
        self._cutting = model.cutting
        cut = 0 if self._cutting is None else self._cutting.room(slots)
        capacity = input_capacity(slots, num_blocks, max_tokens, cut)
        self._lanes = [
            Lane(
                index,
                inputs=capacity,
                outputs=slots,
                device=model.device,
                mask_words=self._book.mask_words,
                gate=gate,
            )
            for index, gate in enumerate(open_gates(model.device, lookahead))
        ]
        self._awaited: StepMasks | None = None
        """Of the last step before whose sampling the device waits at a gate."""
        self._tracer = tracer
        self._track = tracer.track("host thread", "lay out", "launch")
        self._executor = open_executor(model.device, tracer, nvtx)
        self._result_track = tracer.track("result thread", "hand on")
        self._launcher = Launcher(self._fail)
        self._masks: MaskThread | None = None
        """From the first grammar on."""
        self._launched: queue.SimpleQueue[tuple[_Flight, StepEvent] | None] = queue.SimpleQueue()
        self._next_step = 0
        self._finished_steps = 0
        self._failure: BaseException | None = None
        self._progress = threading.Condition()
        self._state = DeviceState(model, slots=slots, width=self._width, block_size=block_size)
        self._graphs: DecodeGraphs | None = None
        self.reset()
        self._thread = threading.Thread(target=self._return_results, name="results", daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Forgets all rows, for a new registration. Nothing may be in flight (see `drain`)."""
        self._rows = HostRows(self._slots, self._width, self._num_blocks, self._max_tokens, self._model.vocab_size)
        self._state.clear()
        if self._masks is not None:
            self._masks.reset()
        if self._model.device.type == "cuda":
            # The cache and the state were filled on the default stream, which the compute stream does not wait for.
            torch.cuda.synchronize(self._model.device)
        self._next_step = self._finished_steps = 0
        self._awaited = None

    @property
    def next_step(self) -> int:
        return self._next_step

    @property
    def idle(self) -> bool:
        """Everything launched has come to its end, and its results are handed on."""
        return self._finished_steps == self._next_step

    def launch(self, plan: StepPlan) -> None:
        """Queues a plan's step, and does not wait for any other.

        Raises ProtocolError for a plan out of turn, one that does not follow from those before, or one beyond the
        lookahead + 1 that may be in flight; the pipeline is then unusable until `drain` and `reset`. Raises what an
        earlier step raised.
        """
        if self._failure is not None:
            raise self._failure
        if plan.step != self._next_step:
            raise ProtocolError(f"plan {plan.step} came where plan {self._next_step} was due")
        lane = self._lanes[plan.step % len(self._lanes)]
        if not lane.free:
            raise ProtocolError(
                f"plan {plan.step} came while {len(self._lanes)} steps are in flight, the most that this worker takes "
                "(lookahead + 1)"
            )
        at = self._track.start()
        step = self._rows.apply(plan, self._block_size)
        lane.acquire()
        lane.step = plan.step
        behind = self._gate_before(step)
        flight = self._with_masks(_Flight(plan, step, lane, None))
        self._track.end(LAY_OUT, plan.step, at)
        self._next_step += 1
        waits = behind is not None
        if flight.masks is not None and len(flight.masks.target):
            if lane.gate is not None:
                self._awaited = flight.masks
            elif self._executor.holds_caller:
                waits = True
        self._launcher.launch(lambda: self._start(flight, behind), waits=waits)

    def _gate_before(self, step: Step) -> StepMasks | None:
        """What opens a gate behind which a step of so many launches must not be queued (see gate.py); None if none is
        closed, or the launches are few."""
        if self._awaited is None or self._awaited.ready:
            return None
        if self._graphs is not None and self._graphs.take(step):
            return None
        few = self._model.takes_pieces(len(step.row_of_token)) and len(self._model.kv_spec) <= MOST_LAYERS
        return None if few else self._awaited

    def capture(self, sizes: Sequence[int], progress: Callable[[str, float], None]) -> None:
        """Captures CUDA graphs of decode steps of these numbers of rows, and, if the model is compiled, of what lies
        between the attention of other steps. Nothing may be in flight."""
        self._graphs = DecodeGraphs(self._state, sizes, progress)
        self._state.head_rows = sorted(sizes)
        pieces = piece_sizes(self._max_tokens)
        if pieces and self._model.compiled:
            self._model.capture_pieces(pieces, self._graphs.pool, progress)
        self.reset()

    def _with_masks(self, flight: _Flight) -> _Flight:
        """Hands the step's grammars, if it has any, over to the mask thread."""
        grammar, lane, gate = flight.step.grammar, flight.lane, flight.lane.gate
        if grammar is None:
            return flight
        if self._masks is None:
            self._masks = MaskThread(self._book, self._fail, self._tracer)
        masks, ticket = StepMasks(grammar, lane.masks(len(grammar.slots)), number=lane.step), 0
        if gate is not None:
            ticket = gate.close()
            masks.on_ready = partial(gate.open, ticket)
        self._masks.put(masks)
        return replace(flight, masks=masks, ticket=ticket)

    def _start(self, flight: _Flight, behind: StepMasks | None) -> None:
        """Queues a step on the device, in plan order; once the masks are there that it must not be queued before."""
        if behind is not None and self._masks is not None:
            self._masks.wait(behind)
        at = self._track.start()
        event = self._executor.launch(flight.lane, self._staged(flight), len(flight.step.sampled_rows))
        self._track.end(LAUNCH, flight.plan.step, at)
        self._launched.put((flight, event))

    def _staged(self, flight: _Flight) -> Callable[[], None]:
        """Writes the step into its lane; returns what launches it."""
        graphs, state, step, lane = self._graphs, self._state, flight.step, flight.lane
        masks = stage_masks(step, lane, lambda: self._collect(flight))
        if graphs is not None and graphs.take(step):
            decode = graphs.stage(step, lane, masks)
            return lambda: graphs.run(decode)
        staged = stage(step, lane, masks, self._cutting)
        return lambda: state.run(staged)

    def _collect(self, flight: _Flight) -> torch.Tensor:
        """Called between a step's forward pass and its sampling: the masks, on their way to the device."""
        thread, masks, gate = self._masks, flight.masks, flight.lane.gate
        if thread is None or masks is None:
            raise RuntimeError("a step without grammars waits for masks")
        if gate is None:
            self._executor.hold(lambda: thread.wait(masks))
        else:
            self._executor.hold(lambda: gate.wait(flight.ticket, torch.cuda.current_stream(self._model.device)))
        return flight.lane.send_masks(len(masks.target))

    def drain(self, timeout_s: float | None = None) -> bool:
        """Waits until everything launched has come to its end and its results are handed on; False if that took longer
        than `timeout_s`. Raises what a step raised."""
        with self._progress:
            over = self._progress.wait_for(lambda: self._failure is not None or self.idle, timeout_s)
            if self._failure is not None:
                raise self._failure
            return over

    def close(self, timeout_s: float) -> None:
        """Ends the threads once what is in flight has come to its end, or leaves them behind after `timeout_s`: they
        cannot be woken from a step that hangs, and do not keep the process alive."""
        end = time.monotonic() + timeout_s
        self._launcher.close(timeout_s)
        self._launched.put(None)
        self._thread.join(max(0.0, end - time.monotonic()))
        self._open_gates()
        self._executor.close(max(0.0, end - time.monotonic()))
        if self._masks is not None:
            self._masks.close(max(0.0, end - time.monotonic()))

    def _return_results(self) -> None:
        try:
            while (entry := self._launched.get()) is not None:
                self._return(*entry)
                with self._progress:
                    self._finished_steps += 1
                    self._progress.notify_all()
        except BaseException as error:  # noqa: BLE001 - reported by the owner of the process, which ends
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._progress:
            first = self._failure is None
            self._failure = self._failure or error
            self._progress.notify_all()
        if self._masks is not None:
            self._masks.fail(error)
        self._open_gates()
        if first:
            self._on_failure(error)

    def _open_gates(self) -> None:
        """For good: no more masks come. What the device goes on to sample without them is no result."""
        for lane in self._lanes:
            if lane.gate is not None:
                lane.gate.break_open()

    def _return(self, flight: _Flight, event: StepEvent) -> None:
        event.wait()
        at = self._result_track.start()
        plan, masks = flight.plan, flight.masks
        token = flight.lane.sampled_host[: len(flight.step.sampled_rows)].numpy().astype(np.int32, copy=True)
        if masks is not None and self._masks is not None:
            if len(masks.target):
                self._masks.wait(masks)  # a gate that was broken open lets the device go on without them
            self._masks.sampled(masks, token)  # before the device is asked again: it may wait for what follows from it
        times = event.times()
        told = {} if flight.step.features is None else _told(flight.step.features, flight.lane)
        flight.lane.release()  # before the result is out: the scheduler answers it with the lane's next plan
        result = StepResult(
            epoch=plan.epoch,
            registration=plan.registration,
            step=plan.step,
            token=token,
            busy_us=min(times.busy_us, MAX_COUNT),
            gap_us=min(times.held_us + (0 if plan.after_idle else times.gap_us), MAX_COUNT),
            kv_tokens=flight.step.kv_tokens,
            **told,
        )
        if masks is not None and masks.failed:
            result = replace(
                result,
                failed=np.array([position for position, _ in masks.failed], np.int32),
                failed_error=tuple(error for _, error in masks.failed),
            )
        self._on_result(result)
        self._result_track.end(HAND_ON, plan.step, at)


def _told(features: StepFeatures, lane: Lane) -> dict[str, Any]:
    """The result's columns of log-probabilities."""
    columns: dict[str, Any] = {}
    if lane.told is not None:
        told = unpack(lane.told.numpy(), features.told_entries)
        columns |= {"rank": told.rank, "entry_token": told.token, "entry_logprob": told.logprob}
    prompt = features.prompt
    if prompt is not None and lane.prompt_told is not None:
        told = unpack(lane.prompt_told.numpy(), np.repeat(prompt.entries, prompt.positions).astype(np.int32))
        columns |= {
            "prompt_rank": told.rank, "prompt_entry_token": told.token, "prompt_entry_logprob": told.logprob,
        }  # fmt: skip
    return columns
