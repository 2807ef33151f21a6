"""What an attention backend is: it opens a step for a batch, and the step attends layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from torch import Tensor

from ..batch import Batch


class AttentionStep(Protocol):
    """The attention of one step: everything that its layers share (plans, indices) is already computed."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the step's keys and values of a layer into the cache, then attend.

        `layer` indexes the model's `kv_spec`. query [T, query_heads, head_dim], key [T, kv_heads, head_dim], value
        [T, kv_heads, value_dim]; returns [T, query_heads, value_dim] in query's dtype. Never waits for the device.
        """
        ...


class AttentionBackend(ABC):
    """Attention over one KV cache. Launches work on the current stream and never waits for it."""

    name: ClassVar[str]

    @abstractmethod
    def begin(self, batch: Batch) -> AttentionStep:
        """Prepare a step. Host buffers used here belong to `batch.lane` until the step's copies have run."""
