"""Attention as operators that a compiler leaves alone: a compiled model calls them, and they find the step by number.

An operator's arguments are tensors and integers, so the step that a call belongs to (its block tables, plans, caches)
is kept in a table here under the compiled model's number. Operators write to the KV cache, which the compiler does not
know; it cannot go wrong, because what an operator returns depends on what it wrote, and nothing else reads the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from ..operators import LIBRARY
from .base import AttentionStep

LIBRARY.define("attend(Tensor query, Tensor key, Tensor value, int layer, int caller) -> Tensor")
LIBRARY.define(
    "rotate_attend(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, int layer, int caller) -> Tensor"
)

_steps: Final[dict[int, AttentionStep | Recorder]] = {}
_numbers: Final = itertools.count()


class Recorder(Protocol):
    """What stands for a step while a model's calls are only recorded."""

    def record(self, layer: int, *given: Tensor) -> Tensor:
        """`given` is query, key, value, and cos, sin if the call rotates. Returns room for the call's result."""
        ...


class OperatorRouter:
    """`STEP_KWARG` while a model is traced: its layers call the operators under `caller`, a number of its own."""

    def __init__(self, layer_of: Mapping[int, int]) -> None:
        self.caller = next(_numbers)
        self._layer_of = layer_of

    def attend_layer(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        layer_idx: Any = module.layer_idx
        out: Tensor = torch.ops.tandem.attend(query, key, value, self._layer_of[layer_idx], self.caller)
        return out

    def enter(self, step: AttentionStep | Recorder) -> None:
        """The operators' calls belong to `step` from now on."""
        _steps[self.caller] = step


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, caller: int) -> Tensor:
    step = _steps[caller]
    if hasattr(step, "record"):
        return step.record(layer, query, key, value)
    return attend_by(step, layer, query, key, value)


def _rotate_attend(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, layer: int, caller: int
) -> Tensor:
    step = _steps[caller]
    if hasattr(step, "record"):
        return step.record(layer, query, key, value, cos, sin)
    return rotate_attend_by(step, layer, query, key, value, cos, sin)


def attend_by(
    step: AttentionStep, layer: int, query: Tensor, key: Tensor, value: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """`AttentionStep.attend`, into `out` if it is given."""
    if out is None:
        return step.attend(layer, query, key, value)
    step.cache.append(layer, step.kv_slots, key, value)
    return step.attend_cached(layer, query, out)


def rotate_attend_by(
    step: AttentionStep,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of query and key rotated by cos and sin [T, D], into `out` if it is given."""
    if not query.is_cuda:
        return attend_by(step, layer, rotate(query, cos, sin), rotate(key, cos, sin), value, out=out)
    from .. import kernels

    keys, values = step.cache.flat(layer)
    rotated = kernels.rotate_append(query, key, value, cos, sin, step.kv_slots, keys, values)
    return step.attend_cached(layer, rotated, out)


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the halves layout: vectors [T, heads, D], cos and sin [T, D]."""
    low, high = vectors.chunk(2, dim=-1)
    return vectors * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]


def _shape_of_attend(query: Tensor, key: Tensor, value: Tensor, layer: int, caller: int) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[2]))


def _shape_of_rotate_attend(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, layer: int, caller: int
) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[2]))


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("attend", _attend, _device)
    LIBRARY.impl("rotate_attend", _rotate_attend, _device)
torch.library.register_fake("tandem::attend", _shape_of_attend, lib=LIBRARY)
torch.library.register_fake("tandem::rotate_attend", _shape_of_rotate_attend, lib=LIBRARY)
