"""What every sampling parameter means, written down a second time: one token at a time, in NumPy and plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tandem.protocol.sampling import SamplingParams

Row: TypeAlias = NDArray[np.float64]
_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def log_softmax(logits: NDArray[Any]) -> Row:
    shifted: Row = logits.astype(np.float64) - float(logits.max())
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def random_number(seed: int, position: int) -> float:
    """In [0, 1); of a request's first sample."""
    state = _mix((seed + _GAMMA) & _MASK)
    for counter in (0, position):
        state = _mix((state + (counter + 1) * _GAMMA) & _MASK)
    return (state >> 40) / 2**24


def seed_of_sample(seed: int, sample: int) -> int:
    """What the random numbers of one of several samples are made of."""
    return _mix((seed + sample * _GAMMA) & _MASK) & (2**63 - 1) if sample else seed


def adjusted(
    logits: NDArray[Any], sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int], eos: Sequence[int]
) -> Row:
    """Logits after masks, biases and penalties."""
    out = logits.astype(np.float64)
    banned = set()
    if sampling.allowed_token_ids is not None:
        banned |= set(range(len(out))) - set(sampling.allowed_token_ids)
    for *before, last in sampling.bad_words_token_ids:
        if len(before) <= len(generated) and list(generated[len(generated) - len(before) :]) == before:
            banned.add(last)
    if len(generated) < sampling.min_tokens:
        banned |= {*eos, *sampling.stop_token_ids}
    if len(banned) < len(out):
        out[list(banned)] = -np.inf
    for token, bias in (sampling.logit_bias or {}).items():
        out[token] += bias
    for token in {*prompt, *generated}:
        out[token] *= 1 / sampling.repetition_penalty if out[token] > 0 else sampling.repetition_penalty
    for token in set(generated):
        out[token] -= sampling.presence_penalty + sampling.frequency_penalty * list(generated).count(token)
    return out


def distribution(logits: Row, sampling: SamplingParams) -> Row:
    """Probabilities after temperature, min-p, top-k and top-p."""
    probabilities = np.exp(log_softmax(logits / sampling.temperature))
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = [token for token in order if probabilities[token] >= sampling.min_p * probabilities[order[0]]]
    if sampling.top_k > 0:
        kept = kept[: sampling.top_k]
    total, reached, count = probabilities[kept].sum(), 0.0, 0
    while count < len(kept) and (count == 0 or reached < (sampling.top_p - 1e-6) * total):
        reached += probabilities[kept[count]]
        count += 1
    if sampling.top_p < 1.0:
        kept = kept[:count]
    out = np.zeros_like(probabilities)
    out[kept] = probabilities[kept] / probabilities[kept].sum()
    return out


def choose(logits: Row, sampling: SamplingParams, position: int) -> int:
    if sampling.temperature < 1e-5:
        return int(logits.argmax())
    cumulative = np.cumsum(distribution(logits, sampling))
    drawn = random_number(sampling.seed or 0, position) * cumulative[-1]
    return int(np.searchsorted(cumulative, drawn, side="right"))


def continuation(
    logits_of: Callable[[list[int]], NDArray[Any]], sampling: SamplingParams, prompt: list[int], eos: Sequence[int] = ()
) -> tuple[list[int], list[Row]]:
    """Tokens, and the model's own log-probabilities at each of them. `logits_of` gives the logits after a sequence."""
    generated: list[int] = []
    told: list[Row] = []
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)}
    while len(generated) < (sampling.max_tokens or 0) and not (generated and generated[-1] in stops):
        logits = logits_of(prompt + generated)
        told.append(log_softmax(logits))
        generated.append(choose(adjusted(logits, sampling, prompt, generated, eos), sampling, len(generated)))
    return generated, told


def shown(
    text_of: Callable[[list[int]], str], sampling: SamplingParams, generated: list[int], eos: Sequence[int] = ()
) -> tuple[str, int, str, int | str | None]:
    """What a caller sees of the tokens that would be generated if there were no stop strings: the text, how many of the
    tokens, the finish reason and the stop reason. `text_of` decodes, and only adds to a text for more tokens."""
    for count in range(1, len(generated) + 1):
        text = text_of(generated[:count])
        for end in range(len(text_of(generated[: count - 1])) + 1, len(text) + 1):
            found = max((stop for stop in sampling.stop if text[:end].endswith(stop)), key=len, default=None)
            if found is not None and count > sampling.min_tokens:
                return text[: end if sampling.include_stop_str_in_output else end - len(found)], count, "stop", found
    count, last = len(generated), generated[-1]
    if last in sampling.stop_token_ids or (last in eos and not sampling.ignore_eos):
        whole = generated if sampling.include_stop_str_in_output else generated[:-1]
        return text_of(whole), count, "stop", last if last in sampling.stop_token_ids else None
    return text_of(generated), count, "length", None


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
