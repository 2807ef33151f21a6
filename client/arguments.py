"""What a caller passes besides prompts and sampling parameters, checked where it is passed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import cast

from ..protocol.errors import InvalidRequest

MAX_NAME_CHARS = 256


def seconds(name: str, value: object) -> float | None:
    """`value` as seconds; None and infinity, which event loops do not all know, are no limit. Raises InvalidRequest
    unless it is None or a number of at least 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value) or value < 0:
        raise InvalidRequest(
            f"{name}: expected seconds, at least 0, or None for no limit; got {value!r:.100}",
            field=name,
            limit=0,
            value=value,
        )
    return None if value == math.inf else float(value)


def require_whole(name: str, value: object, least: int) -> None:
    """Raises InvalidRequest unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequest(
            f"{name}: {value!r:.100}, must be a whole number of at least {least}", field=name, limit=least, value=value
        )


def require_name(name: object) -> None:
    """Raises InvalidRequest unless it is text that a scheduler takes as a client's name."""
    if not isinstance(name, str):
        raise InvalidRequest(f"name: expected text, got {type(name).__name__}", field="name", value=name)
    if len(name) > MAX_NAME_CHARS:
        raise InvalidRequest(
            f"name: {len(name)} characters, over the limit of {MAX_NAME_CHARS}",
            field="name",
            limit=MAX_NAME_CHARS,
            value=len(name),
        )


def require_params(params: object) -> None:
    """Raises InvalidRequest unless it is a SamplingParams or None."""
    from ..protocol.sampling import SamplingParams

    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidRequest(
            f"sampling_params: expected a SamplingParams, got {type(params).__name__}", field="sampling_params"
        )


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How a request is treated, beside how its tokens are chosen. Checked by `request_options`."""

    n: int = 1
    priority: int = 0
    cache_salt: str = ""


def request_options(n: object, priority: object, cache_salt: object) -> RequestOptions:
    """Raises InvalidRequest naming field, limit and value. How many samples the service allows, it says itself."""
    from ..protocol.messages import MAX_PRIORITY, MAX_SALT_CHARS, MAX_SAMPLES

    require_whole("n", n, 1)
    _require_most("n", cast("int", n), MAX_SAMPLES)
    require_whole("priority", priority, -MAX_PRIORITY)
    _require_most("priority", cast("int", priority), MAX_PRIORITY)
    if not isinstance(cache_salt, str):
        raise InvalidRequest(
            f"cache_salt: expected text, got {type(cache_salt).__name__}", field="cache_salt", value=cache_salt
        )
    if len(cache_salt) > MAX_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt: {len(cache_salt)} characters, over the limit of {MAX_SALT_CHARS}",
            field="cache_salt",
            limit=MAX_SALT_CHARS,
            value=len(cache_salt),
        )
    try:
        cache_salt.encode()
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(cache_salt[error.start]):04X}"
        raise InvalidRequest(
            f"cache_salt: no valid Unicode text: it holds the lone surrogate {surrogate}",
            field="cache_salt",
            value=surrogate,
        ) from error
    return RequestOptions(cast("int", n), cast("int", priority), cache_salt)


def require_samples(n: int, most: int) -> None:
    """Raises InvalidRequest for more samples than the service allows, before any is made."""
    if n > most:
        raise InvalidRequest(f"n is {n}, over the limit of {most} samples", field="n", limit=most, value=n)


def _require_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidRequest(f"{name}: {value}, must be at most {most}", field=name, limit=most, value=value)
