"""How many KV cache blocks there is room for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .batch import Batch
from .config import WorkerConfig
from .loading import LoadError
from .model import PagedModel
from .sampler import SamplingColumns, sample

CPU_CACHE_BYTES = 1024**3
"""KV cache of a CPU worker, unless a size is given."""


def count_blocks(
    config: WorkerConfig, model: PagedModel, max_model_len: int, progress: Callable[[str, float], None]
) -> int:
    """Blocks that fit, but no more than max_num_seqs requests of full length can use.

    On CUDA what the model leaves is measured, by running the largest step there is. Raises LoadError with the figures
    if not even one request of max_model_len fits.
    """
    per_block = model.kv_bytes_per_block(config.block_size)
    least = -(-max_model_len // config.block_size)
    if config.num_gpu_blocks_override is not None:
        blocks, source = config.num_gpu_blocks_override, "num_gpu_blocks_override"
    elif config.kv_cache_memory_bytes is not None:
        blocks, source = (
            config.kv_cache_memory_bytes // per_block,
            f"kv_cache_memory_bytes {config.kv_cache_memory_bytes}",
        )
    elif model.device.type == "cuda":
        free, source = _free_cuda_bytes(config, model, progress)
        blocks = free // per_block
    else:
        blocks, source = CPU_CACHE_BYTES // per_block, f"the CPU's default of {CPU_CACHE_BYTES} bytes"
    if blocks < least:
        raise LoadError(
            f"the KV cache ({source}) has room for {max(0, blocks)} blocks of {config.block_size} tokens, but one "
            f"request of max_model_len {max_model_len} needs {least} ({least * per_block / 2**30:.2f} GiB); lower "
            "--max-model-len or give it more memory"
        )
    return int(min(blocks, least * config.max_num_seqs)) if config.num_gpu_blocks_override is None else blocks


def _free_cuda_bytes(
    config: WorkerConfig, model: PagedModel, progress: Callable[[str, float], None]
) -> tuple[int, str]:
    """Bytes of the GPU that the cache may take, and where the number comes from."""
    progress("measuring memory", 0.0)
    torch.cuda.synchronize(model.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    before, total = torch.cuda.mem_get_info(model.device)
    resident = torch.cuda.memory_allocated(model.device)
    run_largest_step(config, model)
    torch.cuda.synchronize(model.device)
    peak = torch.cuda.max_memory_allocated(model.device) - resident
    model.release_kv_cache()
    torch.cuda.empty_cache()
    used = total - before
    allowed = int(total * config.gpu_memory_utilization)
    progress("measuring memory", 1.0)
    gib = 2**30
    return (
        allowed - used - peak,
        f"{config.gpu_memory_utilization:.0%} of {total / gib:.1f} GiB, less {used / gib:.1f} GiB in use and "
        f"{peak / gib:.1f} GiB for the largest step",
    )


def run_largest_step(config: WorkerConfig, model: PagedModel) -> None:
    """The step that takes the most memory beside the cache: as many tokens and samples as one may have."""
    tokens, rows, block_size = config.max_num_batched_tokens, config.max_num_seqs, config.block_size
    device = model.device
    model.allocate_kv_cache(1, block_size)
    lengths = np.full(rows, tokens // rows, np.int32)
    lengths[-1] += tokens - int(lengths.sum())
    width = -(-int(lengths.max()) // block_size)
    starts = np.zeros(rows + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    row_of_token = np.repeat(np.arange(rows), lengths)
    positions = np.arange(tokens) - starts[row_of_token]
    batch = Batch(
        lane=0,
        token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.as_tensor(positions, dtype=torch.int64, device=device),
        kv_slots=torch.full((tokens,), model.scratch_block * block_size, dtype=torch.int64, device=device),
        row_of_token=torch.as_tensor(row_of_token, dtype=torch.int64, device=device),
        block_tables=torch.full((rows, width), model.scratch_block, dtype=torch.int32, device=device),
        kv_lens=torch.as_tensor(lengths, device=device),
        query_starts=starts,
        kv_lens_host=lengths,
        decode_rows=0,
        block_size=block_size,
    )
    hidden = model.hidden(batch)
    logits = model.logits(hidden[torch.as_tensor(starts[1:] - 1, dtype=torch.int64, device=device)])
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
