"""Everything that Tandem's processes say, grouped by conversation.

client ↔ scheduler       ClientHello, Submit, Cancel, Ping, AskStats, AskDrain, FetchFile  →
                       ← Welcome, Accepted, Refused, Tokens, Suspected, Pong, Stats, Draining, FileChunk, UnknownPeer,
                         VersionRefused, Goodbye
scheduler ↔ worker       WorkerHello, StepResult, GrammarChecked, Idle, FileChunk, Goodbye  →
                       ← WorkerWelcome, StepPlan, CheckGrammar, FetchFile, Leave, UnknownPeer, VersionRefused, Goodbye

Fields typed `Ints`, `Longs` and `Floats` are columns: one-dimensional little-endian arrays that travel as bytes. Fields
at their default value do not travel at all. Whatever arrives is checked against these types (see codec.py), so a
handler never meets a field of another type; that a *value* makes sense is for the receiver to check.

Identity: `epoch` is one life of a scheduler, `registration` one registration of a worker (unique within an epoch),
`number` a request (minted by the scheduler, never reused), `attempt` one placement of a request on a worker, `step` one
plan of a registration, counted from 0. A `ticket` is a client's own handle of a request, never reused on a connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, TypeAlias, TypeVar, dataclass_transform

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from .sampling import SamplingParams
from .structured import StructuredOutputsParams

PROTOCOL_VERSION = 6
"""Raised with every change that an older peer would misread; both ends refuse another version by name."""


MAX_PRIORITY = 1_000
"""Priorities lie between -MAX_PRIORITY and MAX_PRIORITY."""
MAX_SAMPLES = 65_536
"""Sample indexes lie below."""
MAX_SALT_CHARS = 256
"""Characters of a cache salt."""
SUSPICIONS = 2
"""A request that was in the launched steps of so many workers when they died runs alone from then on …"""
CLEARING_TOKENS = 32
"""… until it has got so many more tokens. Between two suspicions they clear it too."""

MAX_BLOCKS = 2**22
"""Blocks of a worker's KV cache: the scheduler keeps books of each."""
MAX_SLOTS = 2**16
MAX_CONTEXT = 2**23
"""Tokens of one request: a plan that introduces it must fit in a message."""

_T = TypeVar("_T")


def _column(dtype: str) -> Any:
    wire = np.dtype(dtype)

    def from_wire(value: object) -> npt.NDArray[Any]:
        if isinstance(value, np.ndarray) and value.dtype == wire and value.ndim == 1:
            return value
        if not isinstance(value, bytes):
            raise PydanticCustomError("column", "a column travels as bytes")
        if len(value) % wire.itemsize:
            raise PydanticCustomError("column", "the bytes are no whole number of elements")
        return np.frombuffer(value, dtype=wire)

    return PlainValidator(from_wire)


Ints: TypeAlias = Annotated[npt.NDArray[np.int32], _column("<i4")]
Longs: TypeAlias = Annotated[npt.NDArray[np.int64], _column("<i8")]
Floats: TypeAlias = Annotated[npt.NDArray[np.float32], _column("<f4")]

NO_INTS: npt.NDArray[np.int32] = np.empty(0, np.int32)
NO_LONGS: npt.NDArray[np.int64] = np.empty(0, np.int64)
NO_FLOATS: npt.NDArray[np.float32] = np.empty(0, np.float32)
for _empty in (NO_INTS, NO_LONGS, NO_FLOATS):
    _empty.flags.writeable = False

Name: TypeAlias = Annotated[str, Field(strict=True, max_length=256)]
Text: TypeAlias = Annotated[str, Field(strict=True, max_length=16_384)]
MAX_COUNT = 2**31 - 1
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
Number: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Seconds: TypeAlias = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]


def _no_ints() -> npt.NDArray[Any]:
    return NO_INTS


def _no_longs() -> npt.NDArray[Any]:
    return NO_LONGS


def _no_floats() -> npt.NDArray[Any]:
    return NO_FLOATS


