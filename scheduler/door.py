"""What a request must satisfy before it can reach the step loop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..protocol.errors import over_context
from ..protocol.messages import MAX_SAMPLES, ModelDescription
from ..protocol.sampling import MAX_PROMPT_LOGPROBS_ENTRIES, SamplingParams, text_fields
from ..protocol.structured import problem
from .events import IntColumn, Submitted

LAST_TICKET = 2**63 - 1
"""Tickets lie below."""

_biggest = np.maximum.reduce


@dataclass(frozen=True, slots=True)
class Invalid:
    """Why a request is refused: the field, what it may be, what it was."""

    message: str
    field: str
    limit: str
    value: str


def is_plain(sampling: SamplingParams) -> bool:
    """All parameters are at their defaults but those that every row has columns for."""
    # Named one by one it takes half of what comparing tuples of them does; a test knows all that there are.
    return not (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.min_p
        or sampling.logit_bias is not None
        or sampling.allowed_token_ids is not None
        or sampling.bad_words_token_ids
        or sampling.min_tokens
        or sampling.stop_token_ids
        or sampling.structured_outputs is not None
        or sampling.logprobs is not None
        or sampling.prompt_logprobs is not None
        or sampling.bad_words
        or sampling.stop
        or sampling.include_stop_str_in_output
        or not sampling.skip_special_tokens
    )


def is_ordinary(request: Submitted) -> bool:
    """One sample of a new request, with sampling parameters that every row has columns for: if its prompt is in order,
    `find_fault` finds nothing."""
    sampling = request.sampling
    return (
        request.n == 1
        and not request.sample
        and not request.resumed
        and not request.suspicions
        and request.ticket < LAST_TICKET
        and sampling.seed is not None
        and is_plain(sampling)
        and not len(request.generated)
    )


def highest_token(prompts: list[IntColumn]) -> int:
    """Of all these prompts, which have a token at least; negative ones count as the higher."""
    # As bytes they are put together in a quarter of the time.
    tokens = np.frombuffer(b"".join([prompt.tobytes() for prompt in prompts]), np.uint32)
    highest: int = tokens.item(tokens.argmax())  # for a few it takes half of the time of `max`
    return highest


def find_fault(
    request: Submitted, model: ModelDescription, max_n: int, plain: bool, highest: int | None
) -> Invalid | None:
    """The first thing wrong with a submission, or None. Types and ranges of its fields were checked when it was
    decoded. `plain`: what `is_plain` says of its sampling parameters; `highest`: no token of the prompt is higher, as
    `highest_token` counts; None if that is not known."""
    return (
        (_bad_count(request, max_n) if request.n > 1 or request.sample or request.ticket >= LAST_TICKET else None)
        or (None if 0 < len(request.prompt) < model.max_model_len else _bad_length(request.prompt, model))
        or (_bad_tokens("prompt", request.prompt, model) if highest is None or highest >= model.vocab_size else None)
        or (_bad_tokens("generated", request.generated, model) if len(request.generated) else None)
        or (_no_seed(request.sampling) if request.sampling.seed is None else None)
        or (None if plain else _bad_sampling(request.sampling, len(request.prompt), model))
        or (_bad_resumption(request, model) if len(request.generated) else None)
    )


def _bad_count(request: Submitted, max_n: int) -> Invalid | None:
    if request.n > max_n:
        return Invalid(f"n is {request.n}, over the limit of {max_n} samples", "n", str(max_n), str(request.n))
    if request.n > 1 and (request.resumed or len(request.generated)):
        return Invalid("a resumption continues one sample, so n must be 1", "n", "1", str(request.n))
    if request.sample + request.n > MAX_SAMPLES:
        last = request.sample + request.n - 1
        return Invalid(
            f"sample {last} is over the limit of {MAX_SAMPLES - 1}", "sample", str(MAX_SAMPLES - 1), str(last)
        )
    if request.ticket + request.n > LAST_TICKET:
        return Invalid("the tickets of the samples go past 2^63 - 1", "ticket", str(LAST_TICKET), str(request.ticket))
    return None


def _bad_length(prompt: IntColumn, model: ModelDescription) -> Invalid | None:
    longest = model.max_model_len - 1
    if not len(prompt):
        return Invalid("the prompt is empty; give at least one token", "prompt", "at least 1 token", "0 tokens")
    if len(prompt) > longest:
        return Invalid(
            over_context(len(prompt), model.max_model_len),
            "prompt",
            f"{longest} tokens",
            f"{len(prompt)} tokens",
        )
    return None


def _bad_tokens(field: str, tokens: IntColumn, model: ModelDescription) -> Invalid | None:
    # As unsigned numbers, negative ones are the largest: one pass is enough.
    if not len(tokens) or _biggest(tokens.view(np.uint32)) < model.vocab_size:
        return None
    outside = int(tokens[(tokens < 0) | (tokens >= model.vocab_size)][0])
    return Invalid(
        f"{field} holds token id {outside}; the vocabulary has ids 0 to {model.vocab_size - 1}",
        field,
        f"0 to {model.vocab_size - 1}",
        str(outside),
    )


def _no_seed(sampling: SamplingParams) -> Invalid | None:
    if not sampling.temperature > 0:
        return None
    return Invalid(
        "seed is missing; a client draws one before it first sends a sampled request",
        "seed",
        "0 to 2^63 - 1",
        "none",
    )


def _bad_sampling(sampling: SamplingParams, prompt_length: int, model: ModelDescription) -> Invalid | None:
    about_text = text_fields(sampling)
    if about_text:
        field = about_text[0]
        return Invalid(f"{field} is about text, which is the client's to watch", field, "not sent", "sent")
    return (
        _bad_structure(sampling, model)
        or _outside_vocabulary(sampling, model.vocab_size)
        or _bad_min_tokens(sampling)
        or _nothing_left(sampling, model)
        or _too_many_logprobs(sampling, prompt_length)
    )


def _bad_structure(sampling: SamplingParams, model: ModelDescription) -> Invalid | None:
    """What shows without compiling the grammar, which a worker does (see grammars.py)."""
    wanted = sampling.structured_outputs
    if wanted is None:
        return None
    found = problem(wanted)
    if found is not None:
        field = f"structured_outputs.{found.field}"
        return Invalid(f"{field}: {found.message}", field, found.limit, found.value)
    if not model.eos_token_ids:
        return Invalid(
            f"structured_outputs: {model.name} has no end-of-sequence token, with which such an output ends",
            "structured_outputs",
            "none with this model",
            wanted.kind,
        )
    if sampling.ignore_eos:
        return Invalid(
            "ignore_eos contradicts structured_outputs: the output ends where its grammar ends",
            "ignore_eos",
            "false",
            "true",
        )
    return None


def _outside_vocabulary(sampling: SamplingParams, vocab_size: int) -> Invalid | None:
    named: tuple[tuple[str, Collection[int]], ...] = (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias or ()),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
        ("bad_words_token_ids", tuple(chain.from_iterable(sampling.bad_words_token_ids))),
    )
    for field, tokens in named:
        if not tokens:
            continue
        highest = max(tokens)
        if highest >= vocab_size:
            limit = f"0 to {vocab_size - 1}"
            return Invalid(f"{field} holds {highest}; the vocabulary has ids {limit}", field, limit, str(highest))
    return None


def _bad_min_tokens(sampling: SamplingParams) -> Invalid | None:
    if sampling.max_tokens is None or sampling.min_tokens <= sampling.max_tokens:
        return None
    return Invalid(
        f"min_tokens is {sampling.min_tokens}, over max_tokens, {sampling.max_tokens}",
        "min_tokens",
        str(sampling.max_tokens),
        str(sampling.min_tokens),
    )


def _nothing_left(sampling: SamplingParams, model: ModelDescription) -> Invalid | None:
    """Parameters that leave no token to choose. What only some outputs lead to is for the worker to cope with."""
    if not sampling.bad_words_token_ids and not sampling.min_tokens:
        return None
    banned = {sequence[0] for sequence in sampling.bad_words_token_ids if len(sequence) == 1}
    if sampling.min_tokens:
        banned.update(sampling.stop_token_ids, model.eos_token_ids)
    if not banned:
        return None
    allowed = sampling.allowed_token_ids
    left = len(set(allowed) - banned) if allowed is not None else model.vocab_size - len(banned)
    if left > 0:
        return None
    field = "bad_words_token_ids" if allowed is None else "allowed_token_ids"
    return Invalid(
        f"{field}: bad words{' and min_tokens' if sampling.min_tokens else ''} leave no token to choose",
        field,
        "at least 1 token",
        "0 tokens",
    )


def _too_many_logprobs(sampling: SamplingParams, prompt_length: int) -> Invalid | None:
    if sampling.prompt_logprobs is None:
        return None
    entries = prompt_length * (sampling.prompt_logprobs + 1)
    if entries <= MAX_PROMPT_LOGPROBS_ENTRIES:
        return None
    return Invalid(
        f"prompt_logprobs: {sampling.prompt_logprobs} likeliest of each of {prompt_length} prompt tokens are {entries} "
        f"entries, over the limit of {MAX_PROMPT_LOGPROBS_ENTRIES}",
        "prompt_logprobs",
        str(MAX_PROMPT_LOGPROBS_ENTRIES),
        str(entries),
    )


def _bad_resumption(request: Submitted, model: ModelDescription) -> Invalid | None:
    most = model.max_model_len - len(request.prompt)
    if request.sampling.max_tokens is not None:
        most = min(most, request.sampling.max_tokens)
    if len(request.generated) > most:
        return Invalid(
            f"generated holds {len(request.generated)} tokens; max_tokens and the model's context leave room for "
            f"{most}",
            "generated",
            f"{most} tokens",
            f"{len(request.generated)} tokens",
        )
    return None
