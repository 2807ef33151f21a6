"""What a benchmark asks for: prompts, output lengths and times of arrival, all of them fixed by a seed."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ..protocol.errors import ConfigurationError
from ..protocol.sampling import SamplingParams

Ids: TypeAlias = npt.NDArray[np.int32]

DEFAULT_LENGTHS = {"uniform": ("256", "256"), "ragged": ("128-1024", "64-512"), "shared-prefix": ("64", "64")}
"""Tokens of prompts and of outputs where no flag gives them."""
DEFAULT_PROMPTS = 32
DEFAULT_PREFIX_TOKENS = 512
_SAMPLING: Final = TypeAdapter(SamplingParams)


class Load(BaseModel):
    """What is asked for. Fields are the command line's flags; one that the workload does not use is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workload: Annotated[
        Literal["uniform", "ragged", "shared-prefix", "trace"],
        Field(description="Equal lengths, random lengths, prompts that begin alike in groups, or a recorded load."),
    ] = "uniform"
    num_prompts: Annotated[
        int | None, Field(ge=1, le=10_000_000, description="Requests of a run; default: 32, or all of a trace.")
    ] = None
    prompt_tokens: Annotated[
        str | None,
        Field(
            description="Tokens of each prompt, N, or LOW-HIGH for ragged and shared-prefix (after the prefix); "
            "default: 256 (uniform), 128-1024 (ragged), 64 (shared-prefix)."
        ),
    ] = None
    output_tokens: Annotated[
        str | None,
        Field(
            description="Tokens generated for each, N or LOW-HIGH; default: 256, 64-512 (ragged), 64 (shared-prefix)."
        ),
    ] = None
    prefix_tokens: Annotated[
        int | None, Field(ge=1, le=2**24, description="shared-prefix: tokens that a group has in common; default: 512.")
    ] = None
    prefix_groups: Annotated[
        int | None, Field(ge=1, le=2**24, description="shared-prefix: how many groups, taken in turns; default: 1.")
    ] = None
    trace_file: Annotated[
        str | None, Field(description="trace: a JSONL file, one request a line (docs/benchmarks.md has its fields).")
    ] = None
    text: Annotated[bool, Field(description="Send text, which the client tokenizes, instead of token ids.")] = False
    chat: Annotated[
        bool, Field(description="Send each prompt as text, as the user's message of a chat with the model's template.")
    ] = False
    temperature: Annotated[float, Field(ge=0.0, le=100.0, description="0 is greedy.")] = 0.0
    sampling_params: Annotated[
        str | None,
        Field(description='More of them, a JSON object named as in the SDK: {"top_p": 0.9, "frequency_penalty": 0.1}.'),
    ] = None
    sampling_share: Annotated[
        float, Field(gt=0.0, le=1.0, description="Share of the requests that have --sampling-params, spread evenly.")
    ] = 1.0
    ignore_eos: Annotated[
        bool, Field(description="Generate all output tokens even after the model's end-of-sequence token.")
    ] = True
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="Of lengths, token ids and times of arrival.")] = 0

    @model_validator(mode="after")
    def _fit_together(self) -> Load:
        users = {
            "prompt_tokens": ("uniform", "ragged", "shared-prefix"),
            "output_tokens": ("uniform", "ragged", "shared-prefix"),
            "text": ("uniform", "ragged", "shared-prefix"),
            "prefix_tokens": ("shared-prefix",),
            "prefix_groups": ("shared-prefix",),
            "trace_file": ("trace",),
        }
        for name, workloads in users.items():
            if getattr(self, name) not in (None, False) and self.workload not in workloads:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for --workload {' or '.join(workloads)}, not {self.workload}"
                )
        more_sampling(self.sampling_params)
        if self.sampling_share < 1.0 and self.sampling_params is None:
            raise ValueError("--sampling-share is for --sampling-params, which are not given")
        if self.workload == "trace":
            if self.trace_file is None:
                raise ValueError("--workload trace needs a file: --trace-file FILE")
            return self
        for name, (low, high) in (("prompt-tokens", self.prompt_range), ("output-tokens", self.output_range)):
            if self.workload == "uniform" and low != high:
                raise ValueError(f"--{name}: {low}-{high} is a range, which --workload ragged takes")
        return self

    @property
    def prompt_range(self) -> tuple[int, int]:
        """Least and most tokens of a prompt, a shared prefix not counted."""
        return _span("--prompt-tokens", self.prompt_tokens or DEFAULT_LENGTHS[self.workload][0])

    @property
    def output_range(self) -> tuple[int, int]:
        """Least and most tokens of an output."""
        return _span("--output-tokens", self.output_tokens or DEFAULT_LENGTHS[self.workload][1])


_OWN_FLAGS = {"max_tokens": "--output-tokens", "seed": "--seed"}


