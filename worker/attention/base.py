"""What an attention backend is: it opens a step for a batch, and the step attends layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache
from .sharing import Cutting


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
        self.cache.append(layer, self.kv_slots, key, value)
        return self.attend_cached(layer, query)

    def attend_cached(self, layer: int, query: Tensor, out: Tensor | None = None) -> Tensor:
        """`attend` once the step's keys and values of the layer are in the cache; into `out` if it is given."""
        ...


class AttentionBackend(ABC):
    """Attention over one KV cache. Launches work on the current stream and never waits for it."""

    name: ClassVar[str]
    cache: KVCache

    @abstractmethod
    def begin(self, batch: Batch) -> AttentionStep:
        """Prepare a step. Host buffers used here belong to `batch.lane` until the step's copies have run.

        Of a step in which all rows decode, what is launched here and later may be captured and replayed with other
        values in the batch's device tensors: nothing then goes by what the host knows of lengths.
        """

    @property
    def cutting(self) -> Cutting | None:
        """How the contexts of decoding rows are to be cut; what it writes then comes as `Batch.pieces`. None: the
        backend takes no pieces."""
        return None
