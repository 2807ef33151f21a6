"""What an attention backend is: it opens a step for a batch, and the step attends layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache


class AttentionStep(Protocol):
    """The attention of one step: everything that its layers share (plans, indices) is already computed."""

    cache: KVCache
    kv_slots: Tensor
    """[T] int64: where each token's key and value lie in the flat cache."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the step's keys and values of a layer into the cache, then attend.

        `layer` indexes the model's `kv_spec`. query [T, query_heads, head_dim], key [T, kv_heads, head_dim], value
        [T, kv_heads, value_dim]; returns [T, query_heads, value_dim] in query's dtype. Never waits for the device.
        """
        ...

    def attend_cached(self, layer: int, query: Tensor) -> Tensor:
        """`attend` once the step's keys and values of the layer are in the cache."""
        ...


class DecodeAttention(Protocol):
    """Attention of captured steps of a fixed number of decoding rows."""

    reads_block_tables: bool
    """`open` needs the batch's block tables; otherwise page_indices is all there is."""

    def open(self, batch: Batch) -> AttentionStep:
        """The step that is captured, this call's own work included. What the host knows of `batch` (lengths) holds for
        no replay."""
        ...

    def plan(self, lane: int, page_starts: NDArray[np.int32], kv_lens: NDArray[np.int32]) -> None:
        """Called before each replay, on its stream, with that replay's lengths [R] and where each row's pages begin
        [R + 1]. Host buffers used here belong to `lane`."""
        ...


class AttentionBackend(ABC):
    """Attention over one KV cache. Launches work on the current stream and never waits for it."""

    name: ClassVar[str]

    @abstractmethod
    def begin(self, batch: Batch) -> AttentionStep:
        """Prepare a step. Host buffers used here belong to `batch.lane` until the step's copies have run."""

    @abstractmethod
    def open_decode(
        self, rows: int, page_starts: Tensor, last_page_lens: Tensor, page_indices: Tensor
    ) -> DecodeAttention:
        """Attention for captured steps of `rows` decoding rows.

        Device tensors, int32, which hold the values of each replay: page_starts [rows + 1] where each row's block ids
        begin in page_indices, last_page_lens [rows] tokens in each row's last block. They are overwritten here.
        """
