"""A request as the scheduler knows it while it waits, and what of it stays cold while it runs."""

from __future__ import annotations

from ..protocol.messages import Ended
from ..protocol.sampling import SamplingParams
from .blocks import Match, Place, root
from .events import IntColumn


class Request:
    """One request. While it runs, its tokens live in the rows of its worker and `known` here is stale."""

    __slots__ = (
        "attempt",
        "cached_tokens",
        "client",
        "first_token_at",
        "goes_first",
        "held_back",
        "known",
        "length",
        "last_token_at",
        "limit",
        "number",
        "packed",
        "passed",
        "preemptions",
        "priority",
        "probes",
        "prompt_length",
        "prompt_told",
        "rare",
        "resumed",
        "root",
        "sampling",
        "seed",
        "slot",
        "started_at",
        "stops",
        "submitted_at",
        "suspected_at",
        "suspicions",
        "ticket",
        "worker",
    )

    def __init__(
        self,
        number: int,
        client: int,
        ticket: int,
        known: IntColumn,
        prompt_length: int,
        limit: int,
        sampling: SamplingParams,
        stops: frozenset[int],
        now: float,
        seed: int = 0,
        priority: int = 0,
        root: Place = root(""),  # noqa: B008 - a constant
        goes_first: bool = False,
        rare: bool = False,
        held_back: tuple[int, ...] = (),
        suspicions: int = 0,
    ) -> None:
        self.number = number
        self.client = client
        self.ticket = ticket
        self.known = known
        """Prompt and generated tokens, int32."""
        length = self.length = len(known)
        """Of `known`."""
        self.packed: bytes | None = None
        """The same as bytes, between a look for a place and the place."""
        self.prompt_length = prompt_length
        self.resumed = length - prompt_length
        """Generated tokens that it came with."""
        self.limit = limit
        """The request ends when it knows so many tokens, prompt included."""
        self.sampling = sampling
        self.stops = stops
        """Tokens that end it: its own, and the model's unless it ignores them."""
        self.rare = rare
        """It uses sampling parameters that need columns of their own; see joining.py."""
        self.held_back = held_back
        """Tokens that must not come before `min_tokens` are generated."""
        self.prompt_told = prompt_length if length > prompt_length else 1
        """Positions of the prompt whose log-probabilities were sent, if they are asked for; the first has none. They
        come before the first token."""
        self.seed = seed
        """Of this sample."""
        self.priority = priority
        self.root = root
        """Where its chain of cached blocks begins."""
        self.goes_first = goes_first
        """While it waits: before new work, since it had begun before it was accepted here, or had a worker that is
        gone."""
        self.attempt = 0
        self.preemptions = 0
        self.worker: int | None = None
        """Where it runs, or ran last …"""
        self.slot = 0
        """… and in which slot there."""
        self.suspicions = suspicions
        """Deaths of workers while it was in a launched step, without enough tokens between (see quarantine.py)."""
        self.suspected_at = length
        """Tokens that it knew at the last of them."""
        self.passed = 0
        """Requests behind it in the queue that got a place before it."""
        self.probes: dict[int, tuple[int, Match]] | None = None
        """By worker: what its prefix cache held while the request waited, and the generation in which that was so."""
        self.cached_tokens: int | None = None
        """Prompt tokens that were found in the prefix cache at its first place."""
        self.submitted_at = now
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        """Of a request that lost its place, once it had tokens."""

    def learn(self, known: IntColumn) -> None:
        """From now on it has these tokens, prompt and generated."""
        self.known, self.length, self.packed = known, len(known), None

    @property
    def tells_prompt(self) -> bool:
        """Log-probabilities of the prompt are still to be computed: all of it, whatever is cached."""
        return self.sampling.prompt_logprobs is not None and self.prompt_told < self.prompt_length

    def ended(self, reason: str, known: int, now: float, error: str = "") -> Ended:
        """The message that ends it, having `known` tokens. `now` is of the clock that all its times are of, and no
        earlier than any."""
        submitted, started, first = self.submitted_at, self.started_at, self.first_token_at
        return Ended(  # by position, which takes half the time
            self.ticket,
            reason,
            error,
            self.prompt_length,
            known - self.prompt_length,
            self.cached_tokens or 0,
            (now if started is None else started) - submitted,
            0.0 if first is None else first - submitted,
            now - submitted,
            self.attempt + 1,
        )

    def __repr__(self) -> str:
        """Its story, for the log."""
        return (
            f"request {self.number} (client {self.client}, ticket {self.ticket}, attempt {self.attempt}, "
            f"{self.prompt_length} prompt tokens, {self.length} known, limit {self.limit}, "
            f"priority {self.priority}, {self.suspicions} suspicions, {self.sampling})"
        )