_NO_COLUMNS = (_no_ints, _no_longs, _no_floats)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def message(cls: type[_T]) -> type[_T]:
    """Makes a message class: frozen, by keyword, unknown fields refused when decoded.

    That nobody assigns to a field is for the type checker to see: at run time a frozen class takes three times as long
    to make, and a step makes several. Nor does anybody write to the empty columns that are defaults, so these are
    defaults of the constructor too: to get each from its factory would be most of what a plan costs.
    """
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    made = dataclass(slots=True, kw_only=True, eq=False)(cls)
    empty = {one.name: one.default_factory() for one in fields(made) if one.default_factory in _NO_COLUMNS}  # type: ignore[arg-type]
    made.__init__.__kwdefaults__ = {**(made.__init__.__kwdefaults__ or {}), **empty}
    return made


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def message_by_position(cls: type[_T]) -> type[_T]:
    """As `message`, but the fields may be given by position: keywords make it cost more than twice as much, and there
    is one of these for each request."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclass(slots=True, eq=False)(cls)


# ---------------------------------------------------------------------------------------------------------------------
# Shared by both conversations


@message
class ModelDescription:
    """What the service serves; two workers with unequal descriptions do not serve together."""

    name: Name
    """What clients call it (`--served-model-name`)."""
    architecture: Name
    dtype: Name
    vocab_size: Count
    max_model_len: Count
    """Most tokens of one request, prompt and output together."""
    eos_token_ids: tuple[Count, ...] = ()
    default_sampling: dict[Name, float | int] = field(default_factory=dict)
    """From the model's generation_config.json: temperature, top_k, top_p where they are given."""
    weights: Name = ""
    """A fingerprint of the weights' origin: equal for two workers that loaded the same thing."""
    batch_invariant: Annotated[bool, Field(strict=True)] = False


@message
class FileInfo:
    """A tokenizer file that the peer can fetch in pieces."""

    name: Name
    size: Count
    sha256: Name


@message
class FetchFile:
    """Asks for the piece of a file that begins at `offset` (bytes)."""

    name: Name
    offset: Count = 0


@message
class FileChunk:
    """A piece of a file; the last one ends at the `size` that the file's FileInfo gave."""

    name: Name
    offset: Count
    data: Annotated[bytes, Field(strict=True)]


@message
class UnknownPeer:
    """The scheduler does not know this connection (it restarted, or dropped it): say hello again."""

    epoch: Number


@message
class VersionRefused:
    """Answers a greeting of another protocol version. Never gains a field, so that every version can read it."""

    version: Count
    """The version that the sender speaks."""


@message
class Goodbye:
    """The sender leaves on purpose and says why; if `final`, the other end must not come back as it is."""

    reason: Text = ""
    final: Annotated[bool, Field(strict=True)] = False
    failed: Annotated[bool, Field(strict=True)] = False
    """Of a worker: something in its steps made it leave, so the requests in them are suspected."""


# ---------------------------------------------------------------------------------------------------------------------
# client → scheduler


@message
class ClientHello:
    """First message of a connection. `name` is for logs."""

    version: Count
    name: Name = ""
    session: Number = 0
    """Drawn at random by the client when it starts, and a secret of its own: another connection that said the same
    number was this client's, and what it had asked for ends. 0 for a client that does not come back."""


