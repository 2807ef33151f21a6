"""What one step computes: a ragged batch of tokens, its rows and where their keys and values live. `state` and `graphs`
make it of a plan, the model and its attention read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """One step's ragged batch: T tokens in R rows.

    Rows `[0, decode_rows)` have exactly one token each (decode), the others are prefill chunks. A row's tokens are
    consecutive, in ascending position. Device tensors are only read; the step's owner may reuse them once the step's
    kernels have been launched on the same stream.
    """

    lane: int
    """Which of the lookahead + 1 buffer sets this step owns."""
    token_ids: Tensor
    """[T] int64, device."""
    positions: Tensor
    """[T] int64, device: the token's index in its sequence."""
    kv_slots: Tensor
    """[T] int64, device: `block_id * block_size + offset`, where the token's key and value are written."""
    row_of_token: Tensor
    """[T] int64, device."""
    block_tables: Tensor
    """[R, W] int32, device: each row's block ids; columns beyond a row's blocks hold the scratch block's id. With
    `lines` the tables of all slots, of which a row's is one."""
    kv_lens: Tensor
    """[R] int32, device: tokens in the row's KV cache once this step's are written."""
    query_starts: NDArray[np.int32]
    """[R + 1] host: row r's tokens are `[query_starts[r], query_starts[r + 1])`."""
    kv_lens_host: NDArray[np.int32]
    """[R] host copy of `kv_lens`; lengths are known ahead of the device."""
    decode_rows: int
    block_size: int
    lines: Tensor | None = None
    """[R] int32, device: which line of `block_tables` is a row's; None: line r is row r's."""
    pieces: Tensor | None = None
    """[N] int32, device: how the contexts of decoding rows are cut, as the backend's `cutting` has written it
    (attention.sharing); None: not at all."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_rows(self) -> int:
        return self.kv_lens.shape[0]
