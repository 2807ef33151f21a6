"""Which tokens each row's grammar allows next, worked out on the CPU while the device runs the forward pass.

    result N-1  ─ tokens ─┐
                          ▼
    mask thread   advance the matchers, fill the masks of step N ──┐
                                                                   ▼
    step N        forward pass ─────────────────────────────── sampling

A step's masks need the tokens of the step before, and nothing else does: the forward pass is launched long before they
are there. A row that is known to be over, or whose grammar has failed, is advanced no more; what it still samples is
wasted, so any token will do.

Rows are advanced and their masks filled side by side, as far as they have lexers of their own: see book.py.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from ...protocol.structured import StructuredOutputsParams
from ...protocol.tracing import NO_TRACER, Tracer
from .book import GrammarBook, Lexer
from .compiler import GrammarError, error_of, raise_error
from .growth import Growth
from .sandbox import TOKEN_CPU_S
from .slots import GrammarStep, JoiningRow

MOST_THREADS: Final = 16
"""That fill masks of one step side by side."""
PARALLEL_FROM: Final = 2
"""Fewer rows are not worth handing to other threads."""
MOST_REPLAYED: Final = 512
"""Tokens that a row takes along to another lexer; one that has more stays with its own."""
MOVING_S: Final = 0.005
"""Processor time for rows to move before a step; the others move before the next. A row that takes longer by itself
stays: the tokens of a grammar that is read in many ways can take milliseconds each, and all rows wait for it."""
JOINING_S: Final = 1.0
"""Processor time in which a row that joins must take in the tokens that it has; if not, it fails, since all rows wait
for it. Of an ordinary grammar a hundred thousand take no longer."""
ALL_JOINING_S: Final = 3.0
"""For all that join in a step. When it is used up …"""
LEAST_JOINING_S: Final = 0.02
"""… each has this still: some two thousand tokens. So 256 rows that try to hold the worker up do so for no longer than
a lease is at least."""
SLOW_S: Final = 0.25
"""Masks of a step that took longer: in the next one each row's are timed, and a row whose own take more processor time
than TOKEN_CPU_S fails. A grammar is tried with the same limit before it is admitted, but for a few tokens: the masks of
some become slower with every one."""
REPLAYED_AT_ONCE: Final = 16
"""Tokens, before that time is looked at."""


def _nobody() -> bool:
    """Has to be told."""
    return True


@dataclass(slots=True)
class StepMasks:
    """The masks of one step's G rows with a grammar. Made for every step in which a row has one, and for the one that
    it leaves with."""

    rows: GrammarStep
    target: NDArray[np.int32]
    """[G, mask_words]: where they are to be written; bit t % 32 of word t // 32 allows token t."""
    failed: list[tuple[int, str]] = field(default_factory=list)
    """Where in the step's result a row stands whose grammar has failed, and why. Complete once the masks are."""
    number: int = -1
    """The step's, for the trace."""
    on_ready: Callable[[], bool] = _nobody
    """Called when the masks are written. False: it is too late, the device did not wait for them."""
    ready: bool = False
    """They were written before they were used."""
    tokens: NDArray[np.int32] | None = None
    """The step's result."""


@dataclass(slots=True, eq=False)
class _Row:
    """Of the batch, with a grammar."""

    wanted: StructuredOutputsParams
    lexer: Lexer | None = None
    """What the matcher shares with other rows …"""
    matcher: LLMatcher | None = None
    """… None, both: the row is over, or its grammar has failed."""
    taken: list[int] | None = None
    """What the matcher has taken in; None: the row stays with its lexer."""
    fresh: bool = True
    """No mask has been filled since it got its lexer, which may know nothing yet."""


MOVE, ADVANCE, FILL = range(3)
"""Kinds of spans of the thread's track."""


