"""A scheduler that is too simple to be wrong: one request after the other, one token after the other. No batch, no
blocks, no cache, no preemption, no step queued ahead; a worker that never fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from tandem.protocol.sampling import sample_seed
from tandem.scheduler.events import Submitted

from support.simulated_worker import next_token

Key: TypeAlias = tuple[int, int]
"""Client and ticket."""


@dataclass
class Story:
    """What one request is owed."""

    prompt: list[int]
    held: list[int]
    """What the client of a resumption has already."""
    tokens: list[int]
    """All that it receives in the end, if nobody interferes; what it holds already comes first."""
    reason: str
    """Why it ends then."""
    accepted_at: float
    deadline: float | None
    cancelled: bool = False


class ReferenceScheduler:
    def __init__(self, vocab: int, max_model_len: int, eos: int) -> None:
        self._vocab = vocab
        self._max_model_len = max_model_len
        self._eos = eos
        self.stories: dict[Key, Story] = {}

    def submit(self, event: Submitted, now: float) -> None:
        """Every sample of a submission is a request of its own."""
        for i in range(event.n):
            prompt, held = event.prompt.tolist(), event.generated.tolist()
            tokens, reason = self._run(event, i, prompt, held)
            deadline = None if event.timeout_s is None else now + event.timeout_s
            self.stories[event.client, event.ticket + i] = Story(prompt, held, tokens, reason, now, deadline)

    def _run(self, event: Submitted, i: int, prompt: list[int], held: list[int]) -> tuple[list[int], str]:
        sampling = event.sampling
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {self._eos})
        seed = 0 if sampling.seed is None else sample_seed(sampling.seed, event.sample + i)
        tokens = list(held)
        while True:
            if tokens and tokens[-1] in stops:
                return tokens, "stop"
            if len(tokens) == sampling.max_tokens or len(prompt) + len(tokens) == self._max_model_len:
                return tokens, "length"
            tokens.append(next_token(prompt + tokens, self._vocab, seed))

    def refused(self, key: Key) -> None:
        del self.stories[key]

    def cancel(self, key: Key) -> None:
        self.stories[key].cancelled = True

    def lose(self, client: int) -> None:
        """Nobody is owed anything there any more."""
        self.stories = {key: story for key, story in self.stories.items() if key[0] != client}

    def agree(self, key: Key, received: list[int], ended: str | None, now: float) -> None:
        """Raises AssertionError if a request cannot have received this by now, or cannot have ended so."""
        story = self.stories[key]
        assert received == story.tokens[: len(received)], (key, received, story)
        if ended in ("stop", "length"):
            assert (received, ended) == (story.tokens, story.reason), (key, story)
            return
        assert len(received) < len(story.tokens) or not story.tokens, f"{key} has all its tokens, and did not end"
        assert ended != "abort" or story.cancelled, f"{key} was ended, and nobody had cancelled it"
        if story.deadline is not None and story.deadline <= now:
            assert ended is not None, f"{key} runs on past its deadline"
        else:
            assert ended != "timeout", f"{key} ended before its deadline"
        if ended is None:
            assert not story.cancelled, f"{key} runs on after its cancel"
