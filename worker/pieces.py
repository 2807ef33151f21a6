"""Steps with chunks as CUDA graphs of what lies between their attention calls.

Attention over chunks is planned by the host and launched for exactly the rows there are; everything between two
attention calls goes by the number of tokens alone. So for each of a few numbers of tokens the compiled trunk is run
once with a recorder in attention's place, which ends a graph where a layer attends and begins the next one behind it.
A step takes the next larger number of tokens; those that only fill it up are computed and never read.

A graph's tensors live in the graphs' memory pool, where the graphs that follow may write once they are read, in the
order of the stream. So nothing here owns them: they are remembered by address (`_Alias`).
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from .attention.base import AttentionStep
from .attention.ops import Recorder, attend_by, rotate_attend_by

LARGEST_PIECES: Final = 1024
"""Tokens beyond which a step takes the device longer than the host needs to launch it kernel by kernel."""
LARGEST_FULL: Final = 8192
"""Tokens of the largest step that is captured, if it is a full one."""
_PADDING: Final = 1 / 16
"""Of a full step's tokens, at most."""


def piece_sizes(most: int) -> list[int]:
    """Numbers of tokens to capture when a step may have `most`: a few small ones, and a full step, since under load,
    while prompts wait, all steps with chunks are full."""
    sizes = [size for size in (32, 64, 128, 256, 384, 512, 768, LARGEST_PIECES) if size <= most]
    return [*sizes, most] if LARGEST_PIECES < most <= LARGEST_FULL else sizes


def piece_size(tokens: int, sizes: Sequence[int]) -> int | None:
    """Which of the ascending `sizes` a step of so many tokens takes; None if it is cheaper to launch it kernel by
    kernel."""
    at = bisect_left(sizes, tokens)
    if at == len(sizes) or (sizes[at] > LARGEST_PIECES and sizes[at] - tokens > sizes[at] * _PADDING):
        return None
    return sizes[at]


@dataclass(frozen=True, slots=True)
class _Attention:
    """One layer's call: what it is given (with cosines and sines if it rotates), and where its result goes."""

    layer: int
    given: tuple[Tensor, ...]
    out: Tensor

    def run(self, step: AttentionStep, count: int) -> None:
        attend = rotate_attend_by if len(self.given) > 3 else attend_by
        attend(step, self.layer, *(tensor[:count] for tensor in self.given), out=self.out[:count])


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The trunk for one number of tokens: a graph, an attention, a graph, …, an attention, and a graph if anything
    follows."""

    graphs: list[torch.cuda.CUDAGraph]
    attentions: list[_Attention]
    results: tuple[Tensor, ...]


class TrunkPieces:
    """The pieces of one compiled trunk, which must stay where it is."""

    def __init__(
        self,
        trunk: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        enter: Callable[[AttentionStep | Recorder], None],
        sizes: Sequence[int],
        pool: Any,
        device: torch.device,
        progress: Callable[[str, float], None],
    ) -> None:
        """Captures now. `trunk` maps token ids and positions [T] int64 to tensors [T, …]; `enter` says which step its
        attention calls belong to. Nothing else may run on the device meanwhile."""
        self._sizes = sorted(sizes)
        self._token_ids = torch.zeros(self._sizes[-1], dtype=torch.int64, device=device)
        self._positions = torch.zeros(self._sizes[-1], dtype=torch.int64, device=device)
        self._pieces: dict[int, _Pieces] = {}
        stream = torch.cuda.Stream(device)
        for done, size in enumerate(reversed(self._sizes)):  # the largest first: the others fit into its memory
            progress("capturing CUDA graphs of mixed steps", done / len(self._sizes))
            inputs = self._token_ids[:size], self._positions[:size]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream), torch.no_grad():
                enter(_Rehearsal())  # compiles and allocates what a capture must not
                trunk(*inputs)
                torch.cuda.synchronize(device)
                recorder = _Recorder(pool)
                enter(recorder)
                recorder.begin()
                self._pieces[size] = recorder.end(trunk(*inputs))
            torch.cuda.synchronize(device)
        progress("capturing CUDA graphs of mixed steps", 1.0)

    def takes(self, tokens: int) -> bool:
        return piece_size(tokens, self._sizes) is not None

    def run(self, step: AttentionStep, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What the trunk gives for T tokens that `takes` accepted: [T, …] each, valid until the next step."""
        count = token_ids.shape[0]
        size = piece_size(count, self._sizes)
        if size is None:
            raise RuntimeError(f"no captured step takes {count} tokens")
        pieces = self._pieces[size]
        # Behind them stand the tokens of an earlier step: valid ones, whose results nobody reads.
        self._token_ids[:count].copy_(token_ids)
        self._positions[:count].copy_(positions)
        for graph, attention in zip(pieces.graphs, pieces.attentions, strict=False):
            graph.replay()
            attention.run(step, count)
        for graph in pieces.graphs[len(pieces.attentions) :]:
            graph.replay()
        return tuple(rows[:count] for rows in pieces.results)


class _Rehearsal:
    """Attention that gives anything."""

    def record(self, layer: int, *given: Tensor) -> Tensor:
        return _room_for(given)


class _Recorder:
    """Attention that ends a graph and begins the next."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._attentions: list[_Attention] = []

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)

    def record(self, layer: int, *given: Tensor) -> Tensor:
        self._graphs[-1].capture_end()
        aliases = tuple(_alias(tensor) for tensor in given)
        self.begin()
        out = _room_for(given)
        self._attentions.append(_Attention(layer, aliases, _alias(out)))
        return out

    def end(self, results: tuple[Tensor, ...]) -> _Pieces:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self._graphs[-1].capture_end()
        if any("graph is empty" in str(one.message).lower() for one in told):
            self._graphs.pop()
        return _Pieces(self._graphs, self._attentions, tuple(_alias(rows) for rows in results))


def _room_for(given: tuple[Tensor, ...]) -> Tensor:
    """Room for what attention gives for (query, key, value, …)."""
    query, value = given[0], given[2]
    return query.new_empty((*query.shape[:2], value.shape[2]))


class _Alias:
    """Device memory by address, in the form that torch takes without copying it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def _alias(tensor: Tensor) -> Tensor:
    """A tensor over the same memory that does not keep it from being used again."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory: Any = _Alias(tensor.data_ptr(), elements * tensor.element_size())
    raw = torch.as_tensor(memory, device=tensor.device)
    if raw.data_ptr() != tensor.data_ptr():
        raise RuntimeError("torch copied memory that was to be shared")
    return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
