"""Sampling parameters as flags, made from the fields of SamplingParams, and what else a request may say."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from ..protocol.errors import ConfigurationError, InvalidRequest
from ..protocol.sampling import SamplingParams
from .options import Parameter, flag, plain

HELP = {
    "temperature": "0 always takes the most probable token; higher is more varied (default: the model's).",
    "top_k": "Choose among this many most probable tokens; 0 is all (default: the model's).",
    "top_p": "Choose among the most probable tokens that together reach this probability (default: the model's).",
    "min_p": "Leave out tokens less probable than this times the most probable one (default: the model's).",
    "repetition_penalty": "Over 1: tokens of prompt and answer so far become less likely (default: the model's).",
    "presence_penalty": "Over 0: tokens of the answer so far become less likely (-2 to 2).",
    "frequency_penalty": "Over 0: the more often a token came, the less likely it becomes (-2 to 2).",
    "min_tokens": "The answer does not end before so many tokens.",
    "seed": "The same seed gives the same answer.",
    "max_tokens": "Most tokens of an answer (default: what the context length leaves).",
    "ignore_eos": "Go on after the model's end-of-sequence token.",
}


def sampling_flags() -> list[Parameter]:
    """One flag for each parameter in HELP. What they may be is checked by the client, which raises InvalidRequest."""
    hints = typing.get_type_hints(SamplingParams, include_extras=True)
    return [flag(name, plain(hints[name])[0], "Sampling", text) for name, text in HELP.items()]


def request_flags() -> list[Parameter]:
    """What a request says beside how its tokens are chosen: keyword arguments of the client's, which checks them."""
    return [
        flag("priority", int, "Request", "Requests of a lower priority go first (default 0)."),
        flag("timeout", float, "Request", "Seconds after which a request ends with what it has (default: never)."),
        flag("cache_salt", str, "Request", "Share cached prefixes only with requests of the same salt."),
    ]


def require_possible(request: Mapping[str, Any]) -> None:
    """Finds what the client would refuse in every request, before anything is started for them. Raises
    ConfigurationError naming the flag."""
    from ..client.arguments import request_options, seconds
    from ..client.prompts import require_random

    try:
        options = request_options(request.get("n", 1), request.get("priority", 0), request.get("cache_salt", ""))
        if seconds("timeout", request.get("timeout")) == 0:
            raise InvalidRequest("timeout: 0 s leave no time for an answer", field="timeout", limit=0, value=0)
        if request.get("temperature") == 0:
            require_random(SamplingParams(temperature=0.0), options.n)
    except InvalidRequest as error:
        flag_name = "--" + error.field.replace("_", "-")
        raise ConfigurationError(f"{flag_name}{str(error).removeprefix(error.field)}") from error


def sample_flags() -> list[Parameter]:
    """For commands that can show several answers to one prompt."""
    return [flag("n", int, "Request", "How many answers to each prompt (default 1).")]
