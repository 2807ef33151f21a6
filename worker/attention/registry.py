"""The bridge from transformers' models to our backends, through transformers' attention registry.

A model whose config names `ATTENTION_NAME` calls `paged_attention` in each attention layer and hands down the keyword
argument `STEP_KWARG` that the step passed to the model's trunk. The function keeps no state: everything is in that
argument, so any number of engines can live in one process. Masks are ours too: transformers builds none for a name that
its mask registry does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol, TypeAlias

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ..kv_cache import LayerKV
from .base import AttentionStep

ATTENTION_NAME: Final = "tandem_paged"
MASKED_NAME: Final = "tandem_masked"
"""The name under which models show their masks (see `masked_attention`)."""
STEP_KWARG: Final = "tandem_step"

_HARMLESS_KWARGS: Final = frozenset(
    {"position_ids", "use_cache", "cache_position", "position_embeddings", "output_attentions", "dropout", "is_causal"}
)
"""Keyword arguments that change nothing about causal attention as we compute it (dropout is off in evaluation)."""


class UnsupportedAttentionError(RuntimeError):
    """An attention layer asks for something that the worker does not compute; the message names it."""


class LayerSink(Protocol):
    """What travels as `STEP_KWARG`."""

    def attend_layer(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """query [T, query_heads, head_dim], key [T, kv_heads, head_dim], value [T, kv_heads, value_dim];
        returns [T, query_heads, value_dim]."""
        ...


ShowMask: TypeAlias = Callable[[nn.Module, Tensor | None], None]
"""What travels as `STEP_KWARG` where masks are asked for."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. query, key, value [1, heads, T, dim]; returns [1, T, heads, value_dim] and None."""
    step: LayerSink | None = options.pop(STEP_KWARG, None)
    if step is None:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} does not pass keyword arguments down to its attention function, so the paged KV "
            "cache cannot reach it"
        )
    if attention_mask is not None:
        raise UnsupportedAttentionError(f"{type(module).__name__} builds an attention mask of its own")
    out = step.attend_layer(
        module,
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        options,
    )
    return out.unsqueeze(0), None


def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `paged_attention`, but masks are built as for transformers' eager attention, and shown to `STEP_KWARG`, a
    function of module and mask. Returns zeros: what is asked for are the masks."""
    show: ShowMask = options[STEP_KWARG]
    show(module, attention_mask)
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def register() -> None:
    """Make our names known to transformers. Repeating it changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    AttentionInterface.register(MASKED_NAME, masked_attention)
    AttentionMaskInterface.register(MASKED_NAME, eager_mask)


def layer_idx_of(module: nn.Module) -> int:
    layer_idx = getattr(module, "layer_idx", None)
    if not isinstance(layer_idx, int):
        raise UnsupportedAttentionError(
            f"{type(module).__name__} has no layer_idx, so its KV cache cannot be told apart"
        )
    return layer_idx


def describe_layer(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> LayerKV:
    """The layer's attention, from what its module passes. Raises UnsupportedAttentionError naming what we lack."""
    name = f"{type(module).__name__} (layer {layer_idx_of(module)})"
    known = _HARMLESS_KWARGS | {"scaling", "sliding_window", "softcap"}
    for option, given in options.items():
        if option not in known and given is not None and given is not False:
            meaning = " (attention sinks)" if option in ("s_aux", "sinks") else ""
            raise UnsupportedAttentionError(f"{name} asks for {option!r}{meaning}, which the worker does not support")
    is_causal = options.get("is_causal")
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise UnsupportedAttentionError(f"{name} is not causal")
    if query.shape[0] != key.shape[0] or key.shape[:2] != value.shape[:2]:
        raise UnsupportedAttentionError(f"{name} attends to other tokens than the step's (cross-attention)")
    query_heads, kv_heads = query.shape[1], key.shape[1]
    if query_heads % kv_heads or query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError(
            f"{name}: query heads {query_heads} x {query.shape[2]} do not fit key heads {kv_heads} x {key.shape[2]}"
        )
    scaling, window = options.get("scaling"), options.get("sliding_window")
    if window is not None and window < 1:
        raise UnsupportedAttentionError(f"{name} has a window of {window} tokens (sliding_window); it needs at least 1")
    return LayerKV(
        layer_idx=layer_idx_of(module),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=key.shape[2],
        value_dim=value.shape[2],
        window=window,
        scale=float(scaling) if scaling is not None else key.shape[2] ** -0.5,
        softcap=options.get("softcap"),
    )


class LayerRouter:
    """`STEP_KWARG` of a real step: sends each module's call to its layer of the step."""

    __slots__ = ("_around", "_layer_of", "_step")

    def __init__(
        self,
        step: AttentionStep,
        layer_of: Mapping[int, int],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`around` gives a context in which each layer's attention runs."""
        self._step = step
        self._layer_of = layer_of
        self._around = around

    def attend_layer(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        layer_idx: Any = module.layer_idx
        with self._around():
            return self._step.attend(self._layer_of[layer_idx], query, key, value)


class LayerInspector:
    """`STEP_KWARG` of a dry run over one short sequence: describes each layer that calls, and attends densely."""

    def __init__(self, dense: Callable[[LayerKV, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.layers: list[LayerKV] = []
        self._dense = dense

    def attend_layer(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        layer = describe_layer(module, query, key, value, options)
        if any(seen.layer_idx == layer.layer_idx for seen in self.layers):
            raise UnsupportedAttentionError(
                f"{type(module).__name__}: layer {layer.layer_idx} attends twice in one forward pass"
            )
        self.layers.append(layer)
        return self._dense(layer, query, key, value)