@message
class Submit:
    """New requests for `n` samples of one prompt, or with `generated` a resumption that goes on after those tokens.

    Sample `sample + i` is a request of its own, with ticket `ticket + i`. All of them are accepted or none.
    """

    ticket: Number
    prompt: Ints
    """Token ids, at least one."""
    sampling: SamplingParams
    """With a seed, unless temperature is 0."""
    generated: Ints = field(default_factory=_no_ints)
    """Tokens of this request that the client already holds; the stream goes on at offset len(generated)."""
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_SAMPLES)] = 1
    """How many samples; 1 with `generated`."""
    sample: Annotated[int, Field(strict=True, ge=0, lt=MAX_SAMPLES)] = 0
    """Index of the first; decides the random numbers together with the seed."""
    priority: Annotated[int, Field(strict=True, ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    """Class of the request: a lower one goes first, as in vLLM."""
    timeout_s: Annotated[float, Field(gt=0.0, le=1e9, allow_inf_nan=False)] | None = None
    """Seconds from its acceptance after which the request ends with reason "timeout", waiting or running."""
    cache_salt: Annotated[str, Field(strict=True, max_length=MAX_SALT_CHARS)] = ""
    """Only requests with the same salt share cached prefixes, so that nobody can time what others have asked."""
    resumed: Annotated[bool, Field(strict=True)] = False
    """A scheduler has had this request before, though perhaps no token of it was received: it goes before new work."""
    suspicions: Annotated[int, Field(strict=True, ge=0, le=SUSPICIONS)] = 0
    """Of a resumption: what the last Suspected said, unless CLEARING_TOKENS tokens have come since."""


@message
class Cancel:
    """Ends a request. Whether it ended before is seen by its `Ended`; an unknown ticket is not an error."""

    ticket: Number


@message
class Ping:
    """Renews the client's lease. To a worker it says nothing without a number: that it can be sent shows that there is
    a connection."""

    answer: Annotated[bool, Field(strict=True)] = False
    """A Pong is wanted, because nothing has been heard for a while."""
    number: Number = 0
    """To a worker: what its Idle repeats, which then was sent after everything that came before this was handled."""


@message
class AskStats:
    """Asks for a Stats."""


@message
class AskDrain:
    """Asks that a worker gets no more requests, that those it has move to others, and that it ends then. Answered by a
    Draining each time; asking again changes nothing. Taken from the service's own user only."""

    worker: Name


# ---------------------------------------------------------------------------------------------------------------------
# scheduler → client


@message
class Welcome:
    """Answers ClientHello at once, and again as soon as a model is there if none was."""

    version: Count
    epoch: Number
    lease_s: Seconds
    """A client that says nothing for so long is taken for gone, and its requests are cancelled."""
    model: ModelDescription | None = None
    files: tuple[FileInfo, ...] = ()
    max_n: Annotated[int, Field(strict=True, ge=1, le=MAX_SAMPLES)] = MAX_SAMPLES
    """Samples that a request may have; a client that knows makes no others."""


@message
class Accepted:
    """The request is in the queue; from here on it ends with exactly one Ended."""

    epoch: Number
    ticket: Number
    number: Number


@message
class Refused:
    """The request was not taken. `code` is "invalid", "overloaded" or "internal"."""

    epoch: Number
    ticket: Number
    code: Name
    message: Text
    field: Name = ""
    limit: Text = ""
    value: Text = ""
    retry_after_s: Seconds = 0.0


@message_by_position
class Ended:
    """How a request ended and what it took."""

    ticket: Number
    reason: Name
    """One of "stop", "length", "abort", "timeout", "error"."""
    error: Text = ""
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    cached_tokens: Count = 0
    """Of the prompt's tokens, those that were found in the prefix cache when the request first got a place."""
    queue_s: Seconds = 0.0
    """From acceptance to its first place on a worker."""
    first_token_s: Seconds = 0.0
    """From acceptance to the commit of the first token since then."""
    total_s: Seconds = 0.0
    attempts: Count = 1


@message
class Tokens:
    """New tokens of some of this client's requests, and requests that ended with them.

    Row i holds `count[i]` tokens of request `ticket[i]`, the first at output offset `offset[i]`; `token` is their
    concatenation. Log-probabilities of tokens of prompts come before the first token of their request.
    """

    epoch: Number
    ticket: Longs = field(default_factory=_no_longs)
    offset: Ints = field(default_factory=_no_ints)
    count: Ints = field(default_factory=_no_ints)
    token: Ints = field(default_factory=_no_ints)
    ended: tuple[Ended, ...] = ()

    entries: Ints = field(default_factory=_no_ints)
    """For each token, how many log-probabilities are told: its own, then those of the likeliest, in order; 0 where they
    were not asked for. Not there if nobody asked."""
    rank: Ints = field(default_factory=_no_ints)
    """For each token its rank in the vocabulary, from 1, if it has any; else 0. Not there if nobody asked."""
    entry_token: Ints = field(default_factory=_no_ints)
    entry_logprob: Floats = field(default_factory=_no_floats)
    """The log-probabilities, of all tokens in a row."""

    prompt_ticket: Longs = field(default_factory=_no_longs)
    prompt_position: Ints = field(default_factory=_no_ints)
    """Prompt row i tells of `prompt_count[i]` tokens of the prompt of request `prompt_ticket[i]`, the first at this
    position of the prompt …"""
    prompt_count: Ints = field(default_factory=_no_ints)
    prompt_entries: Ints = field(default_factory=_no_ints)
    """… and of each of them so many log-probabilities: its own, then those of the likeliest."""
    prompt_rank: Ints = field(default_factory=_no_ints)
    prompt_entry_token: Ints = field(default_factory=_no_ints)
    prompt_entry_logprob: Floats = field(default_factory=_no_floats)


@message
class Suspected:
    """A worker died with these of the client's requests in its launched steps. The client keeps the count, and gives it
    back with a resumption."""

    epoch: Number
    ticket: Longs = field(default_factory=_no_longs)
    count: Ints = field(default_factory=_no_ints)
    """For each, how often by now without CLEARING_TOKENS tokens between; SUSPICIONS at most."""


@message
class Pong:
    """Answers a Ping that wants it."""

    epoch: Number


@message
class Draining:
    """Answers AskDrain."""

    epoch: Number
    worker: Name
    state: Name
    """"draining"; "unknown": no worker of that name is there (any more); "refused": not for this client to ask."""
    running: Count = 0
    """Requests that it still has: there is no room for them elsewhere yet."""


@message
class Histogram:
    """Observations by size, as Prometheus counts them but not cumulated."""

    name: Name
    """Of the metric, without prefix."""
    bounds: tuple[float, ...]
    """Upper limits, ascending: an observation counts for the first bound that it is not above."""
    counts: Longs
    """One for each bound, and a last one for what is above all."""
    total: float = 0.0
    """Sum of the observations."""


@message
class WorkerStats:
    """Counters of one worker since it registered; rates and shares are differences of two readings."""

    name: Name
    registration: Number
    num_blocks: Count
    free_blocks: Count
    """Blocks that no row uses; those that still hold a cached prefix among them."""
    running: Count
    steps: Number
    tokens: Number
    """Sampled tokens, those of rows that had ended meanwhile included."""
    cached_blocks: Count = 0
    """Blocks whose contents can be found again, those that rows use among them."""
    busy_us: Number
    """Device time inside steps."""
    gap_us: Number
    """Device time between steps while there was work: busy + gap is the time with work, gap / (busy + gap) the idle
    share."""
    state: Name = "serving"
    """Or "draining"."""
    in_flight: Count = 0
    """Steps that it has not answered."""
    silent_s: Seconds = 0.0
    """Since its last result or sign of idleness. Over `lease_s` it is lost; a worker whose silence is well below makes
    progress."""
    lease_s: Seconds = 0.0
    """How long it may be silent now, going by the step that it computes."""
    suspects: Count = 0
    """Of its requests, those that were suspected of a worker's death and are not cleared yet."""
    lookahead: Count = 0
    """Steps that may be queued ahead of the running one."""
    recent_idle_share: Seconds | None = None
    """gap / (busy + gap) of the last 10 to 20 s with work; None before there was any."""
    decode_busy_us: Number = 0
    """Part of busy_us: steps in which all rows decode."""
    decode_floor_us: Number = 0
    """How long these would take if they did nothing but read the weights and their rows' keys and values, at the
    bandwidth that the worker measured; 0 if it did not."""
    histograms: tuple[Histogram, ...] = ()
    """Of its steps."""


@message
class Stats:
    """Answers AskStats. Counters count since the scheduler started."""

    epoch: Number
    running: Count
    waiting: Count
    preemptions: Number
    refused: Number = 0
    """Requests that were refused because the service is overloaded."""
    timeouts: Number = 0
    looked_up_tokens: Number = 0
    """Known tokens of requests that got a place on a worker; a preempted request counts again."""
    cached_tokens: Number = 0
    """Those of them that were found in a prefix cache: the hit rate is cached / looked up."""
    evicted_blocks: Number = 0
    """Cached blocks that were given away for other contents."""
    lost_workers: Number = 0
    """Registrations that ended otherwise than by the worker's leaving on purpose."""
    moved: Number = 0
    """Attempts that ended because the worker was lost, left or was drained."""
    suspects: Count = 0
    """Waiting requests that will run alone, because they were suspected of two workers' deaths."""
    poisoned: Number = 0
    """Requests that failed because a worker died while it ran nothing else."""
    uptime_s: Seconds = 0.0
    """Since the scheduler started."""
    clients: Count = 0
    prompt_tokens: Number = 0
    """Of requests that got their first token."""
    generation_tokens: Number = 0
    """Sampled tokens that were delivered to a request."""
    finished: dict[Name, Number] = field(default_factory=dict)
    """Requests that ended, by reason."""
    refusals: dict[Name, Number] = field(default_factory=dict)
    """Requests that were refused, by code."""
    resumptions: Number = 0
    """Requests that had begun before they were accepted: in another life of the scheduler, or over another connection
    of their client."""
    joined_workers: Number = 0
    """Registrations of workers."""
    restarted_workers: Number = 0
    """Those of them by a new process under the name of one that was gone."""
    histograms: tuple[Histogram, ...] = ()
    """Of requests, and of the scheduler's own work."""
    workers: tuple[WorkerStats, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# worker → scheduler


@message
class WorkerHello:
    """Registers a worker that has loaded its model and can start at once."""

    version: Count
    name: Name
    pid: Count
    instance: Number
    """Drawn at random when the process starts: tells a worker that connects again from another of the same name."""
    model: ModelDescription
    files: tuple[FileInfo, ...] = ()
    num_blocks: Count
    block_size: Count
    max_num_seqs: Count
    """Slots of the device batch."""
    max_num_batched_tokens: Count
    """Most tokens of one step; at least max_num_seqs."""
    lookahead: Count
    """The worker takes up to lookahead + 1 plans that have no result yet."""
    longest_step_s: Seconds = 0.0
    """How long the largest step took when the worker tried it; its lease is no shorter than some of them."""
    weight_bytes: Number = 0
    """What a step reads of the weights, all experts of a mixture counted; 0 if unknown."""
    kv_bytes_per_token: Count = 0
    """Keys and values of one token, over all layers."""
    memory_bandwidth: Number = 0
    """Bytes per second that the device can read and write, as measured when the worker started; 0 if it was not."""
    started: Number = 0
    """When process `pid` started, in clock ticks since the machine did: tells it from a later one of the same id, or
    another of that id elsewhere. 0 if the worker does not know."""


@message
class StepResult:
    """What a step sampled: one token for each decoding slot in ascending order, then one for each chunk that ended its
    row's known tokens, in the plan's order."""

    epoch: Number
    registration: Number
    step: Number
    token: Ints = field(default_factory=_no_ints)
    busy_us: Count = 0
    """Device time from the step's first kernel to its last; MAX_COUNT for whatever is longer, as after the machine was
    suspended."""
    gap_us: Count = 0
    """Device time between the end of the last step and the start of this one, and within it waiting for the masks of
    grammars; without the former after an idle spell. Bounded as busy_us is."""
    kv_tokens: Number = 0
    """Of a step in which all rows decode: tokens whose keys and values they read. 0 for a step with chunks."""
    failed: Ints = field(default_factory=_no_ints)
    """Where in `token` stand the tokens of rows whose grammar cannot be followed any further; these tokens mean
    nothing …"""
    failed_error: tuple[Text, ...] = ()
    """… and why that is so."""

    rank: Ints = field(default_factory=_no_ints)
    """Of each sampled token whose row has logprobs: its rank in the vocabulary, from 1."""
    entry_token: Ints = field(default_factory=_no_ints)
    entry_logprob: Floats = field(default_factory=_no_floats)
    """Log-probabilities of these tokens, logprobs + 1 for each: its own, then those of the likeliest, in order."""
    prompt_rank: Ints = field(default_factory=_no_ints)
    prompt_entry_token: Ints = field(default_factory=_no_ints)
    prompt_entry_logprob: Floats = field(default_factory=_no_floats)
    """The same of tokens of prompts, prompt_logprobs + 1 for each: those that the step's chunks foretell, in the order
    of the chunks. A chunk of tokens a to b foretells a + 1 to b + 1, as far as they are in the prompt."""


@message
class GrammarChecked:
    """Answers CheckGrammar: what is wrong with the grammar, empty if rows may follow it."""

    epoch: Number
    registration: Number
    number: Number
    error: Text = ""


@message
class Idle:
    """Sent by the thread that executes plans, when it has had nothing to do for a while; `step` is the next it
    awaits."""

    epoch: Number
    registration: Number
    step: Number
    heard: Number = 0
    """The number of the last Ping of this registration that had one."""


# ---------------------------------------------------------------------------------------------------------------------
# scheduler → worker


@message
class WorkerWelcome:
    """The worker is registered; plans follow, the first with step 0."""

    version: Count
    epoch: Number
    registration: Number


@message
class Leave:
    """The worker's requests are elsewhere: it ends, and does not come back."""

    reason: Text = ""


@message
class StepPlan:
    """One step, as the difference from the one before. Applied in this order: leave, join, grow; then computed: every
    decoding slot (one token each), and the chunks.

    A slot decodes from the step after the one whose chunk reached the end of its known tokens until it leaves.
    """

    epoch: Number
    registration: Number
    step: Number
    after_idle: Annotated[bool, Field(strict=True)] = False
    """The worker had nothing to do before this plan, so the gap before it is not a wait."""

    leave: Ints = field(default_factory=_no_ints)
    """Slots that are over or preempted."""

    join_slot: Ints = field(default_factory=_no_ints)
    join_number: Longs = field(default_factory=_no_longs)
    join_attempt: Ints = field(default_factory=_no_ints)
    join_prompt_length: Ints = field(default_factory=_no_ints)
    """Tokens of the prompt: the first output position is counted from here."""
    join_length: Ints = field(default_factory=_no_ints)
    """Known tokens: prompt and, on a later attempt or a resumption, what was generated."""
    join_computed: Ints = field(default_factory=_no_ints)
    """Leading tokens whose keys and values already stand in the row's blocks."""
    join_num_blocks: Ints = field(default_factory=_no_ints)
    join_token: Ints = field(default_factory=_no_ints)
    """Concatenation of the joining rows' known tokens."""
    join_block: Ints = field(default_factory=_no_ints)
    """Concatenation of the joining rows' block ids."""
    join_temperature: Floats = field(default_factory=_no_floats)
    join_top_k: Ints = field(default_factory=_no_ints)
    join_top_p: Floats = field(default_factory=_no_floats)
    join_seed: Longs = field(default_factory=_no_longs)

    grammars: tuple[StructuredOutputsParams, ...] = ()
    """What joining rows must follow, each one once."""
    join_grammar: Ints = field(default_factory=_no_ints)
    """Which of these it is, or -1; not there if no joining row has one."""

    # Of the joining rows, those that use what few use. Each column of slots names some of them, in any order.
    min_p_slot: Ints = field(default_factory=_no_ints)
    min_p: Floats = field(default_factory=_no_floats)
    penalty_slot: Ints = field(default_factory=_no_ints)
    penalty: Floats = field(default_factory=_no_floats)
    """Three for each: repetition, presence, frequency."""
    bias_slot: Ints = field(default_factory=_no_ints)
    bias_count: Ints = field(default_factory=_no_ints)
    bias_token: Ints = field(default_factory=_no_ints)
    bias: Floats = field(default_factory=_no_floats)
    """`bias_count` for each, of these tokens."""
    allowed_slot: Ints = field(default_factory=_no_ints)
    allowed_mask: Ints = field(default_factory=_no_ints)
    """For each the bits of the whole vocabulary, 32 tokens a word, the lowest id in the lowest bit."""
    min_tokens_slot: Ints = field(default_factory=_no_ints)
    min_tokens: Ints = field(default_factory=_no_ints)
    min_tokens_stops: Ints = field(default_factory=_no_ints)
    """How many tokens each must not choose before; `min_tokens_stop` is their concatenation."""
    min_tokens_stop: Ints = field(default_factory=_no_ints)
    bad_words_slot: Ints = field(default_factory=_no_ints)
    """One entry for each sequence."""
    bad_words_length: Ints = field(default_factory=_no_ints)
    bad_words_token: Ints = field(default_factory=_no_ints)
    logprobs_slot: Ints = field(default_factory=_no_ints)
    logprobs: Ints = field(default_factory=_no_ints)
    """How many of the likeliest tokens are told with each token that is sampled."""
    prompt_logprobs_slot: Ints = field(default_factory=_no_ints)
    prompt_logprobs: Ints = field(default_factory=_no_ints)
    """How many are told with each token of the prompt, as the chunk is computed that foretells it."""

    grow_slot: Ints = field(default_factory=_no_ints)
    grow_block: Ints = field(default_factory=_no_ints)
    """Block `grow_block[i]` is appended to the block table of `grow_slot[i]`."""

    chunk_slot: Ints = field(default_factory=_no_ints)
    chunk_length: Ints = field(default_factory=_no_ints)
    """The next `chunk_length[i]` known tokens of `chunk_slot[i]` are computed, beginning after those already
    computed."""


@message
class CheckGrammar:
    """Asks whether rows can follow a grammar. Plans go on meanwhile."""

    epoch: Number
    registration: Number
    number: Number
    """Of the question, for its answer."""
    grammar: StructuredOutputsParams
