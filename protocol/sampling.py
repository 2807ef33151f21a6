"""How one request wants its tokens chosen."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field

MAX_STOP_TOKEN_IDS = 128
"""A request may name at most this many stop tokens; they are compared in one matrix for all rows."""

MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 256
"""A request may have so many stop strings of at most so many characters; the SDK follows each through the text."""

MAX_SEED = 2**63 - 1
_MASK = 2**64 - 1


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
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] | None = None
    """A token's random number depends on (seed, sample index, output position) alone. The SDK draws one if missing."""
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None
    """At most this many tokens are generated; None: as many as the context length leaves."""
    stop_token_ids: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=0)], ...], Field(max_length=MAX_STOP_TOKEN_IDS)
    ] = ()
    """Generation ends after any of these, as after the model's own end-of-sequence tokens."""
    ignore_eos: Annotated[bool, Field(strict=True)] = False
    """Go on after the model's end-of-sequence tokens (stop_token_ids still end the request)."""

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
_TEXT_FIELDS = ("stop", "include_stop_str_in_output", "skip_special_tokens")


def text_fields(sampling: SamplingParams) -> list[str]:
    """The parameters about text that are not at their defaults. They are the SDK's own and do not travel."""
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
