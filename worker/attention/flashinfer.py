"""Paged attention on CUDA in 16 bits: chunks by FlashInfer's kernels, decoding rows by our own (kernels.py).

FlashInfer plans a step on the host and hands the plan to the kernels through buffers that belong to a wrapper, so there
is one set of wrappers per lane (a step in flight must not see the next one's plan), and within a lane one per group of
layers that attend alike. A plan serves all layers of its group. The float workspace only lives from kernel to kernel on
one stream, so all wrappers share one. Decoding rows need no such plan, and so can be captured in a graph.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache, LayerKV
from .base import AttentionBackend, AttentionStep
from .sharing import PIECE_COLUMNS, Cutting, EqualPieces
from .spans import EvenSpans, SpanKind

if TYPE_CHECKING:
    from .kernels import Scratch

HEAD_DIMS: Final = (64, 128, 256)
DTYPES: Final = (torch.bfloat16, torch.float16)
_KERNELS: Final = "fa2"
"""One family of kernels for prefill and decode: each variant is compiled once."""
_MIN_WORKSPACE: Final = 128 << 20
_QUERY_TILE: Final = 128
_CTAS_PER_SM: Final = 2


@dataclass(frozen=True, slots=True)
class DecodeWay:
    """How the decode kernel runs."""

    programs: int | None = None
    """None: as many as a multiprocessor runs at once, each with an even share of all contexts (spans.py). Else contexts
    are cut, where they are long enough, into pieces of one length, so many for each multiprocessor or more
    (sharing.py)."""
    warps: int = 4
    """Of a program."""
    stages: int = 2
    """Of a program's pipeline of loads. Fewer take less room, so that more programs run at once."""

    @property
    def even(self) -> bool:
        return self.programs is None


DECODE: Final = {2: DecodeWay(), 1: DecodeWay(programs=4, warps=2, stages=3)}
"""By the bytes of a cached number: what was found best (`python -m tandem.bench.attention`). Smaller numbers take a
program more arithmetic for each byte."""


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


@dataclass(frozen=True, slots=True)
class Cut:
    """How contexts are cut for a kind of layers, on the device; see kernels.attend."""

    pieces: Tensor
    """[PIECE_COLUMNS, P] int32"""
    spans: Tensor | None
    """[S + 1] int32; None: a program for each piece."""


