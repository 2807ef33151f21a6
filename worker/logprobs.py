"""Log-probabilities of tokens and of the likeliest others, from the model's own logits.

Told are, as in vLLM's `raw_logprobs`, the values before anything that sampling parameters do to them. A token's *rank*
is how many tokens of the vocabulary are at least as likely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sampler import ordered_bits

_LOG_SOFTMAX: Final = partial(torch.log_softmax, dim=-1)


def tell(
    logits: Tensor,
    tokens: Tensor,
    likeliest: int,
    log_softmax: Callable[[Tensor], Tensor] = _LOG_SOFTMAX,
) -> Tensor:
    """int32 [N, 3 + 2 · likeliest]: rank, log-probability (float32 bits) and id of each token, then ids and
    log-probabilities of the row's likeliest ones, of equals the lowest ids first. logits float32 [N, vocab], tokens
    [N]."""
    logprobs = log_softmax(logits)
    tokens = tokens.to(torch.int64)[:, None]
    own = logprobs.gather(-1, tokens)
    rank = (logprobs >= own).sum(-1, keepdim=True)
    pieces = [rank.to(torch.int32), own.view(torch.int32), tokens.to(torch.int32)]
    if likeliest:
        vocab = logprobs.shape[-1]
        likeliest = min(likeliest, vocab)
        # One number for value and id: which of two equal values comes first must not be left to the algorithm.
        keys = (ordered_bits(logprobs).to(torch.int64) << 32) - torch.arange(vocab, device=logits.device)
        ids = (-keys.topk(likeliest, dim=-1).values) & 0xFFFFFFFF
        pieces += [ids.to(torch.int32), logprobs.gather(-1, ids).view(torch.int32)]
    return torch.cat(pieces, dim=1)


@dataclass(slots=True)
class Told:
    """What `tell` gave for N tokens of which row i is to have `entries[i]` values, its own and the likeliest: in the
    columns of StepResult."""

    rank: NDArray[np.int32]
    token: NDArray[np.int32]
    logprob: NDArray[np.float32]


def unpack(packed: NDArray[np.int32], entries: NDArray[np.int32]) -> Told:
    """From the host's copy of `tell`'s result."""
    width = (packed.shape[1] - 3) // 2
    ids = np.concatenate([packed[:, 2:3], packed[:, 3 : 3 + width]], axis=1)
    bits = np.concatenate([packed[:, 1:2], packed[:, 3 + width :]], axis=1)
    wanted = np.arange(width + 1) < entries[:, None]
    return Told(np.ascontiguousarray(packed[:, 0]), ids[wanted], bits[wanted].view(np.float32))
