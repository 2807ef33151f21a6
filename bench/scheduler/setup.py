"""What a simulated cluster is made of, as the benchmark's options say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .clients import Settings as ClientSettings
from .loads import BLOCK_SIZE
from .step_time import StepTime
from .workers import Settings as WorkerSettings

MAX_MODEL_LEN = 8_192
SPARE_REQUESTS = 0.03
"""Open beyond the workers' rows, so that none stays free while a client hears of an ending and sends its next."""
SPARE_BLOCKS = 0.25
"""Beyond what the rows can need: the prefix cache fills them and evicts, as it does in a service that runs for long."""
PROMPTS_PER_STEP = 64
"""So many may be computed in one step beside the decoding rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    rows: int
    """Of each worker."""
    step_s: float | None
    clients: int
    seconds: float
    warm_up_s: float
    prompt_tokens: int
    least_output: int
    most_output: int
    lookahead: int
    worker_processes: int
    client_processes: int
    high_priority: bool
    scheduler_options: dict[str, Any] = field(default_factory=dict)

    @property
    def step_time(self) -> StepTime:
        return StepTime() if self.step_s is None else StepTime.constant(self.step_s)

    def worker_settings(self, endpoint: str, num_workers: int) -> list[WorkerSettings]:
        """One for each process that has a worker."""
        longest = -(-(self.prompt_tokens + self.most_output) // BLOCK_SIZE)
        first = 0
        settings = []
        for count in spread(num_workers, self.worker_processes):
            settings.append(
                WorkerSettings(
                    endpoint=endpoint,
                    first=first,
                    workers=count,
                    rows=self.rows,
                    num_blocks=max(int((1 + SPARE_BLOCKS) * self.rows * longest), MAX_MODEL_LEN // BLOCK_SIZE),
                    max_num_batched_tokens=self.rows + PROMPTS_PER_STEP * self.prompt_tokens,
                    max_model_len=MAX_MODEL_LEN,
                    lookahead=self.lookahead,
                    step_time=self.step_time,
                    high_priority=self.high_priority,
                )
            )
            first += count
        return settings

    def client_settings(self, endpoint: str, num_workers: int) -> list[ClientSettings]:
        """One for each process that has a client; every client has at least one request open."""
        total = num_workers * self.rows
        open_requests = spread(max(self.clients, total + math.ceil(SPARE_REQUESTS * total)), self.clients)
        settings = []
        first = 0
        for number, count in enumerate(spread(self.clients, self.client_processes)):
            settings.append(
                ClientSettings(
                    endpoint=endpoint,
                    open_requests=tuple(open_requests[first : first + count]),
                    prompt_tokens=self.prompt_tokens,
                    least_output=self.least_output,
                    most_output=self.most_output,
                    seed=number,
                )
            )
            first += count
        return settings


def spread(things: int, places: int) -> list[int]:
    """How many of the things each place gets, as evenly as can be; places that would get none are left out."""
    shares = [things // places + (place < things % places) for place in range(places)]
    return [share for share in shares if share]
