"""Paged attention by FlashInfer's kernels: CUDA, 16 bits.

FlashInfer plans a step on the host and hands the plan to the kernels through buffers that belong to a wrapper, so there
is one set of wrappers per lane (a step in flight must not see the next one's plan), and within a lane one per group of
layers that attend alike. A plan serves all layers of its group. The float workspace only lives from kernel to kernel on
one stream, so all wrappers share one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache, LayerKV
from .base import AttentionBackend

HEAD_DIMS: Final = (64, 128, 256)
DTYPES: Final = (torch.bfloat16, torch.float16)
_KERNELS: Final = "fa2"
"""One family of kernels for prefill and decode: each variant is compiled once."""
_MIN_WORKSPACE: Final = 128 << 20
_QUERY_TILE: Final = 128
_CTAS_PER_SM: Final = 2


def problem(spec: tuple[LayerKV, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlashInfer cannot serve this model here; None if it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in DTYPES:
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed (pip install 'tandem-serve[cuda]')"
    for layer in spec:
        if layer.head_dim not in HEAD_DIMS or layer.value_dim != layer.head_dim:
            dims = {layer.head_dim, layer.value_dim}
            return f"it has no kernel for head dimension {' and '.join(map(str, sorted(dims)))} (has {HEAD_DIMS})"
    return None


@dataclass(frozen=True, slots=True)
class Variant:
    """What layers of one group have in common."""

    query_heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    scale: float
    softcap: float | None


def variant_of(layer: LayerKV) -> Variant:
    return Variant(
        layer.query_heads, layer.kv_heads, layer.head_dim, layer.window or None, layer.scale, layer.softcap or None
    )


class FlashInferAttention(AttentionBackend):
    """See the module. `problem` must have been None."""

    name: ClassVar[str] = "flashinfer"

    def __init__(self, cache: KVCache, *, lanes: int, device: torch.device) -> None:
        import flashinfer

        self.cache = cache
        self.dtype = cache.keys[0].dtype
        self.device = device
        self.variants = [variant_of(layer) for layer in cache.spec]
        groups = list(dict.fromkeys(self.variants))
        workspace = torch.zeros(_workspace_bytes(groups, device), dtype=torch.uint8, device=device)
        self._lanes: list[dict[Variant, tuple[Any, Any]]] = [
            {
                group: (
                    flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=_KERNELS),
                    flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                        workspace, "NHD", use_tensor_cores=True, backend=_KERNELS
                    ),
                )
                for group in groups
            }
            for _ in range(lanes)
        ]

    def begin(self, batch: Batch) -> FlashInferStep:
        """Plan the step for each group of layers, on the host. Decode-only steps take the decode kernels, all others
        the prefill kernels for all rows."""
        pages = -(-batch.kv_lens_host // batch.block_size)
        indices = page_indices(batch, int(pages.sum()))
        kv_starts = _starts(pages)
        last_page_lens = torch.from_numpy(((batch.kv_lens_host - 1) % batch.block_size + 1).astype(np.int32))
        planned: dict[Variant, Any] = {}
        for group, (prefill, decode) in self._lanes[batch.lane].items():
            shape = (group.query_heads, group.kv_heads, group.head_dim, batch.block_size)
            options: dict[str, Any] = {
                "sm_scale": group.scale,
                # FlashInfer's window does not count the token itself.
                "window_left": -1 if group.window is None else group.window - 1,
                "logits_soft_cap": group.softcap,
                "q_data_type": self.dtype,
                "kv_data_type": self.dtype,
            }
            if batch.decode_rows == batch.num_rows:
                decode.plan(kv_starts, indices, last_page_lens, *shape, **options)
                planned[group] = decode
            else:
                query_starts = torch.from_numpy(batch.query_starts)
                prefill.plan(query_starts, kv_starts, indices, last_page_lens, *shape, causal=True, **options)
                planned[group] = prefill
        return FlashInferStep(self.cache, batch.kv_slots, [planned[variant] for variant in self.variants])


class FlashInferStep:
    def __init__(self, cache: KVCache, kv_slots: Tensor, wrappers: list[Any]) -> None:
        self._cache = cache
        self._kv_slots = kv_slots
        self._wrappers = wrappers

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache = self._cache
        cache.append(layer, self._kv_slots, key, value)
        out: Tensor = self._wrappers[layer].run(query.contiguous(), (cache.keys[layer], cache.values[layer]))
        return out


def page_indices(batch: Batch, total: int) -> Tensor:
    """The block ids of all rows, one after the other: [total] int32 on the device, computed there."""
    pages = torch.div(batch.kv_lens + (batch.block_size - 1), batch.block_size, rounding_mode="floor")
    rows = torch.repeat_interleave(pages, output_size=total)
    ends = torch.cumsum(pages, dim=0)
    columns = torch.arange(total, device=rows.device) - (ends - pages)[rows]
    return batch.block_tables[rows, columns]


def _starts(counts: NDArray[np.int32]) -> Tensor:
    """[R + 1] int32 host: where each row begins."""
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return torch.from_numpy(starts)


def _workspace_bytes(groups: list[Variant], device: torch.device) -> int:
    """Room for the partial outputs (float32) when FlashInfer splits the context of a step among all multiprocessors:
    at most _CTAS_PER_SM blocks on each, one query tile of one group of heads per block, besides their sums."""
    blocks = _CTAS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    largest = max(
        (blocks // group.kv_heads + 1) * _QUERY_TILE * group.query_heads * (group.head_dim + 1) * 4 for group in groups
    )
    return max(_MIN_WORKSPACE, largest + (32 << 20))