def more_sampling(text: str | None) -> dict[str, Any]:
    """What --sampling-params sets. Raises ValueError by name for what it cannot."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--sampling-params: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--sampling-params: expected a JSON object, got {text!r}")  # noqa: TRY004 - pydantic tells it
    for name, flag in _OWN_FLAGS.items():
        if name in found:
            raise ValueError(f"--sampling-params: {name} is what {flag} says")
    structure = found.get("structured_outputs")
    if isinstance(structure, dict) and isinstance(structure.get("json"), dict):
        found["structured_outputs"] = {**structure, "json": json.dumps(structure["json"])}
    try:
        _SAMPLING.validate_python(found)
    except ValidationError as error:
        raise ValueError(f"--sampling-params: {_first(error)}") from None
    return found


def sampling_of(load: Load, index: int, output_tokens: int) -> SamplingParams:
    """Of request `index`."""
    share = Fraction(str(load.sampling_share))  # in binary, 0.57 of 100 is 56
    has_more = math.floor((index + 1) * share) > math.floor(index * share)
    return _SAMPLING.validate_python(
        {
            "temperature": load.temperature,
            "ignore_eos": load.ignore_eos,
            **(more_sampling(load.sampling_params) if has_more else {}),
            "max_tokens": output_tokens,
            "seed": load.seed + index,
        }
    )


def _span(name: str, text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        found = int(low), int(high) if dash else int(low)
    except ValueError:
        raise ValueError(f"{name}: expected N or LOW-HIGH, got {text!r}") from None
    if not 1 <= found[0] <= found[1] <= 2**24:
        raise ValueError(f"{name}: expected 1 <= LOW <= HIGH <= {2**24}, got {text!r}")
    return found


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request, but for its token ids where those are random."""

    prompt: str | Ids | int
    """Text, token ids, or how many random ones."""
    output_tokens: int
    group: int | None = None
    """Which shared prefix comes before the prompt."""
    arrival_s: float = 0.0
    """Only a trace has it; the first request's is 0."""


def plan(load: Load) -> list[Wanted]:
    """The load's requests, in the order in which they are sent. Raises ConfigurationError for a trace that cannot be
    used.

    Lengths are `random.Random(seed)`'s, for each request first the prompt's and then the output's.
    """
    if load.workload == "trace":
        return _read_trace(Path(load.trace_file or ""), load.num_prompts)
    rng = random.Random(load.seed)
    groups = load.prefix_groups or 1 if load.workload == "shared-prefix" else None
    return [
        Wanted(rng.randint(*load.prompt_range), rng.randint(*load.output_range), None if groups is None else i % groups)
        for i in range(load.num_prompts or DEFAULT_PROMPTS)
    ]


def prompt_of(load: Load, index: int, wanted: Wanted, vocab: int, run: int) -> str | Ids:
    """What to send for request `index` of run `run`: text or token ids, int32, below `vocab`.

    Random ids depend on (seed, run, index) alone, so that whoever sends a part of the requests can make that part, and
    no run finds the last one's prompts in a prefix cache.
    """
    if not isinstance(wanted.prompt, int):
        return wanted.prompt
    own = _random_ids(vocab, wanted.prompt, load.seed, run, 0, index)
    if wanted.group is None:
        return own
    prefix = _random_ids(vocab, load.prefix_tokens or DEFAULT_PREFIX_TOKENS, load.seed, run, 1, wanted.group)
    return np.concatenate([prefix, own])


def _random_ids(vocab: int, count: int, *seed: int) -> Ids:
    return np.random.default_rng(seed).integers(0, vocab, count, dtype=np.int32)


def arrivals(count: int, request_rate: float, burstiness: float, seed: int) -> list[float]:
    """When each of `count` requests is sent, in seconds from the first; all 0 at an infinite rate.

    Gaps are gamma-distributed with shape `burstiness`, which at 1 makes a Poisson process; below, requests come in
    bursts; above, more evenly. As in vLLM they are stretched so that the rate is exactly the one asked for.
    """
    if math.isinf(request_rate) or count == 1:
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0, count - 1)
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    found: list[float] = (times * ((count - 1) / request_rate / times[-1])).tolist()
    return found


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    arrival_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    prompt: Annotated[str, Field(min_length=1)] | None = None
    prompt_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)] | None = None
    prompt_tokens: Annotated[int, Field(ge=1, le=2**24)] | None = None
    output_tokens: Annotated[int, Field(ge=1, le=2**24)]

    @model_validator(mode="after")
    def _one_prompt(self) -> _Line:
        if sum(value is not None for value in (self.prompt, self.prompt_token_ids, self.prompt_tokens)) != 1:
            raise ValueError("exactly one of prompt, prompt_token_ids and prompt_tokens is needed")
        return self

    @property
    def asked(self) -> str | Ids | int:
        if self.prompt_token_ids is not None:
            return np.array(self.prompt_token_ids, np.int32)
        return self.prompt if self.prompt is not None else self.prompt_tokens or 0


def _read_trace(path: Path, most: int | None) -> list[Wanted]:
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--trace-file: cannot read {path}: {error}") from error
    lines: list[_Line] = []
    for number, text in enumerate(texts, 1):
        if text.strip() and (most is None or len(lines) < most):
            try:
                lines.append(_Line.model_validate_json(text))
            except ValidationError as error:
                raise ConfigurationError(f"--trace-file: {path}, line {number}: {_first(error)}") from error
    if not lines or len(lines) < (most or 0):
        raise ConfigurationError(
            f"--trace-file: {path} has {len(lines)} requests, not the {most or 'one at least'} asked for"
        )
    lines.sort(key=lambda line: line.arrival_s)
    first = lines[0].arrival_s
    return [Wanted(line.asked, line.output_tokens, arrival_s=line.arrival_s - first) for line in lines]


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in detail["loc"])
    return f"{where}: {detail['msg']}" if where else detail["msg"]
