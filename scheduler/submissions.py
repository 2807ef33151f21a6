"""What becomes of a submission: a request for each of its samples, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from ..protocol.messages import ModelDescription
from ..protocol.sampling import sample_seed
from .blocks import root
from .door import Invalid
from .events import Reject, Submitted
from .joining import is_rare
from .metrics import Counters
from .policy import Policy
from .requests import Request
from .throughput import EndingRate

_NO_SALT = root("")


def make_request(event: Submitted, i: int, model: ModelDescription, number: int, now: float, plain: bool) -> Request:
    """The request `number`, for the sample `i` of those that a submission asks for; the door has found no fault.
    `plain`: what `door.is_plain` says of its sampling parameters."""
    sampling, prompt, sample = event.sampling, event.prompt, event.sample + i
    if sampling.prompt_logprobs is not None and sample:
        sampling = replace(sampling, prompt_logprobs=None)  # the prompt is told once, with sample 0
    length, limit = len(prompt), model.max_model_len
    if sampling.max_tokens is not None and length + sampling.max_tokens < limit:
        limit = length + sampling.max_tokens
    return Request(  # by position: keywords make it cost three times as much
        number,
        event.client,
        event.ticket + i,
        np.concatenate([prompt, event.generated]) if len(event.generated) else prompt,
        length,
        limit,
        sampling,
        _stops(() if sampling.ignore_eos else model.eos_token_ids, sampling.stop_token_ids),
        now,
        0 if sampling.seed is None else sample_seed(sampling.seed, sample) if sample else sampling.seed,
        event.priority,
        root(event.cache_salt) if event.cache_salt else _NO_SALT,
        event.resumed,
        not plain and is_rare(sampling),
        tuple({*model.eos_token_ids, *sampling.stop_token_ids}) if sampling.min_tokens else (),
        event.suspicions,
    )


def make_ordinary(event: Submitted, max_model_len: int, stops: frozenset[int], number: int, now: float) -> Request:
    """As `make_request`, for a submission that `door.is_ordinary`. `stops`: the model's, unless it ignores them."""
    sampling, prompt = event.sampling, event.prompt
    length, limit, most = len(prompt), max_model_len, sampling.max_tokens
    if most is not None and length + most < limit:
        limit = length + most
    return Request(  # by position: keywords make it cost three times as much
        number,
        event.client,
        event.ticket,
        prompt,
        length,
        limit,
        sampling,
        stops,
        now,
        sampling.seed or 0,
        event.priority,
        root(event.cache_salt) if event.cache_salt else _NO_SALT,
    )


@lru_cache(maxsize=256)
def _stops(of_model: tuple[int, ...], own: tuple[int, ...]) -> frozenset[int]:
    """Most requests have the same."""
    return frozenset((*of_model, *own))


def invalid(event: Submitted, fault: Invalid) -> Reject:
    """The refusal of a submission that could never be taken."""
    return Reject(
        client=event.client,
        ticket=event.ticket,
        code="invalid",
        message=fault.message,
        field=fault.field,
        limit=fault.limit,
        value=fault.value,
    )


class Refusals:
    """Of submissions that are more than the service may hold: they may come again."""

    def __init__(self, policy: Policy, rate: EndingRate, counters: Counters) -> None:
        self._policy = policy
        self._rate = rate
        self._counters = counters

    def over_limits(self, event: Submitted, open_here: int, waiting: int, tokens: int, now: float) -> Reject | None:
        """The refusal if one of the limits would be passed; None if there is room. `open_here`: open requests of this
        client; `waiting` and `tokens`: requests that wait, of all clients, and their known tokens."""
        policy = self._policy
        tokens += event.n * (len(event.prompt) + len(event.generated))
        if waiting + event.n > policy.max_waiting_requests:
            name, most, would = "max_waiting_requests", policy.max_waiting_requests, waiting + event.n
            what = "requests would wait"
        elif tokens > policy.max_waiting_tokens:
            name, most, would, what = "max_waiting_tokens", policy.max_waiting_tokens, tokens, "tokens would wait"
        elif open_here + event.n > policy.max_requests_per_client:
            name, most, would = "max_requests_per_client", policy.max_requests_per_client, open_here + event.n
            what = "requests of this client would be open"
        else:
            return None
        return self.overloaded(event, f"{would} {what}, over the limit of {most}", name, most, would, now)

    def overloaded(self, event: Submitted, message: str, field: str, limit: int, value: int, now: float) -> Reject:
        """The refusal, which says when to come again; all samples are counted as refused."""
        self._counters.refused += event.n
        return Reject(
            client=event.client,
            ticket=event.ticket,
            code="overloaded",
            message=message,
            field=field,
            limit=str(limit),
            value=str(value),
            retry_after=self._rate.retry_after(now),
        )
