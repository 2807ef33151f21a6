"""How many KV cache blocks there is room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from .adjustments import table_bytes
from .config import WorkerConfig
from .model import PagedModel
from .sources import LoadError
from .warmup import run_largest_graphs, run_largest_step

CPU_CACHE_BYTES = 1024**3
"""KV cache of a CPU worker, unless a size is given."""
GRAPH_BYTES: Final = 512 << 20
"""What CUDA itself takes for the graphs, by a generous estimate."""
COPIED_BYTES: Final = 1 << 30
"""To measure the bandwidth: far more than any cache holds."""
GPU_MEMORY_UTILIZATION: Final = 0.9
"""Share of the GPU's memory that the worker uses in all, unless another is given."""


def count_blocks(
    config: WorkerConfig, model: PagedModel, max_model_len: int, progress: Callable[[str, float], None]
) -> int:
    """Blocks that fit, but no more than max_num_seqs requests of full length can use.

    On CUDA what the model leaves is measured, by running the largest step there is. Raises LoadError with the figures
    if not even one request of max_model_len fits.
    """

    def room() -> tuple[int, str]:
        if model.device.type == "cuda":
            return _free_cuda_bytes(config, model, max_model_len, progress)
        return CPU_CACHE_BYTES, f"the CPU's default of {CPU_CACHE_BYTES} bytes"

    return fit_blocks(config, model.kv_bytes_per_block(config.block_size), max_model_len, room)


def fit_blocks(config: WorkerConfig, per_block: int, max_model_len: int, room: Callable[[], tuple[int, str]]) -> int:
    """Blocks of `per_block` bytes that fit; `room` says how many bytes there are, and where that comes from, if no
    option does. Raises as `count_blocks`."""
    least = -(-max_model_len // config.block_size)
    if config.num_gpu_blocks_override is not None:
        blocks, source = config.num_gpu_blocks_override, "num_gpu_blocks_override"
    elif config.kv_cache_memory_bytes is not None:
        blocks, source = (
            config.kv_cache_memory_bytes // per_block,
            f"kv_cache_memory_bytes {config.kv_cache_memory_bytes}",
        )
    else:
        free, source = room()
        blocks = free // per_block
    if blocks < least:
        raise LoadError(
            f"the KV cache ({source}) has room for {max(0, blocks)} blocks of {config.block_size} tokens, but one "
            f"request of max_model_len {max_model_len} needs {least} ({least * per_block / 2**30:.2f} GiB); lower "
            "--max-model-len or give it more memory"
        )
    return int(min(blocks, least * config.max_num_seqs)) if config.num_gpu_blocks_override is None else blocks


def weight_bytes_per_step(model: PagedModel) -> int:
    """Bytes of weights that a step reads: all but the input embedding, of which it looks up rows, unless the head uses
    it too."""
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.module.parameters()}
    embedding, head = model.module.get_input_embeddings(), model.module.get_output_embeddings()
    if isinstance(embedding, nn.Embedding) and getattr(head, "weight", None) is not embedding.weight:
        weights.pop(embedding.weight.data_ptr(), None)
    return sum(weights.values())


def copy_bandwidth(device: torch.device) -> int:
    """Bytes that the device reads and writes per second when it copies, the best of a few tries; 0 on a CPU, or without
    room to try."""
    if device.type != "cuda":
        return 0
    try:
        source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    except torch.OutOfMemoryError:
        return 0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    fastest_s = float("inf")
    for _ in range(6):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        fastest_s = min(fastest_s, start.elapsed_time(end) / 1e3)
    del source, target
    torch.cuda.empty_cache()
    return int(2 * COPIED_BYTES / fastest_s)


def _peak_bytes(model: PagedModel, run: Callable[[], None]) -> int:
    """Most bytes that `run` has on the device at once, beside what was there. Gives the KV cache up."""
    resident = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    run()
    torch.cuda.synchronize(model.device)
    peak = torch.cuda.max_memory_allocated(model.device) - resident
    model.release_kv_cache()
    torch.cuda.empty_cache()
    return peak


def _free_cuda_bytes(
    config: WorkerConfig, model: PagedModel, max_model_len: int, progress: Callable[[str, float], None]
) -> tuple[int, str]:
    """Bytes of the GPU that the cache may take, and where the number comes from."""
    progress("measuring memory", 0.0)
    torch.cuda.synchronize(model.device)
    torch.cuda.empty_cache()
    before, total = torch.cuda.mem_get_info(model.device)
    peak = _peak_bytes(model, lambda: run_largest_step(config, model, max_model_len))
    if model.capturable and not config.enforce_eager:  # graphs keep the memory of their largest steps to themselves
        peak += _peak_bytes(model, lambda: run_largest_graphs(config, model)) + GRAPH_BYTES
    peak += table_bytes(config.max_num_seqs, model.vocab_size)
    used = total - before
    share = GPU_MEMORY_UTILIZATION if config.gpu_memory_utilization is None else config.gpu_memory_utilization
    allowed = int(total * share)
    progress("measuring memory", 1.0)
    gib = 2**30
    return (
        allowed - used - peak,
        f"{share:.0%} of {total / gib:.1f} GiB, less {used / gib:.1f} GiB in use and "
        f"{peak / gib:.1f} GiB for the largest step",
    )
