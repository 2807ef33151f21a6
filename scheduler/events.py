"""What happens to the core, and what the core wants done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..protocol.messages import Ended, ModelDescription, StepPlan
from ..protocol.sampling import SamplingParams
from ..protocol.structured import StructuredOutputsParams
from .logprobs import Logprobs, PromptLogprobs, StepLogprobs
from .records import BoolColumn as BoolColumn
from .records import IntColumn as IntColumn
from .records import LongColumn as LongColumn
from .records import record as record


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What a worker can hold and do; see WorkerHello."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    lookahead: int


# ---------------------------------------------------------------------------------------------------------------------
# Events


@record
class Submitted:
    """A client's request, as it was decoded; whether it is taken is for the core's door to say."""

    client: int
    ticket: int
    prompt: IntColumn
    generated: IntColumn
    sampling: SamplingParams
    n: int = 1
    sample: int = 0
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    resumed: bool = False
    suspicions: int = 0


@record
class Cancelled:
    client: int
    ticket: int


@record
class ClientLost:
    client: int


@record
class WorkerJoined:
    worker: int
    model: ModelDescription
    limits: WorkerLimits
    lived_on: int | None = None
    """An earlier registration of this very process, whose loss was therefore not its death."""


@record
class WorkerLost:
    """`died`: for all that is known, of what it ran; else it left, or will be back."""

    worker: int
    died: bool = True


@record
class DrainWorker:
    """The worker is to get no more requests, and to be dismissed when those that it has have moved or ended."""

    worker: int


@record
class StepDone:
    worker: int
    step: int
    token: IntColumn
    busy_us: int = 0
    """Device time of the step; 0 if it is not known."""
    failed: tuple[tuple[int, str], ...] = ()
    """Where in `token` stand tokens that mean nothing, because the row's grammar has failed, and why."""
    told: StepLogprobs | None = None
    """None: nothing."""


@record
class Checked:
    """A worker's answer to SendCheck: what is wrong with the grammar, "" for nothing."""

    worker: int
    number: int
    error: str


Event: TypeAlias = Submitted | Cancelled | ClientLost | WorkerJoined | WorkerLost | DrainWorker | StepDone | Checked


# ---------------------------------------------------------------------------------------------------------------------
# Instructions


@record
class SendPlan:
    worker: int
    plan: StepPlan


@record
class SendCheck:
    """Asks a worker whether rows can follow a grammar."""

    worker: int
    number: int
    grammar: StructuredOutputsParams


@record
class Accept:
    client: int
    ticket: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    client: int
    ticket: int
    code: str
    message: str
    field: str = ""
    limit: str = ""
    value: str = ""
    retry_after: float = 0.0


@record
class Deliver:
    """New tokens, one a row, and then the requests that ended, each with its client. Rows of one request are in
    order."""

    client: LongColumn
    ticket: LongColumn
    offset: IntColumn
    token: IntColumn
    ended: tuple[tuple[int, Ended], ...] = ()
    logprobs: Logprobs | None = None
    """Of the tokens; None if nobody asked."""
    prompts: tuple[PromptLogprobs, ...] = ()
    """To be told before the tokens."""


@record
class Expel:
    """The worker broke the protocol and is no longer counted on; its requests wait for another attempt."""

    worker: int
    reason: str


@record
class Suspect:
    """A client's requests that were in a lost worker's launched steps, each with how often by now."""

    client: int
    ticket: LongColumn
    count: IntColumn


@record
class Dismiss:
    """The worker is drained; the core has forgotten it."""

    worker: int


@record
class Trouble:
    """Something that must not happen has happened to one request, which failed for it; to be logged."""

    story: str


Instruction: TypeAlias = SendPlan | SendCheck | Accept | Reject | Deliver | Expel | Suspect | Dismiss | Trouble
