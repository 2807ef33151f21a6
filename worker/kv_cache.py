"""The paged KV cache: per attention layer, blocks of `block_size` tokens' keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

FP8: Final = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One attention layer: what it caches and how it attends."""

    layer_idx: int
    """The model's own number of the layer (`module.layer_idx`)."""
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    """A token attends to the latest `window` positions, itself included; None: to all."""
    scale: float
    """Factor on query · key."""
    softcap: float | None
    """Scores become `softcap * tanh(score / softcap)`; None: they stay."""


def kv_bytes_per_block(spec: tuple[LayerKV, ...], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    per_token = sum(layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in spec)
    return per_token * block_size * dtype.itemsize


class KVCache:
    """Keys and values of all layers. Block id `num_blocks` is the scratch block: padding tokens write there and read
    from there, and nothing else does."""

    def __init__(
        self,
        spec: tuple[LayerKV, ...],
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache needs num_blocks >= 1 and block_size >= 1, got {num_blocks} and {block_size}")
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scratch_block = num_blocks
        # Zeros, not empty: padding reads the scratch block, and a NaN there would stick.
        self.keys = [
            torch.zeros(num_blocks + 1, block_size, layer.kv_heads, layer.head_dim, dtype=dtype, device=device)
            for layer in spec
        ]
        self.values = [
            torch.zeros(num_blocks + 1, block_size, layer.kv_heads, layer.value_dim, dtype=dtype, device=device)
            for layer in spec
        ]
        self._flat = [
            (keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def flat(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views [(num_blocks + 1) * block_size, kv_heads, head_dim | value_dim] of a layer's keys and values."""
        return self._flat[layer]

    def append(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write key [T, kv_heads, head_dim] and value [T, kv_heads, value_dim] at `slots` [T] int64."""
        for cached, new in zip(self._flat[layer], (key, value), strict=True):
            if cached.dtype == FP8:
                # Beyond the largest number there is only NaN. Indexing knows no float8, but bytes are bytes.
                largest = torch.finfo(FP8).max
                small = new.float().clamp(-largest, largest).to(FP8)
                cached.view(torch.uint8).index_copy_(0, slots, small.view(torch.uint8))
            else:
                cached.index_copy_(0, slots, new.to(cached.dtype))


def select_slots(flat: Tensor, slots: Tensor) -> Tensor:
    """Lines `slots` of a flat cache, or of a view of it, as float32."""
    if flat.dtype == FP8:
        return torch.index_select(flat.view(torch.uint8), 0, slots).view(FP8).to(torch.float32)
    return torch.index_select(flat, 0, slots).to(torch.float32)