class Cuts:
    """How a way of the decode kernel has contexts cut for layers of some kinds."""

    def __init__(self, programs: dict[Variant, int], multiprocessors: int, *, even: bool) -> None:
        """`programs`: of each multiprocessor, for each kind of layers."""
        # No more spans than run at once.
        self._kinds = {
            group: SpanKind(max(1, count * multiprocessors // group.kv_heads), group.window)
            for group, count in programs.items()
        }
        self.cutting: EqualPieces | EvenSpans = (
            EvenSpans(tuple(dict.fromkeys(self._kinds.values())))
            if even
            else EqualPieces(max(-(-count * multiprocessors // group.kv_heads) for group, count in programs.items()))
        )

    def of(self, written: Tensor, rows: int) -> dict[Variant, Cut]:
        """For each kind of layers its part of what `cutting` has written for so many rows: [N] int32, device."""
        if isinstance(self.cutting, EqualPieces):
            return dict.fromkeys(self._kinds, Cut(written.view(PIECE_COLUMNS, -1), None))
        places = {group: self.cutting.places(kind, rows) for group, kind in self._kinds.items()}
        return {
            group: Cut(written[pieces].view(PIECE_COLUMNS, -1), written[spans])
            for group, (pieces, spans) in places.items()
        }


class FlashInferAttention(AttentionBackend):
    """See the module. `problem` must have been None."""

    name: ClassVar[str] = "flashinfer"

    def __init__(
        self,
        cache: KVCache,
        *,
        dtype: torch.dtype,
        lanes: int,
        device: torch.device,
        way: DecodeWay | None = None,
    ) -> None:
        """`dtype`: the queries'. `way`: None takes that of DECODE."""
        import flashinfer

        self.cache = cache
        self.dtype = dtype
        self.device = device
        self.variants = [variant_of(layer) for layer in cache.spec]
        groups = list(dict.fromkeys(self.variants))
        workspace = torch.zeros(_workspace_bytes(groups, device), dtype=torch.uint8, device=device)
        self._lanes: list[dict[Variant, Any]] = [
            {
                group: flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=_KERNELS)
                for group in groups
            }
            for _ in range(lanes)
        ]
        self._way = way or DECODE[cache.keys[0].dtype.itemsize]
        self._cuts = Cuts(
            {group: self._programs(group) for group in groups},
            torch.cuda.get_device_properties(device).multi_processor_count,
            even=self._way.even,
        )
        self._scratches: list[Scratch] = []
        """The last is the largest; captured graphs may hold on to those before."""

    @property
    def cutting(self) -> Cutting:
        return self._cuts.cutting

    def _programs(self, group: Variant) -> int:
        """Of each multiprocessor, for which the contexts of such layers are cut."""
        if self._way.programs is not None:
            return self._way.programs
        from .kernels import programs_at_once

        layer = self.variants.index(group)
        return programs_at_once(
            torch.zeros(1, group.query_heads, group.head_dim, dtype=self.dtype, device=self.device),
            self.cache.keys[layer],
            self.cache.values[layer],
            scale=group.scale,
            window=group.window,
            softcap=group.softcap,
            warps=self._way.warps,
            stages=self._way.stages,
        )

    def begin(self, batch: Batch) -> FlashInferStep:
        decoding, rows = batch.decode_rows, batch.num_rows
        planned: dict[Variant, Any] = {}
        if decoding < rows:
            kv_lens = batch.kv_lens_host[decoding:]
            pages = -(-kv_lens // batch.block_size)
            indices = page_indices(batch, decoding, int(pages.sum()))
            last_page_lens = torch.from_numpy(((kv_lens - 1) % batch.block_size + 1).astype(np.int32))
            query_starts = torch.from_numpy(batch.query_starts[decoding:] - batch.query_starts[decoding])
            for group, prefill in self._lanes[batch.lane].items():
                prefill.plan(
                    query_starts,
                    _starts(pages),
                    indices,
                    last_page_lens,
                    group.query_heads,
                    group.kv_heads,
                    group.head_dim,
                    batch.block_size,
                    causal=True,
                    sm_scale=group.scale,
                    window_left=_window_left(group),
                    logits_soft_cap=group.softcap,
                    q_data_type=self.dtype,
                    kv_data_type=self.cache.keys[0].dtype,
                )
                planned[group] = prefill
        scratch: Scratch | None = None
        cuts: dict[Variant, Cut] = {}
        if batch.pieces is not None:
            cuts = self._cuts.of(batch.pieces, decoding)
            scratch = self._scratch(max(cut.pieces.shape[1] for cut in cuts.values()), decoding)
        return FlashInferStep(self.cache, batch, self.variants, planned, self._way, cuts, scratch)

    def _scratch(self, pieces: int, rows: int) -> Scratch:
        from .kernels import Scratch

        if not self._scratches or not self._scratches[-1].suffices(pieces, rows):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the scratch memory of decoding rows would grow while a graph is captured")
            widest = max(self.variants, key=lambda group: group.query_heads * group.head_dim)
            heads = max(group.kv_heads for group in self.variants)
            self._scratches.append(Scratch(pieces, rows, heads, widest.query_heads * widest.head_dim, self.device))
        return self._scratches[-1]


class FlashInferStep(AttentionStep):
    def __init__(
        self,
        cache: KVCache,
        batch: Batch,
        variants: list[Variant],
        planned: dict[Variant, Any],
        way: DecodeWay,
        cuts: dict[Variant, Cut],
        scratch: Scratch | None,
    ) -> None:
        """`planned`: for each kind of layer the wrapper that attends for the chunks; none if there are no chunks.
        `cuts`: for each kind of layer, with `scratch`; none: contexts are not cut."""
        self.cache = cache
        self.kv_slots = batch.kv_slots
        self._batch = batch
        self._variants = variants
        self._planned = planned
        self._way = way
        self._cuts = cuts
        self._scratch = scratch

    def attend_cached(self, layer: int, query: Tensor, out: Tensor | None = None) -> Tensor:
        query = query.contiguous()
        if out is None:
            out = torch.empty_like(query)
        batch, group = self._batch, self._variants[layer]
        decoding, tokens = batch.decode_rows, query.shape[0]
        if decoding:
            from . import kernels

            way, cut = self._way, self._cuts.get(group)
            kernels.attend(
                query[:decoding],
                self.cache.keys[layer],
                self.cache.values[layer],
                batch.block_tables,
                batch.lines,
                batch.kv_lens,
                None if cut is None else cut.pieces,
                out,
                self._scratch,
                scale=group.scale,
                window=group.window,
                softcap=group.softcap,
                warps=way.warps,
                stages=way.stages,
                spans=None if cut is None else cut.spans,
            )
        if decoding < tokens:
            cached = self.cache.keys[layer], self.cache.values[layer]
            self._planned[group].run(query[decoding:], cached, out=out[decoding:])
        return out


def page_indices(batch: Batch, first: int, total: int) -> Tensor:
    """The block ids of the rows from `first` on, one row's after the other: [total] int32, computed on the device."""
    lens, tables = batch.kv_lens[first:], batch.block_tables[first:]
    pages = torch.div(lens + (batch.block_size - 1), batch.block_size, rounding_mode="floor")
    rows = torch.repeat_interleave(pages, output_size=total)
    ends = torch.cumsum(pages, dim=0)
    columns = torch.arange(total, device=rows.device) - (ends - pages)[rows]
    return tables[rows, columns]


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
