"""Where a task takes its problems and phrasings from: seeded randomness on one side of the held-out split."""

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

HELD_OUT_ONE_IN = 20
"""One problem in this many is never trained on."""

Exchange = tuple[str, str]
"""What the user says and what the assistant answers."""


def is_held_out(problem: str) -> bool:
    """Whether `problem` (its canonical text) is kept for evaluation; the same in every process and release."""
    digest = hashlib.blake2b(problem.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


@dataclass(slots=True)
class Source:
    """Random choices for one stream of documents; `held_out` says which side of the split its problems come from."""

    rng: random.Random
    held_out: bool = False

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, uniformly."""
        return options[int(self.rng.random() * len(options))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.rng.random() < probability

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def number(self, digits: int = 3) -> int:
        """A number of up to `digits` digits; fewer digits come up far more often than uniform drawing would give."""
        digits = digits if self.chance(0.65) else self.integer(1, digits)
        return self.integer(0, 10**digits - 1)

    def admits(self, problem: str) -> bool:
        """Whether `problem` lies on this source's side of the split."""
        return is_held_out(problem) == self.held_out

    def find(self, draw: Callable[[], T], key: Callable[[T], str], tries: int = 2_000) -> T | None:
        """Draws until the problem, named by `key`, lies on this source's side of the split; None if it never does."""
        for _ in range(tries):
            drawn = draw()
            if self.admits(key(drawn)):
                return drawn
        return None

    def problem(self, draw: Callable[[], T], key: Callable[[T], str]) -> T:
        """`find` for a problem space that is large enough to be split.

        Raises:
            RuntimeError: if it was not: no draw lay on this source's side.
        """
        drawn = self.find(draw, key)
        if drawn is None:
            side = "held-out" if self.held_out else "training"
            raise RuntimeError(f"no problem like {key(draw())!r} lies on the {side} side of the split")
        return drawn

    def casual(self, request: str) -> str:
        """`request` as people type it: sometimes in lower case, unpunctuated, or wrapped in politeness."""
        if self.chance(0.45):
            return request
        if self.chance(0.5):
            request = request.rstrip(".?!")
        if self.chance(0.5):
            request = request[:1].lower() + request[1:]
            if self.chance(0.3):
                request = self.pick(_LEAD_INS) + request
        if self.chance(0.12) and not request.endswith(tuple(".?!")):
            request += self.pick((" please", ", please.", " thanks", "?", ".", "!"))
        return request

    def careless(self, request: str) -> str:
        """`casual`, and sometimes without any capitals: for requests whose answer does not repeat their spelling."""
        request = self.casual(request)
        return request.lower() if self.chance(0.25) else request


_LEAD_INS = (
    "please, ", "hey, ", "ok, ", "okay, ", "hi, ", "so, ", "now ", "and ", "tell me, ", "quick question: ", "well, ",
    "hello! ", "can you help me? ", "i have a question: ", "next: ", "also, ", "um, ", "alright, ",
)  # fmt: skip


def held_out_by_prompt(task: Callable[..., Exchange]) -> Callable[..., Exchange]:
    """For tasks with few problems, which training must all hold: splits by the wording of the request instead."""

    @functools.wraps(task)
    def split(s: Source, *args: int) -> Exchange:
        return s.problem(lambda: task(s, *args), prompt_key)

    return split


def prompt_key(exchange: Exchange) -> str:
    """The problem that a request is by its wording alone."""
    return f"prompt {exchange[0]}"
