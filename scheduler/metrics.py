"""What the scheduler counts and times, for whoever watches it.

Everything here is a few additions an observation. Whatever happens to many rows at once is observed once with a count,
so that a step costs the same for one row as for a thousand.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..protocol import messages
from .requests import Request

SHORT_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Bounds for what should take milliseconds or less."""
LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0)
"""Bounds for what a user waits for."""
TOKENS = tuple(float(2**power) for power in range(21))
BYTES = tuple(float(2**power) for power in range(6, 26))
MOST_ENDINGS = 1_024
"""Requests that have ended, or got their first token, are entered in the histograms when they are so many."""
NAN = float("nan")
DEPTHS = tuple(float(depth) for depth in range(9))


class Histogram:
    """Counts of observations by size."""

    __slots__ = ("_bounds", "bounds", "counts", "name", "total")

    def __init__(self, name: str, bounds: Sequence[float]) -> None:
        """`bounds` ascend; `name` is that of the metric, without prefix."""
        self.name = name
        self.bounds = tuple(bounds)
        self._bounds = np.array(self.bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """`times` observations of the same value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def observe_all(self, values: npt.NDArray[np.float64]) -> None:
        """One observation of each value; NaN is none."""
        values = values[~np.isnan(values)]
        places = self._bounds.searchsorted(values)  # as bisect_left
        for place, times in enumerate(np.bincount(places).tolist()):
            self.counts[place] += times
        self.total += float(values.sum())

    def message(self) -> messages.Histogram:
        counts = np.array(self.counts, np.int64)
        return messages.Histogram(name=self.name, bounds=self.bounds, counts=counts, total=self.total)


class Counters:
    """Since the scheduler started."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.refused = 0
        """For overload."""
        self.timeouts = 0
        self.looked_up_tokens = 0
        """Known tokens of requests that got a place."""
        self.cached_tokens = 0
        """Those of them that a prefix cache held."""
        self.lost_evictions = 0
        """Evictions of workers that are gone."""
        self.lost_workers = 0
        """That did not leave on purpose."""
        self.moved = 0
        """Attempts that ended because the worker was lost, left or was drained."""
        self.poisoned = 0
        """Requests that failed because a worker died while it ran nothing else."""
        self.prompt_tokens = 0
        """Of requests that got their first token."""
        self.generation_tokens = 0
        self.resumptions = 0
        self.finished: dict[str, int] = {}
        """By reason."""
        self.refusals: dict[str, int] = {}
        """By code."""
        self.time_to_first_token = Histogram("time_to_first_token_seconds", LONG_S)
        self.inter_token_latency = Histogram("inter_token_latency_seconds", SHORT_S)
        self.queue_time = Histogram("request_queue_time_seconds", LONG_S)
        self.prefill_time = Histogram("request_prefill_time_seconds", LONG_S)
        self.decode_time = Histogram("request_decode_time_seconds", LONG_S)
        self.inference_time = Histogram("request_inference_time_seconds", LONG_S)
        self.latency = Histogram("e2e_request_latency_seconds", LONG_S)
        self.time_per_output_token = Histogram("request_time_per_output_token_seconds", SHORT_S)
        self.request_prompt_tokens = Histogram("request_prompt_tokens", TOKENS)
        self.request_generation_tokens = Histogram("request_generation_tokens", TOKENS)
        self.iteration_tokens = Histogram("iteration_tokens_total", TOKENS)
        self.plan_time = Histogram("plan_time_seconds", SHORT_S)
        self.plan_bytes = Histogram("plan_bytes", BYTES)
        self._first_tokens: list[float] = []
        """Seconds until the first token, of requests that are not in the histogram yet."""
        self._endings: list[float] = []
        """Of each request that has ended, the seven numbers that `enter_pending` takes, one behind the other: to make
        columns of as many tuples costs NumPy several times as much."""

    def first_tokens(self, requests: Sequence[Request], now: float) -> None:
        """Requests got the first token of an attempt; their own first one or, after a preemption or the loss of a
        worker, their next."""
        for request in requests:
            if request.first_token_at is None:
                request.first_token_at = now
                self.prompt_tokens += request.prompt_length
                self._first_tokens.append(now - request.submitted_at)
            elif request.last_token_at is not None:
                self.inter_token_latency.observe(now - request.last_token_at)
        if len(self._first_tokens) >= MOST_ENDINGS:
            self.enter_pending()

    def more_tokens(self, rows: int, seconds: float) -> None:
        """So many rows got a token that came `seconds` after their last one."""
        if rows:
            self.inter_token_latency.observe(seconds, rows)

    def ended(self, requests: Sequence[Request], reasons: Sequence[str], known: Sequence[int], now: float) -> None:
        """Requests ended, each for a reason and knowing so many tokens."""
        for reason in reasons:
            self.finished[reason] = self.finished.get(reason, 0) + 1
        for request, tokens in zip(requests, known, strict=True):
            started, first = request.started_at, request.first_token_at
            self._endings += (
                now,
                request.submitted_at,
                NAN if started is None else started,
                NAN if first is None else first,
                request.prompt_length,
                tokens,
                request.resumed,
            )
        if len(self._endings) >= 7 * MOST_ENDINGS:
            self.enter_pending()

    def enter_pending(self) -> None:
        """To be called before a histogram of requests is read."""
        if self._first_tokens:
            self.time_to_first_token.observe_all(np.array(self._first_tokens))
            self._first_tokens.clear()
        if not self._endings:
            return
        now, submitted, started, first, prompt, known, resumed = (
            np.fromiter(self._endings, np.float64, len(self._endings)).reshape(-1, 7).T
        )
        self._endings.clear()
        generated, decode = known - prompt, now - first
        later = generated - resumed - 1
        per_token = np.divide(decode, later, out=np.full(len(now), NAN), where=later > 0)
        for histogram, observed in (
            (self.latency, now - submitted),
            (self.request_prompt_tokens, prompt),
            (self.request_generation_tokens, generated),
            (self.queue_time, started - submitted),
            (self.inference_time, now - started),
            (self.prefill_time, first - started),
            (self.decode_time, decode),
            (self.time_per_output_token, per_token),
        ):
            histogram.observe_all(observed)

    def refuse(self, code: str) -> None:
        self.refusals[code] = self.refusals.get(code, 0) + 1

    def histograms(self) -> tuple[messages.Histogram, ...]:
        self.enter_pending()
        return tuple(value.message() for value in vars(self).values() if isinstance(value, Histogram))


class DeviceMeter:
    """What the results of one worker tell of its device, since it registered."""

    RECENT_S = 10.0

    def __init__(self, weight_bytes: int, kv_bytes_per_token: int, memory_bandwidth: int) -> None:
        """See WorkerHello; zeros where they are unknown."""
        self.steps = 0
        self.tokens = 0
        self.busy_us = 0
        self.gap_us = 0
        self.decode_busy_us = 0
        self._decode_steps = 0
        self._kv_tokens = 0
        self._weight_bytes = weight_bytes
        self._kv_bytes_per_token = kv_bytes_per_token
        self._bandwidth = memory_bandwidth
        self._marks = [(0.0, 0, 0), (0.0, 0, 0)]
        """When the last two spells of RECENT_S began, and busy_us and gap_us then."""
        self.step_time = Histogram("step_time_seconds", SHORT_S)
        self.step_gap = Histogram("step_gap_seconds", SHORT_S)
        self.result_latency = Histogram("result_latency_seconds", SHORT_S)
        self.depth = Histogram("steps_queued_ahead", DEPTHS)

    def result(self, result: messages.StepResult, now: float, sent_at: float, after_idle: bool, queued: int) -> None:
        """Takes in a result. `sent_at`: when its plan was sent, `after_idle`: what that said; `queued`: plans that the
        worker still had when the result came."""
        if now - self._marks[-1][0] >= self.RECENT_S:
            self._marks = [self._marks[-1], (now, self.busy_us, self.gap_us)]
        self.steps += 1
        self.tokens += len(result.token)
        self.busy_us += result.busy_us
        self.step_time.observe(result.busy_us / 1e6)
        self.result_latency.observe(now - sent_at)
        self.depth.observe(queued)
        self.gap_us += result.gap_us
        if not after_idle:
            self.step_gap.observe(result.gap_us / 1e6)
        if result.kv_tokens:
            self.decode_busy_us += result.busy_us
            self._decode_steps += 1
            self._kv_tokens += result.kv_tokens

    @property
    def recent_idle_share(self) -> float | None:
        _, busy, gap = self._marks[0]
        busy, gap = self.busy_us - busy, self.gap_us - gap
        return gap / (busy + gap) if busy + gap else None

    @property
    def decode_floor_us(self) -> int:
        """See WorkerStats."""
        if not self._bandwidth:
            return 0
        read = self._decode_steps * self._weight_bytes + self._kv_tokens * self._kv_bytes_per_token
        return read * 1_000_000 // self._bandwidth

    def histograms(self) -> tuple[messages.Histogram, ...]:
        made = (self.step_time, self.step_gap, self.result_latency, self.depth)
        return tuple(histogram.message() for histogram in made)