class MaskThread:
    """Fills the masks of steps, in the order in which they are handed over."""

    def __init__(
        self, book: GrammarBook, on_failure: Callable[[BaseException], None] | None = None, tracer: Tracer = NO_TRACER
    ) -> None:
        """`on_failure` is called on the thread with what it raised."""
        self._book = book
        self._on_failure = on_failure
        self._track = tracer.track("mask thread", "move", "advance", "fill")
        self._growth = Growth(book)
        self._grown = 0
        """What the book's count was when rows last moved."""
        self._executor = LLExecutor(min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2)))
        self._rows: dict[int, _Row] = {}
        """By slot."""
        self._failures: dict[int, str] = {}
        """By slot: what no step's result has told yet."""
        self._last: StepMasks | None = None
        self._was_slow = False
        """The last masks took longer than SLOW_S."""
        self._steps: queue.SimpleQueue[StepMasks | Callable[[], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="masks", daemon=True)
        self._thread.start()

    # --- for other threads -------------------------------------------------------------------------------------------

    def put(self, step: StepMasks) -> None:
        """Hands over the next step; waits for nothing."""
        self._steps.put(step)

    def sampled(self, step: StepMasks, tokens: NDArray[np.int32]) -> None:
        """The step's result is there."""
        with self._changed:
            step.tokens = tokens
            self._changed.notify_all()

    def wait(self, step: StepMasks) -> None:
        """Sleeps until the step's masks are written. Raises what the thread raised, or what `fail` was told."""
        with self._changed:
            self._changed.wait_for(lambda: step.ready or self._error is not None)
            if not step.ready and self._error is not None:
                raise self._error

    def fail(self, error: BaseException) -> None:
        """No result will come any more: whoever waits is woken."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def reset(self) -> None:
        """Forgets all rows. Every step that was handed over must have ended."""
        self._steps.put(self._forget)

    def close(self, timeout_s: float) -> None:
        """Ends the thread, or does not wait for it any longer; and what compiles for it, which may take
        `growth.CLOSE_S` more."""
        self._steps.put(None)
        self.fail(RuntimeError("the worker is ending"))
        self._thread.join(timeout_s)
        self._growth.close()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (step := self._steps.get()) is not None:
                if isinstance(step, StepMasks):
                    self._write(step)
                else:
                    step()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for masks, if one does
            self.fail(error)
            if self._on_failure is not None:
                self._on_failure(error)

    def _forget(self) -> None:
        for row in self._rows.values():
            self._end(row)
        self._rows.clear()
        self._failures.clear()
        self._last = None

    def _write(self, step: StepMasks) -> None:
        for slot in step.rows.leave:
            self._leave(slot)
        at = self._track.start()
        self._spread()  # while the device computes: the tokens of the step before are not there yet
        begun = time.thread_time()
        for joining in step.rows.join:
            self._leave(joining.slot)
            left = ALL_JOINING_S - (time.thread_time() - begun)
            self._rows[joining.slot] = self._join(joining, max(LEAST_JOINING_S, min(JOINING_S, left)))
        self._track.end(MOVE, step.number, at)
        if any(step.rows.decodes):
            self._advance(step)
        at = self._track.start()
        self._fill(step)
        self._track.end(FILL, step.number, at)
        for slot, position in zip(step.rows.slots, step.rows.at, strict=True):
            if slot in self._failures:
                step.failed.append((int(position), self._failures.pop(slot)))
        self._last = step
        step.ready = step.on_ready()
        with self._changed:
            self._changed.notify_all()

    def _join(self, joining: JoiningRow, limit_s: float) -> _Row:
        few = len(joining.generated) <= MOST_REPLAYED
        row = _Row(joining.wanted, taken=list(joining.generated) if few else None)
        try:
            row.lexer = self._book.lexer(row.wanted)
            row.matcher = row.lexer.copy()
            if not _replay(row.matcher, joining.generated, limit_s):
                raise_error(row.matcher)
                count = len(joining.generated)
                raise GrammarError(f"taking in its {count:,} tokens takes over {limit_s:.2g} s of processor time")
        except GrammarError as error:
            self._fail(joining.slot, row, str(error))
        if self._book.crowded(row.wanted):
            self._growth.want(row.wanted)
        return row

    def _leave(self, slot: int) -> None:
        row = self._rows.pop(slot, None)
        self._failures.pop(slot, None)
        if row is not None:
            self._end(row)

    def _end(self, row: _Row) -> None:
        """It is followed no more."""
        if row.lexer is not None:
            self._book.release(row.lexer)
        row.lexer = row.matcher = row.taken = None

    def _fail(self, slot: int, row: _Row, error: str) -> None:
        """What goes wrong with a grammar ends its own row."""
        self._end(row)
        self._failures[slot] = f"structured_outputs: the grammar cannot be followed any further: {error}"

    def _give_up(self, slot: int, error: str) -> None:
        """A limit was met: perhaps because of what all copies of the grammar have learned together, so that the next
        row gets a new one. (Tokens that somebody else has generated are no reason for that.)"""
        row = self._rows[slot]
        self._fail(slot, row, error)
        self._book.discard(row.wanted)

    def _spread(self) -> None:
        """Moves rows to lexers that fewer others use, if there are new ones."""
        grown = self._book.grown
        if self._grown == grown:
            return
        end = time.thread_time() + MOVING_S
        for row in sorted(self._rows.values(), key=lambda row: len(row.taken or ())):  # the least work first
            if row.lexer is None or row.taken is None:
                continue
            other = self._book.better(row.wanted, row.lexer)
            if other is None:
                continue
            if time.thread_time() > end:
                self._book.release(other)
                return
            matcher = other.copy()
            if _replay(matcher, row.taken, MOVING_S):
                self._book.release(row.lexer)
                row.lexer, row.matcher, row.fresh = other, matcher, True
            else:
                self._book.release(other)
                row.taken = None
        self._grown = grown

    def _advance(self, step: StepMasks) -> None:
        """Takes in the tokens of the step before, which sampled for every row that decodes now."""
        before = self._last
        if before is None:
            raise RuntimeError("rows decode that no step has sampled for")
        with self._changed:
            self._changed.wait_for(lambda: before.tokens is not None or self._error is not None)
            if before.tokens is None:
                raise self._error or RuntimeError("no tokens came")
            tokens = before.tokens
        begun = self._track.start()
        at = zip(before.rows.slots, before.rows.at, strict=True)
        token_of = {slot: int(tokens[position]) for slot, position in at}
        moving: list[tuple[int, LLMatcher]] = []
        for slot, decodes in zip(step.rows.slots, step.rows.decodes, strict=True):
            row = self._rows[slot]
            if row.matcher is None or not decodes:
                continue
            if token_of[slot] in self._book.eos_token_ids:
                self._end(row)  # it is over, and the scheduler will say so
                continue
            moving.append((slot, row.matcher))
            if row.taken is not None:
                row.taken.append(token_of[slot])
                if len(row.taken) > MOST_REPLAYED:
                    row.taken = None
        if len(moving) < PARALLEL_FROM:
            for slot, matcher in moving:
                matcher.consume_token(token_of[slot])
        else:
            self._executor.consume_token_par([(matcher, token_of[slot]) for slot, matcher in moving])
        for slot, matcher in moving:
            error = error_of(matcher)
            if error:
                self._give_up(slot, error)
        self._track.end(ADVANCE, step.number, begun)

    def _fill(self, step: StepMasks) -> None:
        step.target.fill(-1)
        rows = [
            (matcher, index)
            for index, slot in enumerate(step.rows.slots)
            if (matcher := self._rows[slot].matcher) is not None
        ]
        start = time.monotonic()
        took: dict[int, float] = {}
        if self._was_slow or len(rows) < PARALLEL_FROM:
            for matcher, index in rows:
                before = time.thread_time()
                fill_next_token_bitmask(matcher, step.target, index)
                took[index] = time.thread_time() - before
        else:
            fill_next_token_bitmask_par(self._executor, rows, step.target)
        self._was_slow, was_slow = time.monotonic() - start > SLOW_S, self._was_slow
        for matcher, index in rows:
            error = error_of(matcher)
            if not error and not step.target[index].any():
                error = "no token may come next"
            row = self._rows[step.rows.slots[index]]
            if not error and was_slow and not row.fresh and took[index] > TOKEN_CPU_S:
                error = f"choosing a token takes {took[index]:.2f} s, over the limit of {TOKEN_CPU_S:g} s"
            row.fresh = False
            if error:
                step.target[index] = -1
                self._give_up(step.rows.slots[index], error)


def _replay(matcher: LLMatcher, tokens: list[int], limit_s: float) -> bool:
    """Whether it took in all of them, within this processor time."""
    end = time.thread_time() + limit_s
    for start in range(0, len(tokens), REPLAYED_AT_ONCE):
        if time.thread_time() > end or not matcher.consume_tokens(tokens[start : start + REPLAYED_AT_ONCE]):
            return False
    return True
