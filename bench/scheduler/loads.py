"""What the core is loaded with: requests that are there at first, and those that follow when one ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ...scheduler.events import IntColumn, WorkerLimits

BLOCK_SIZE = 16
VOCAB = 128_256
FIRST_TOKEN = 16
"""Those below are the model's own (end of sequence and the like) and appear nowhere."""

LIFETIME_STEPS = 97
"""Output tokens of a request under churn. With the three steps from a row's end to its successor's first token, 1 % of
the rows change with each step."""
LONG_PROMPT = 2_048
PREFIX = 512
PREFIXES = 16


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request."""

    prompt: IntColumn
    max_tokens: int


class Load(ABC):
    """`running` rows, requests without end in their order. Everything random comes from a fixed seed."""

    name: str
    says: str
    budget_beside_rows = 8_192
    """Tokens of a step beyond four for each row."""
    waiting = 0
    """Requests that are open beyond `running`."""

    def __init__(self, running: int, steps: int) -> None:
        """`steps`: how many the load must last."""
        self.running = running
        self.steps = steps
        self.rng = np.random.default_rng(0)

    @abstractmethod
    def first(self) -> list[Wanted]:
        """The requests at the start, spread over the ages that they have once the load has gone on for long."""

    @abstractmethod
    def next(self) -> Wanted:
        """The request that follows when one has ended."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Most tokens of a request that the worker must hold for it alone."""

    def limits(self, max_model_len: int, lookahead: int) -> WorkerLimits:
        """Of a worker that has room for this load, but where requests end not for much more: its prefix cache
        evicts."""
        return WorkerLimits(
            num_blocks=int(1.25 * (self.running + 8) * -(-self.longest // BLOCK_SIZE))
            + PREFIXES * PREFIX // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_num_seqs=self.running,
            max_num_batched_tokens=4 * self.running + self.budget_beside_rows,
            max_model_len=max_model_len,
            vocab_size=VOCAB,
            lookahead=lookahead,
        )

    def tokens(self, least: int, most: int) -> IntColumn:
        """Between `least` and `most` random tokens."""
        return self.rng.integers(FIRST_TOKEN, VOCAB, int(self.rng.integers(least, most + 1)), np.int32)

    def aged(self, wanted: list[Wanted]) -> list[Wanted]:
        """The same requests with outputs cut as if some of them had come already, evenly spread."""
        ages = self.rng.permutation(len(wanted)) / len(wanted)
        return [
            Wanted(one.prompt, max(1, round(one.max_tokens * (1 - age)))) for one, age in zip(wanted, ages, strict=True)
        ]


class Steady(Load):
    name = "steady"
    says = "all rows decode, none joins or leaves"

    def first(self) -> list[Wanted]:
        return [Wanted(self.tokens(192, 319), self.steps) for _ in range(self.running)]

    def next(self) -> Wanted:
        raise RuntimeError("a request ended under steady decode")

    @property
    def longest(self) -> int:
        return 320 + self.steps


class Churn(Load):
    name = "churn"
    says = "1 % of the rows end with each step, and as many requests arrive"

    def first(self) -> list[Wanted]:
        return self.aged([self.next() for _ in range(self.running)])

    def next(self) -> Wanted:
        return Wanted(self.tokens(64, 96), LIFETIME_STEPS)

    @property
    def longest(self) -> int:
        return 96 + LIFETIME_STEPS


class Prefixes(Churn):
    name = "prefix"
    says = f"as churn, with prompts that begin with one of {PREFIXES} prefixes of {PREFIX} tokens"

    def __init__(self, running: int, steps: int) -> None:
        super().__init__(running, steps)
        self._prefixes = [self.tokens(PREFIX, PREFIX) for _ in range(PREFIXES)]

    def next(self) -> Wanted:
        prefix = self._prefixes[int(self.rng.integers(PREFIXES))]
        return Wanted(np.concatenate([prefix, self.tokens(16, 80)]), LIFETIME_STEPS)

    @property
    def longest(self) -> int:
        return 80 + LIFETIME_STEPS


class Prefill(Load):
    name = "prefill"
    says = f"prompts of {LONG_PROMPT} tokens keep coming, so that each step has chunks beside the decoding rows"
    budget_beside_rows = 2 * LONG_PROMPT
    waiting = 4

    def first(self) -> list[Wanted]:
        short = [Wanted(self.tokens(64, 96), self._outputs) for _ in range(self.running)]
        return self.aged(short) + [self.next() for _ in range(self.waiting)]

    def next(self) -> Wanted:
        return Wanted(self.tokens(LONG_PROMPT, LONG_PROMPT + 15), self._outputs)

    @property
    def _outputs(self) -> int:
        """So that somewhat more requests end than prompts fit into the steps meanwhile."""
        return max(16, int(self.running / 2.2))

    @property
    def longest(self) -> int:
        return LONG_PROMPT + 16 + self._outputs


LOADS: dict[str, type[Load]] = {load.name: load for load in (Steady, Churn, Prefill, Prefixes)}
