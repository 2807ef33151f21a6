"""Steps that nobody asked for, run before the first request: they show how much memory a step takes, and compile what
is compiled on first use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from .batch import Batch
from .config import WorkerConfig
from .model import PagedModel
from .sampler import SamplingColumns, greedy, sample


def warm_up(config: WorkerConfig, model: PagedModel, progress: Callable[[str, float], None]) -> None:
    """Runs each kind of step once in every lane: chunks, chunks beside decoding rows, decoding rows. The cache must be
    allocated.

    Attention kernels may be compiled here, which takes up to a minute the first time.
    """
    if model.device.type != "cuda":
        return
    kinds = [(0, 2), (1, 1), (2, 0)]
    total = len(kinds) * model.lanes
    for lane in range(model.lanes):
        for index, (decode_rows, chunks) in enumerate(kinds):
            progress("warming up", (lane * len(kinds) + index) / total)
            lengths = np.array([1] * decode_rows + [config.block_size] * chunks, np.int32)
            run_step(model, scratch_batch(model, lengths, config.block_size, decode_rows, lane))
    torch.cuda.synchronize(model.device)
    progress("warming up", 1.0)


def run_largest_step(config: WorkerConfig, model: PagedModel) -> None:
    """The step that takes the most memory beside the cache: as many tokens and samples as one may have."""
    rows = config.max_num_seqs
    lengths = np.full(rows, config.max_num_batched_tokens // rows, np.int32)
    lengths[-1] += config.max_num_batched_tokens - int(lengths.sum())
    model.allocate_kv_cache(1, config.block_size)
    run_step(model, scratch_batch(model, lengths, config.block_size, 0, 0))


def scratch_batch(model: PagedModel, lengths: NDArray[np.int32], block_size: int, decode_rows: int, lane: int) -> Batch:
    """Rows of new sequences of these lengths, all of whose blocks are the scratch block."""
    device, rows, tokens = model.device, len(lengths), int(lengths.sum())
    starts = np.zeros(rows + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    row_of_token = np.repeat(np.arange(rows), lengths)
    positions = np.arange(tokens) - starts[row_of_token]
    width = -(-int(lengths.max()) // block_size)
    return Batch(
        lane=lane,
        token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.as_tensor(positions, dtype=torch.int64, device=device),
        kv_slots=torch.full((tokens,), model.scratch_block * block_size, dtype=torch.int64, device=device),
        row_of_token=torch.as_tensor(row_of_token, dtype=torch.int64, device=device),
        block_tables=torch.full((rows, width), model.scratch_block, dtype=torch.int32, device=device),
        kv_lens=torch.as_tensor(lengths, device=device),
        query_starts=starts,
        kv_lens_host=lengths,
        decode_rows=decode_rows,
        block_size=block_size,
    )


def run_step(model: PagedModel, batch: Batch) -> None:
    """A whole step with both kinds of sampling."""
    device, rows = model.device, batch.num_rows
    last = torch.as_tensor(batch.query_starts[1:] - 1, dtype=torch.int64, device=device)
    logits = model.logits(model.hidden(batch)[last])
    greedy(logits)
    sample(
        logits,
        SamplingColumns(
            temperature=torch.ones(rows, device=device),
            top_k=torch.ones(rows, dtype=torch.int32, device=device),
            top_p=torch.full((rows,), 0.5, device=device),
            seed=torch.zeros(rows, dtype=torch.int64, device=device),
            sample_index=torch.zeros(rows, dtype=torch.int32, device=device),
            position=torch.zeros(rows, dtype=torch.int32, device=device),
        ),
    )
