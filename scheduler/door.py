"""What a request must satisfy before it can reach the step loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..protocol.messages import MAX_SAMPLES, ModelDescription
from ..protocol.sampling import SamplingParams, text_fields
from .events import IntColumn, Submitted


@dataclass(frozen=True, slots=True)
class Invalid:
    """Why a request is refused: the field, what it may be, what it was."""

    message: str
    field: str
    limit: str
    value: str


def find_fault(request: Submitted, model: ModelDescription, max_n: int) -> Invalid | None:
    """The first thing wrong with a submission, or None. Types and ranges of its fields were checked when it was
    decoded."""
    return (
        _bad_count(request, max_n)
        or _bad_prompt(request.prompt, model)
        or _bad_tokens("generated", request.generated, model)
        or _bad_sampling(request.sampling, model)
        or _bad_resumption(request, model)
    )


def _bad_count(request: Submitted, max_n: int) -> Invalid | None:
    if request.n > max_n:
        return Invalid(f"n is {request.n}, over the limit of {max_n} samples", "n", str(max_n), str(request.n))
    if request.n > 1 and len(request.generated):
        return Invalid("a resumption continues one sample, so n must be 1", "n", "1", str(request.n))
    if request.sample + request.n > MAX_SAMPLES:
        last = request.sample + request.n - 1
        return Invalid(
            f"sample {last} is over the limit of {MAX_SAMPLES - 1}", "sample", str(MAX_SAMPLES - 1), str(last)
        )
    if request.ticket + request.n > 2**63 - 1:
        return Invalid("the tickets of the samples go past 2^63 - 1", "ticket", str(2**63 - 1), str(request.ticket))
    return None


def _bad_prompt(prompt: IntColumn, model: ModelDescription) -> Invalid | None:
    longest = model.max_model_len - 1
    if not len(prompt):
        return Invalid("the prompt is empty; give at least one token", "prompt", "at least 1 token", "0 tokens")
    if len(prompt) > longest:
        return Invalid(
            f"the prompt has {len(prompt)} tokens; the model's context of {model.max_model_len} leaves room for "
            f"{longest} and one of output",
            "prompt",
            f"{longest} tokens",
            f"{len(prompt)} tokens",
        )
    return _bad_tokens("prompt", prompt, model)


def _bad_tokens(field: str, tokens: IntColumn, model: ModelDescription) -> Invalid | None:
    # As unsigned numbers, negative ones are the largest: one pass is enough.
    if not len(tokens) or int(tokens.view(np.uint32).max()) < model.vocab_size:
        return None
    outside = int(tokens[(tokens < 0) | (tokens >= model.vocab_size)][0])
    return Invalid(
        f"{field} holds token id {outside}; the vocabulary has ids 0 to {model.vocab_size - 1}",
        field,
        f"0 to {model.vocab_size - 1}",
        str(outside),
    )


def _bad_sampling(sampling: SamplingParams, model: ModelDescription) -> Invalid | None:
    outside = [token for token in sampling.stop_token_ids if token >= model.vocab_size]
    if outside:
        return Invalid(
            f"stop_token_ids holds {outside[0]}; the vocabulary has ids 0 to {model.vocab_size - 1}",
            "stop_token_ids",
            f"0 to {model.vocab_size - 1}",
            str(outside[0]),
        )
    about_text = text_fields(sampling)
    if about_text:
        field = about_text[0]
        return Invalid(f"{field} is about text, which is the client's to watch", field, "not sent", "sent")
    if sampling.temperature > 0 and sampling.seed is None:
        return Invalid(
            "seed is missing; a client draws one before it first sends a sampled request",
            "seed",
            "0 to 2^63 - 1",
            "none",
        )
    return None


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
