"""How one request wants its tokens chosen."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field

from .structured import StructuredOutputsParams

MAX_STOP_TOKEN_IDS = 128
"""A request may name at most this many stop tokens."""

MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 256
"""A request may have so many stop strings of at most so many characters; the SDK follows each through the text."""

MAX_LOGPROBS = 20
"""At most so many of the likeliest tokens are told with each token."""
MAX_LOGIT_BIASES = 1_024
"""Tokens of one request that may have a bias; a worker keeps room for them in every slot."""
MAX_ALLOWED_TOKEN_IDS = 65_536
MAX_BAD_WORDS = 128
"""Words; each may be two sequences of tokens, with a space before it and without."""
MAX_BAD_WORD_CHARS = 256
MAX_BAD_SEQUENCES = 2 * MAX_BAD_WORDS
MAX_BAD_SEQUENCE_TOKENS = 32
"""The most tokens of a sequence that must not come; a worker keeps room for them in every slot."""
MAX_PROMPT_LOGPROBS_ENTRIES = 524_288
"""Prompt tokens × (prompt_logprobs + 1) of one request: 4 MiB that its client must be able to take at once."""

MAX_SEED = 2**63 - 1
_MASK = 2**64 - 1


def _integer_keys(value: Any) -> Any:
    """Keys of maps travel as text, in JSON as here."""
    if not isinstance(value, dict):
        return value
    return {int(k) if isinstance(k, str) and k.isascii() and k.isdecimal() else k: v for k, v in value.items()}


_TokenId: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
_Bias: TypeAlias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
_BadWord: TypeAlias = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_BAD_WORD_CHARS)]
_BadSequence: TypeAlias = Annotated[tuple[_TokenId, ...], Field(min_length=1, max_length=MAX_BAD_SEQUENCE_TOKENS)]
_Penalty: TypeAlias = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]
_Logprobs: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, named and meant as vLLM's.

    Validated where it matters, at the scheduler's door (and by the SDK before sending): constructing one checks
    nothing.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    """0 chooses the most probable token (the lowest id among equals); otherwise logits are divided by it."""
    top_k: Annotated[int, Field(strict=True, ge=-1, le=2**31 - 1)] = 0
    """Only the k most probable tokens stay; 0 or -1 keeps all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Only the smallest set of most probable tokens whose probabilities reach p stays."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Only tokens whose probability is at least min_p times that of the most probable one stay; 0 keeps all."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0, allow_inf_nan=False)] = 1.0
    """Logits of tokens of the prompt and the output so far are divided by it if positive, else multiplied."""
    presence_penalty: _Penalty = 0.0
    """Taken from the logits of tokens of the output so far."""
    frequency_penalty: _Penalty = 0.0
    """Taken from the logits of tokens of the output so far, as often as they came."""
    logit_bias: (
        Annotated[dict[_TokenId, _Bias], BeforeValidator(_integer_keys), Field(max_length=MAX_LOGIT_BIASES)] | None
    ) = None
    """Added to the logits of these tokens."""
    allowed_token_ids: Annotated[tuple[_TokenId, ...], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)] | None = (
        None
    )
    """Only these tokens can be chosen."""
    bad_words_token_ids: Annotated[tuple[_BadSequence, ...], Field(max_length=MAX_BAD_SEQUENCES)] = ()
    """Sequences of tokens that the output must not contain: their last token is not chosen after the others. The SDK
    makes them of bad_words."""
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] | None = None
    """A token's random number depends on (seed, sample index, output position) alone. The SDK draws one if missing."""
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None
    """At most this many tokens are generated; None: as many as the context length leaves."""
    min_tokens: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] = 0
    """Before so many tokens are generated, neither stop_token_ids nor the model's end-of-sequence tokens are chosen,
    and in their text no stop string is looked for."""
    stop_token_ids: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=0)], ...], Field(max_length=MAX_STOP_TOKEN_IDS)
    ] = ()
    """Generation ends after any of these, as after the model's own end-of-sequence tokens."""
    ignore_eos: Annotated[bool, Field(strict=True)] = False
    """Go on after the model's end-of-sequence tokens (stop_token_ids still end the request)."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must look like: a JSON schema, a regular expression, a choice, a grammar."""

    logprobs: _Logprobs | None = None
    """Tell the log-probability of each token of the output, and those of so many likeliest ones. They are the model's
    own: before penalties, biases, temperature and everything else here (vLLM's `raw_logprobs`)."""
    prompt_logprobs: _Logprobs | None = None
    """The same of the prompt's tokens, from the second on. Such a request computes its whole prompt: it takes nothing
    from the prefix cache."""

    bad_words: Annotated[tuple[_BadWord, ...], Field(max_length=MAX_BAD_WORDS)] = ()
    """Words that the output must not contain, at the beginning of a text or after a space. The SDK turns them into
    bad_words_token_ids."""
    stop: Annotated[
        tuple[Annotated[str, Field(strict=True, min_length=1, max_length=MAX_STOP_CHARS)], ...],
        Field(max_length=MAX_STOP_STRINGS),
    ] = ()
    """Texts that end the answer, which ends before them. Found by the SDK, which also takes a single string."""
    include_stop_str_in_output: Annotated[bool, Field(strict=True)] = False
    """The answer's text ends after its stop string, or stop token, instead of before. Done by the SDK."""
    skip_special_tokens: Annotated[bool, Field(strict=True)] = True
    """Special tokens are no part of the text. Done by the SDK."""


SAMPLING_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(SamplingParams))
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(SamplingParams)}
_TEXT_FIELDS = ("bad_words", "stop", "include_stop_str_in_output", "skip_special_tokens")
_about_text = attrgetter(*_TEXT_FIELDS)
_NO_TEXT = _about_text(SamplingParams())


def text_fields(sampling: SamplingParams) -> list[str]:
    """The parameters about text that are not at their defaults. They are the SDK's own and do not travel."""
    if _about_text(sampling) == _NO_TEXT:
        return []
    return [name for name in _TEXT_FIELDS if getattr(sampling, name) != _DEFAULTS[name]]


def without_text(sampling: SamplingParams) -> SamplingParams:
    """What travels: the parameters with those about text at their defaults."""
    return replace(sampling, **{name: _DEFAULTS[name] for name in _TEXT_FIELDS}) if text_fields(sampling) else sampling


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one of several samples, 0 … MAX_SEED: that of sample 0 is `seed` itself.

    Others are mixed by splitmix64's finalizer (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators).
    """
    if sample == 0:
        return seed
    mixed = (seed + sample * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) & MAX_SEED
