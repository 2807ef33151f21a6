"""Steps that nobody asked for, run before the first request: they show how much memory a step takes, and compile what
is compiled on first use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..protocol.sampling import MAX_BAD_SEQUENCES, MAX_LOGIT_BIASES, MAX_LOGPROBS
from .adjustments import Adjustments
from .batch import Batch
from .config import WorkerConfig
from .features import NOTHING, StepFeatures
from .logprobs import tell
from .model import PagedModel
from .pieces import piece_sizes
from .sampler import SamplingColumns, sample
from .sources import LoadError

CPU_TRIAL_S: Final = 0.4
"""A step that should take longer on a CPU is not tried."""
CPU_FIRST_TOKENS: Final = 16
CPU_GROWTH: Final = 4
EVERYTHING: Final = StepFeatures(
    draws=True,
    penalties=True,
    min_p=True,
    masks=True,
    biases=MAX_LOGIT_BIASES,
    sequences=MAX_BAD_SEQUENCES,
    told_rows=NOTHING,
    told_entries=NOTHING,
    prompt=None,
)


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


def longest_step_s(
    config: WorkerConfig, model: PagedModel, max_model_len: int, progress: Callable[[str, float], None]
) -> float:
    """Seconds that the largest steps take (see `largest_steps`), the longer of the two. The cache must be allocated.

    On CUDA both are run as they are, which also shows that the memory suffices: raises LoadError with the figures if
    it does not. On a CPU, where that might take minutes, ever larger steps are run as long as the next one should take
    no more than CPU_TRIAL_S, and the time of the last is scaled by its tokens, which gives rather too much. So there
    the memory is shown to suffice for the step that was tried and not for the largest.
    """
    progress("trying the largest step", 0.0)
    most = config.max_num_batched_tokens
    tokens = most
    if model.device.type != "cuda":
        tokens = min(most, CPU_FIRST_TOKENS)
        _try_largest(config, model, max_model_len, tokens)  # torch's own first-time work is no part of a step
    while True:
        seconds = _try_largest(config, model, max_model_len, tokens)
        more = min(most, tokens * CPU_GROWTH)
        if tokens == most or seconds * more / tokens > CPU_TRIAL_S:
            break
        tokens = more
        progress("trying the largest step", tokens / most)
    progress("trying the largest step", 1.0)
    return seconds * most / tokens


def _try_largest(config: WorkerConfig, model: PagedModel, max_model_len: int, tokens: int) -> float:
    """Seconds of the longer of the largest steps of `tokens` tokens. Raises LoadError if they do not fit."""
    longest, room = 0.0, _room(model.device)
    try:
        for batch in largest_steps(config, model, max_model_len, tokens):
            _synchronize(model.device)
            start = time.perf_counter()
            run_step(model, batch)
            _synchronize(model.device)
            longest = max(longest, time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        raise LoadError(
            f"the largest step ({tokens} tokens, up to {config.max_num_seqs} requests) does not fit into {room}; lower "
            f"--max-num-batched-tokens, --max-num-seqs or the size of the KV cache ({str(error).splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        if model.device.type == "cpu" and "can't allocate memory" in str(error):
            raise LoadError(
                f"a step of {tokens} tokens (of up to {config.max_num_batched_tokens}) does not fit into {room}; "
                f"lower --max-num-batched-tokens or --kv-cache-memory-bytes ({str(error).splitlines()[0]})"
            ) from error
        raise
    return longest


def run_largest_step(config: WorkerConfig, model: PagedModel, max_model_len: int) -> None:
    """Runs the largest steps over a cache of one block, which is left allocated. Raises LoadError if the memory does
    not suffice."""
    model.allocate_kv_cache(1, config.block_size)
    _try_largest(config, model, max_model_len, config.max_num_batched_tokens)


def run_largest_graphs(config: WorkerConfig, model: PagedModel) -> None:
    """Runs the largest steps that are captured, over a cache of one block, which is left allocated: a greedy one of as
    many decoding rows as there may be, and one of as many tokens as pieces take."""
    model.allocate_kv_cache(1, config.block_size)
    rows = np.ones(config.max_num_seqs, np.int32)
    model.greedy(model.hidden(scratch_batch(model, rows, config.block_size, len(rows), 0)))
    if model.compiled:
        tokens = np.ones(max(piece_sizes(config.max_num_batched_tokens), default=1), np.int32)
        model.hidden(scratch_batch(model, tokens, config.block_size, 0, 0))


def largest_steps(config: WorkerConfig, model: PagedModel, max_model_len: int, tokens: int) -> Iterator[Batch]:
    """The two steps of `tokens` tokens that take the most memory beside the cache, or the most time: one that samples
    for as many requests as may run, and one that ends a sequence of full length. Made one by one."""
    rows = min(config.max_num_seqs, tokens)
    lengths = np.full(rows, tokens // rows, np.int32)
    lengths[-1] += tokens - int(lengths.sum())
    yield scratch_batch(model, np.minimum(lengths, max_model_len), config.block_size, 0, 0)
    last = np.array([min(tokens, max_model_len)], np.int32)
    yield scratch_batch(model, last, config.block_size, 0, 0, before=max_model_len - int(last[0]))


def scratch_batch(
    model: PagedModel, lengths: NDArray[np.int32], block_size: int, decode_rows: int, lane: int, before: int = 0
) -> Batch:
    """Rows of these lengths, each after `before` tokens of its sequence, all of whose blocks are the scratch block."""
    device, rows, tokens = model.device, len(lengths), int(lengths.sum())
    starts = np.zeros(rows + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    row_of_token = np.repeat(np.arange(rows), lengths)
    positions = np.arange(tokens) - starts[row_of_token] + before
    kv_lens = lengths + np.int32(before)
    width = -(-int(kv_lens.max()) // block_size)
    return Batch(
        lane=lane,
        token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.as_tensor(positions, dtype=torch.int64, device=device),
        kv_slots=torch.full((tokens,), model.scratch_block * block_size, dtype=torch.int64, device=device),
        row_of_token=torch.as_tensor(row_of_token, dtype=torch.int64, device=device),
        block_tables=torch.full((rows, width), model.scratch_block, dtype=torch.int32, device=device),
        kv_lens=torch.as_tensor(kv_lens, device=device),
        query_starts=starts,
        kv_lens_host=kv_lens,
        decode_rows=decode_rows,
        block_size=block_size,
        pieces=_pieces(model, kv_lens[:decode_rows]),
    )


def _pieces(model: PagedModel, kv_lens: NDArray[np.int32]) -> torch.Tensor | None:
    cutting = model.cutting
    if cutting is None or not len(kv_lens):
        return None
    pieces = np.empty(cutting.room(len(kv_lens)), np.int32)
    cutting.write(kv_lens, pieces)
    return torch.from_numpy(pieces).to(model.device)


def _room(device: torch.device) -> str:
    """What a step may take at this moment, in words."""
    if device.type != "cuda":
        return "the memory"
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return f"the {free / 2**30:.2f} GiB that weights and KV cache leave of the GPU's {total / 2**30:.2f} GiB"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_step(model: PagedModel, batch: Batch) -> None:
    """A whole step with both kinds of sampling, and with log-probabilities."""
    device, rows = model.device, batch.num_rows
    last = torch.as_tensor(batch.query_starts[1:] - 1, dtype=torch.int64, device=device)
    hidden_rows = model.hidden(batch, wanted=last)
    logits = model.logits(hidden_rows)
    model.greedy(hidden_rows)
    ones, slots = torch.ones(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
    tell(logits, batch.token_ids[:1].expand(rows), MAX_LOGPROBS, model.log_softmax)
    adjustments, position = Adjustments(1, model.vocab_size, device), torch.zeros_like(slots, dtype=torch.int32)
    logits = adjustments.apply(EVERYTHING, logits, slots, position)
    tokens = sample(
        logits,
        SamplingColumns(
            temperature=ones,
            top_k=torch.ones(rows, dtype=torch.int32, device=device),
            top_p=torch.full((rows,), 0.5, device=device),
            seed=torch.zeros(rows, dtype=torch.int64, device=device),
            sample_index=torch.zeros(rows, dtype=torch.int32, device=device),
            position=position,
        ),
    )
    adjustments.note(EVERYTHING, slots, position, tokens)
