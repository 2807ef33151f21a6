"""Sampling parameters as flags, made from the fields of SamplingParams, and what else a request may say."""

from __future__ import annotations

import typing

from ..protocol.sampling import SamplingParams
from .options import Parameter, flag, plain

HELP = {
    "temperature": "0 always takes the most probable token; higher is more varied (default: the model's).",
    "top_k": "Choose among this many most probable tokens; 0 is all (default: the model's).",
    "top_p": "Choose among the most probable tokens that together reach this probability (default: the model's).",
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


def sample_flags() -> list[Parameter]:
    """For commands that can show several answers to one prompt."""
    return [flag("n", int, "Request", "How many answers to each prompt (default 1).")]
