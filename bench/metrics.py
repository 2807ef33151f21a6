"""What a run's requests say together: latencies and throughputs, by vLLM's names and definitions.

Of a request that was sent at `s`, had its deliveries at t_1 … t_k, and got n tokens:

    TTFT (time to first token)        t_1 - s
    E2EL (end-to-end latency)         t_k - s
    TPOT (time per output token)      (E2EL - TTFT) / (n - 1), for n > 1
    ITL  (inter-token latency)        each t_(i+1) - t_i; a delivery may hold several tokens
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..protocol.errors import ConfigurationError, TandemError

LATENCIES = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 99)
LIMITED = ("ttft", "tpot", "e2el")
"""Latencies that a request has one of, which goodput may bound."""


class HttpFailed(TandemError):
    """No answer over HTTP, or not the one that was asked for. `kind` is what failures are counted by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Outcome:
    """What became of one request. Times are seconds from the start of the run."""

    late: float = 0.0
    """How long after its time of arrival the client came to it; waiting for others to end does not count."""
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    """When tokens were delivered."""
    counts: list[int] = field(default_factory=list)
    """How many each time, where deliveries tell."""
    output_tokens: int | None = None
    """How many in all, where the end tells."""
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    failure: str = ""
    """The kind of its failure; empty if it was completed."""
    message: str = ""

    @property
    def tokens(self) -> int:
        return sum(self.counts) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def e2el(self) -> float:
        return self.times[-1] - self.sent

    @property
    def tpot(self) -> float:
        """0 for a request of one token, which no limit can fail."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0


Figures = dict[str, float | None]
"""Plain numbers by name; None where there is nothing to take them from."""


def figures(outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> Figures:
    """Counts, throughputs (per second, completed requests only), latencies (ms), and goodput if there are limits."""
    done = [outcome for outcome in outcomes if not outcome.failure and outcome.times]
    seconds = max((outcome.ended for outcome in outcomes), default=0.0)
    output = sum(outcome.tokens for outcome in done)
    prompt = sum(outcome.prompt_tokens for outcome in done)
    deliveries = sum(len(outcome.times) for outcome in done)
    found: Figures = {
        "duration_s": seconds,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_tokens": sum(outcome.cached_tokens for outcome in done),
        "request_throughput": _per(len(done), seconds),
        "output_throughput": _per(output, seconds),
        "total_token_throughput": _per(prompt + output, seconds),
        "tokens_per_delivery": _per(output, deliveries),
        "p99_client_late_ms": _percentile([1e3 * one.late for one in outcomes], 99),
    }
    if limits:
        found["request_goodput"] = _per(sum(_is_good(outcome, limits) for outcome in done), seconds)
    samples = {
        "ttft": [one.ttft for one in done],
        "tpot": [one.tpot for one in done if one.tokens > 1],
        "itl": [gap for one in done for gap in np.diff(one.times).tolist()],
        "e2el": [one.e2el for one in done],
    }
    for name in LATENCIES:
        values = [1e3 * value for value in samples[name]]
        found[f"mean_{name}_ms"] = float(np.mean(values)) if values else None
        for percent in PERCENTILES:
            found[f"p{percent}_{name}_ms"] = _percentile(values, percent)
    return found


def failures(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int | str]]:
    """For each kind of failure how many there were, and what the first one said."""
    counts = Counter(outcome.failure for outcome in outcomes if outcome.failure)
    said = {outcome.failure: outcome.message for outcome in reversed(outcomes)}
    return {kind: {"count": count, "first_message": said[kind]} for kind, count in counts.most_common()}


def medians(runs: Sequence[Figures]) -> Figures:
    """Of each figure, over the runs that have it."""
    found: Figures = {}
    for name in runs[0]:
        values = [value for run in runs if (value := run[name]) is not None]
        found[name] = float(np.median(values)) if values else None
    return found


def read_limits(texts: Sequence[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:50"]` (milliseconds) as a mapping. Raises ConfigurationError."""
    limits: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition(":")
        if name not in LIMITED:
            raise ConfigurationError(f"--goodput: expected one of {', '.join(LIMITED)} as in ttft:500, not {text!r}")
        if name in limits:
            raise ConfigurationError(f"--goodput: {name} is given twice")
        try:
            limits[name] = float(number)
        except ValueError:
            limits[name] = -1.0
        if not 0 < limits[name] < float("inf"):
            raise ConfigurationError(f"--goodput: {name} needs a number of milliseconds above 0, not {number!r}")
    return limits


def _is_good(outcome: Outcome, limits: Mapping[str, float]) -> bool:
    return all(1e3 * float(getattr(outcome, name)) <= limit for name, limit in limits.items())


def _per(amount: float, of: float) -> float | None:
    return amount / of if of > 0 else None


def _percentile(values: Sequence[float], percent: int) -> float | None:
    return float(np.percentile(values, percent)) if values else None
