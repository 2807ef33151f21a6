"""Paged attention by FlashInfer's kernels: CUDA, 16 bits.

FlashInfer plans a step on the host and hands the plan to the kernels through buffers that belong to a wrapper, so there
is one set of wrappers per lane (a step in flight must not see the next one's plan), and within a lane one per group of
layers that attend alike. A plan serves all layers of its group. The float workspace only lives from kernel to kernel on
one stream, so all wrappers share one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

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
_BUSY: Final = 0.9
_PLAN_BYTES: Final = 8 << 20
"""FlashInfer's own size of the buffers that hold a plan."""


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


def _window_left(group: Variant) -> int:
    """FlashInfer's window does not count the token itself; -1: none."""
    return -1 if group.window is None else group.window - 1


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
        self.workspace = workspace
        self.decode_buffers = [
            {group: torch.empty(_PLAN_BYTES, dtype=torch.uint8, pin_memory=True) for group in groups}
            for _ in range(lanes)
        ]
        self.decode_plans = {group: torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=device) for group in groups}
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
        """Plan the step for each group of layers, on the host. Decoding rows take the decode kernels, chunks those for
        prefill: in one launch a row with one query would cost as much arithmetic as one with many."""
        pages = -(-batch.kv_lens_host // batch.block_size)
        indices = page_indices(batch, int(pages.sum()))
        last_page_lens = torch.from_numpy(((batch.kv_lens_host - 1) % batch.block_size + 1).astype(np.int32))
        decoding, rows = batch.decode_rows, batch.num_rows
        decode_pages = int(pages[:decoding].sum())
        planned: dict[Variant, list[Part]] = {}
        for group, (prefill, decode) in self._lanes[batch.lane].items():
            shape = (group.query_heads, group.kv_heads, group.head_dim, batch.block_size)
            parts = planned[group] = []
            if decoding:
                starts = _starts(pages[:decoding])
                decode.plan(starts, indices[:decode_pages], last_page_lens[:decoding], *shape, **self.options(group))
                parts.append((decode, 0, decoding))
            if decoding < rows:
                query_starts = torch.from_numpy(batch.query_starts[decoding:] - batch.query_starts[decoding])
                prefill.plan(
                    query_starts,
                    _starts(pages[decoding:]),
                    indices[decode_pages:],
                    last_page_lens[decoding:],
                    *shape,
                    causal=True,
                    **self.options(group),
                )
                parts.append((prefill, decoding, batch.num_tokens))
        return FlashInferStep(self.cache, batch.kv_slots, [planned[variant] for variant in self.variants])

    def options(self, group: Variant) -> dict[str, Any]:
        """What FlashInfer's plans of a group of layers are told beside the batch."""
        return {
            "sm_scale": group.scale,
            "window_left": _window_left(group),
            "logits_soft_cap": group.softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    def open_decode(
        self, rows: int, page_starts: Tensor, last_page_lens: Tensor, page_indices: Tensor
    ) -> FlashInferDecode:
        return FlashInferDecode(self, rows, page_starts, last_page_lens, page_indices)


class FlashInferDecode:
    """Captured decode steps of one size.

    A captured kernel reads its plan from one place, so the device's copy of a plan exists once per group of layers,
    shared by all sizes: FlashInfer copies it there on the compute stream, behind the step that last used it. The host's
    copy, which that copy reads later, exists once per lane.
    """

    reads_block_tables = False

    def __init__(
        self,
        backend: FlashInferAttention,
        rows: int,
        page_starts: Tensor,
        last_page_lens: Tensor,
        page_indices: Tensor,
    ) -> None:
        import flashinfer

        self._backend = backend
        self._rows = rows
        self._query_starts = torch.arange(rows + 1, dtype=torch.int32)
        self._wrappers: dict[Variant, Any] = {}
        one_page_each = torch.arange(rows + 1, dtype=torch.int32)
        one_token_each = torch.ones(rows, dtype=torch.int32)
        for group in dict.fromkeys(backend.variants):
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                backend.workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                backend=_KERNELS,
                paged_kv_indptr_buffer=page_starts,
                paged_kv_indices_buffer=page_indices,
                paged_kv_last_page_len_buffer=last_page_lens,
            )
            wrapper._int_workspace_buffer = backend.decode_plans[group]
            wrapper._pin_memory_int_workspace_buffer = backend.decode_buffers[0][group]
            shape = (group.query_heads, group.kv_heads, group.head_dim, backend.cache.block_size)
            wrapper.plan(one_page_each, page_indices[:rows], one_token_each, *shape, **backend.options(group))
            self._wrappers[group] = wrapper
            wrapper._plan_info = self._plan(group, 0, one_page_each, one_token_each)

    def open(self, batch: Batch) -> FlashInferStep:
        parts: list[list[Part]] = [[(self._wrappers[variant], 0, self._rows)] for variant in self._backend.variants]
        return FlashInferStep(self._backend.cache, batch.kv_slots, parts)

    def plan(self, lane: int, page_starts: NDArray[np.int32], kv_lens: NDArray[np.int32]) -> None:
        starts, lens = torch.from_numpy(page_starts), torch.from_numpy(kv_lens)
        for group in self._wrappers:
            self._plan(group, lane, starts, lens)

    def _plan(self, group: Variant, lane: int, page_starts: Tensor, kv_lens: Tensor) -> Any:
        """What a wrapper's own plan() does after it has copied the batch's indices, which are in place already."""
        backend, rows = self._backend, self._rows
        split = self._splits(group)
        return self._wrappers[group]._cached_module.plan(
            backend.workspace,
            backend.decode_plans[group],
            backend.decode_buffers[lane][group],
            self._query_starts,
            page_starts,
            kv_lens,
            rows,
            rows,
            group.query_heads,
            group.kv_heads,
            backend.cache.block_size,
            split,  # the plan's shape must not follow the lengths; without splitting it does not
            group.head_dim,
            group.head_dim,
            False,  # causal: a row's one query sees all of its keys
            _window_left(group),
            -1,  # no fixed split of the context
            not split,
            0,  # no other kernel shares the multiprocessors
        )

    def _splits(self, group: Variant) -> bool:
        """Contexts are split among multiprocessors, at the price of a kernel that merges the parts, unless there are
        enough rows to keep all busy."""
        most = _CTAS_PER_SM * torch.cuda.get_device_properties(self._backend.device).multi_processor_count
        return self._rows * group.kv_heads < _BUSY * most


Part: TypeAlias = tuple[Any, int, int]
"""A planned wrapper, and the tokens that it attends for: the first and the end."""


class FlashInferStep:
    def __init__(self, cache: KVCache, kv_slots: Tensor, parts: list[list[Part]]) -> None:
        """`parts`: for each layer, its wrappers, which share the tokens out."""
        self.cache = cache
        self.kv_slots = kv_slots
        self._parts = parts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.cache.append(layer, self.kv_slots, key, value)
        return self.attend_cached(layer, query)

    def attend_cached(self, layer: int, query: Tensor) -> Tensor:
        cached = self.cache.keys[layer], self.cache.values[layer]
        query = query.contiguous()
        out = torch.empty_like(query)
        for wrapper, first, end in self._parts[layer]:
            wrapper.run(query[first:end], cached, out=out[first:end])
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
