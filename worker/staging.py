"""Host memory that the device reads or writes while a step is in flight.

Device memory is ordered by its stream; host memory is not. A buffer that an asynchronous copy still reads must not be
written, so every buffer exists once per lane, a lane belongs to one step until that step's copies have completed, and
there are lookahead + 1 lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .gate import Gate


def _unnoticed() -> None:
    """Nobody watches."""


class Lane:
    """The buffers of one step in flight: what goes to the device, and what comes back."""

    def __init__(
        self,
        index: int,
        *,
        inputs: int,
        outputs: int,
        device: torch.device,
        mask_words: int = 0,
        gate: Gate | None = None,
    ) -> None:
        """`inputs`: int32 values that a step may bring; `outputs`: tokens that it may sample; `mask_words`: int32
        values of one row's grammar mask, 0 where there are no grammars."""
        self.index = index
        self.step = 0
        """The step that owns the lane, for the trace."""
        self.sampling_begins: Callable[[], None] = _unnoticed
        """Called where the step's forward pass is launched and its sampling is not."""
        pinned = device.type == "cuda"
        self._host = torch.empty(inputs, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.empty(inputs, dtype=torch.int32, device=device)
        self._array: NDArray[np.int32] = self._host.numpy()
        self._used = 0
        self.sampled_device = torch.empty(outputs, dtype=torch.int32, device=device)
        self.sampled_host = torch.empty(outputs, dtype=torch.int32, pin_memory=pinned)
        self._mask_host = torch.empty((outputs, mask_words), dtype=torch.int32, pin_memory=pinned and mask_words > 0)
        self._mask_device = torch.empty((outputs, mask_words), dtype=torch.int32, device=device)
        self._mask_array: NDArray[np.int32] = self._mask_host.numpy()
        self.gate = gate
        """Where the device waits for the step's masks; None: the host does."""
        self._free = True
        self.told: Tensor | None = None
        """The host's copy of the log-probabilities that the step's tokens come with; see logprobs.tell."""
        self.prompt_told: Tensor | None = None
        """The same of tokens of prompts."""
        self._brought: list[tuple[Tensor, Tensor]] = []
        self._taken: list[tuple[Tensor, Tensor]] = []

    @property
    def free(self) -> bool:
        """No step in flight owns the lane."""
        return self._free

    def acquire(self) -> None:
        """The lane is the caller's next step's. Raises RuntimeError while a step in flight owns it."""
        if not self._free:
            raise RuntimeError(f"lane {self.index} still belongs to a step in flight")
        self._free = False
        self._used = 0

    def release(self) -> None:
        """The copies of the lane's step have completed. May be called from another thread than `acquire`."""
        self._brought, self._taken = [], []
        self.told = self.prompt_told = None
        self._free = True

    def put(self, values: NDArray[Any]) -> Tensor:
        """Writes a one-dimensional array of 4-byte values; returns the device's view of it, int32, valid after
        `send`."""
        end = self._used + len(values)
        if end > len(self._array):
            raise RuntimeError(f"a step brings over {len(self._array)} values, more than its lane holds")
        self._array[self._used : end] = values.view(np.int32)
        view = self._device[self._used : end]
        self._used = end
        return view

    def bring(self, arrays: Sequence[NDArray[np.int32]]) -> list[Tensor]:
        """As `put`, for what few steps have and what has no bound: it gets memory of its own, until the lane is
        released. Returns the device's flat views, int32."""
        sizes = [array.size for array in arrays]
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self._device.is_cuda)
        np.concatenate([array.reshape(-1) for array in arrays], out=host.numpy())
        device = torch.empty(len(host), dtype=torch.int32, device=self._device.device)
        self._brought.append((host, device))
        return list(device.split(sizes))

    def send(self) -> None:
        """Copies what was put to the device, on the current stream."""
        self._device[: self._used].copy_(self._host[: self._used], non_blocking=True)
        for host, device in self._brought:
            device.copy_(host, non_blocking=True)

    def take(self, values: Tensor) -> Tensor:
        """Sees to it that int32 values which the step has computed come back with its tokens; returns the host memory
        where they will be."""
        host = torch.empty(values.shape, dtype=torch.int32, pin_memory=values.is_cuda)
        self._taken.append((host, values))
        return host

    def masks(self, count: int) -> NDArray[np.int32]:
        """Where the grammar masks of `count` rows are to be written on the host, before the device runs what
        `send_masks` queues."""
        return self._mask_array[:count]

    def send_masks(self, count: int) -> Tensor:
        """Copies them to the device, on the current stream: [count, mask_words] int32."""
        self._mask_device[:count].copy_(self._mask_host[:count], non_blocking=True)
        return self._mask_device[:count]

    def fetch(self, count: int) -> None:
        """Copies `count` sampled tokens back to the host, on the current stream, and what was taken."""
        self.sampled_host[:count].copy_(self.sampled_device[:count], non_blocking=True)
        for host, values in self._taken:
            host.copy_(values, non_blocking=True)


def input_capacity(slots: int, num_blocks: int, max_tokens: int, cut: int = 0) -> int:
    """Most int32 values that one step can bring: per slot the join columns, rows and samples; block table entries;
    tokens; `cut` values that tell how contexts are cut."""
    return 25 * slots + 2 * (num_blocks + slots) + 4 * max_tokens + cut + 64
