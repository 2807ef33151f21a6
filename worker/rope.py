"""Rope types whose frequencies follow the longest sequence of a batch, which would let requests change each other.

Up to some length they do not. A model that has one is served up to that length, and its frequencies are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import nn
from transformers import PretrainedConfig

from .loading import max_positions

_CHANGING: Final = ("dynamic", "longrope")
"""The types that transformers' `dynamic_rope_update` treats apart."""


def fixed_positions(config: PretrainedConfig) -> tuple[int, str] | None:
    """The longest context in which the frequencies stay what they are, and the rope type which sets this limit; None
    where they never change."""
    trained = max_positions(config)
    limits = ((limit, kind) for kind, limit in _changing(config) if limit and limit != trained)
    return min(limits, default=None)


def fix(module: nn.Module) -> None:
    """Makes the frequencies of a model constant, as they are for contexts of at most `fixed_positions`."""
    one: Any  # a module's own attributes are not declared
    for one in module.modules():
        kind = getattr(one, "rope_type", None)
        if isinstance(kind, dict):
            one.rope_type = {name: "default" if its in _CHANGING else its for name, its in kind.items()}
        elif kind in _CHANGING:
            one.rope_type = "default"


def _changing(config: PretrainedConfig) -> Iterator[tuple[str, int | None]]:
    """Each rope type that may change, and the last context at which it has not yet."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope] if "rope_type" in rope else rope.values():
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind == "dynamic":
            yield kind, max_positions(config)
        elif kind == "longrope":
            yield kind, parameters.get("original_max_position_embeddings") or max_positions(config)
