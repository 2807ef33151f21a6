"""What a model's attention layers are, found by running it, and the proof that it computes the same when paged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .attention.registry import STEP_KWARG, LayerInspector, LayerSink, UnsupportedAttentionError
from .batch import Batch
from .kv_cache import LayerKV
from .loading import LoadError

PROBE_TOKENS = 20
PROBE_BLOCK_SIZE = 8
PROBE_BLOCKS = 6
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BIT = 0.1


def run_trunk(trunk: nn.Module, token_ids: Tensor, positions: Tensor, sink: LayerSink) -> Tensor:
    """The trunk (embedding to final norm) over T tokens: [T, hidden]. Attention goes to `sink`."""
    out = trunk(
        input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, **{STEP_KWARG: sink}
    )
    hidden: Tensor = out.last_hidden_state
    return hidden.squeeze(0)


def dense_attention(layer: LayerKV, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one whole sequence with itself, in float32: shapes as `AttentionStep.attend`."""
    length, group = query.shape[0], layer.query_heads // layer.kv_heads
    q = query.transpose(0, 1).float() * layer.scale
    k = key.transpose(0, 1).float().repeat_interleave(group, dim=0)
    v = value.transpose(0, 1).float().repeat_interleave(group, dim=0)
    scores = q @ k.transpose(1, 2)
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    at = torch.arange(length, device=query.device)
    hidden = at > at[:, None]
    if layer.window is not None:
        hidden |= at <= at[:, None] - layer.window
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)


def probe_tokens(vocab_size: int, salt: int, device: torch.device) -> Tensor:
    """[PROBE_TOKENS] token ids spread over the vocabulary."""
    return (torch.arange(PROBE_TOKENS, device=device) * 7919 + 13 + 101 * salt) % vocab_size


def inspect_layers(module: PreTrainedModel, trunk: nn.Module, device: torch.device) -> tuple[LayerKV, ...]:
    """The model's attention layers in the order in which they run. Raises LoadError naming what is not supported."""
    config: PretrainedConfig = module.config
    inspector = LayerInspector(dense_attention)
    tokens = probe_tokens(config.vocab_size, 0, device)
    try:
        with torch.no_grad():
            run_trunk(trunk, tokens, torch.arange(PROBE_TOKENS, device=device), inspector)
    except UnsupportedAttentionError as error:
        raise LoadError(str(error)) from error
    except (TypeError, AttributeError) as error:
        raise LoadError(
            f"{type(module).__name__} cannot be run as a decoder-only transformers model: {error}"
        ) from error
    layers, expected = inspector.layers, config.num_hidden_layers
    if len(layers) != expected:
        raise LoadError(
            f"{type(module).__name__} has {expected} layers, but {len(layers)} of them call transformers' attention "
            "registry; layers of other kinds (linear attention, state space, convolution) are not supported"
        )
    return tuple(layers)


def probe_batches(vocab_size: int, scratch_block: int, device: torch.device) -> Iterator[Batch]:
    """Two sequences of PROBE_TOKENS tokens over a cache of PROBE_BLOCKS blocks, in three steps: two prefill chunks; a
    decode row beside a chunk; the rest. Their rows are sequence 0 and 1 where `decode_rows` does not say otherwise."""
    tables = {0: [0, 2, 4], 1: [1, 3, 5]}
    for decode_rows, spans in (
        (0, [(0, 0, 13), (1, 0, 9)]),
        (1, [(1, 9, 10), (0, 13, PROBE_TOKENS)]),
        (0, [(1, 10, PROBE_TOKENS)]),
    ):
        yield make_batch(
            [
                (probe_tokens(vocab_size, sequence, device), tables[sequence], start, end)
                for sequence, start, end in spans
            ],
            decode_rows,
            PROBE_BLOCK_SIZE,
            scratch_block,
            device,
        )


def make_batch(
    rows: list[tuple[Tensor, list[int], int, int]],
    decode_rows: int,
    block_size: int,
    scratch_block: int,
    device: torch.device,
    lane: int = 0,
) -> Batch:
    """A batch from rows (token ids of the whole sequence, block table, first and end position of what is computed)."""
    width = max(len(table) for _, table, _, _ in rows)
    tables = torch.tensor(
        [table + [scratch_block] * (width - len(table)) for _, table, _, _ in rows], dtype=torch.int32, device=device
    )
    lengths = [end - start for _, _, start, end in rows]
    positions = torch.cat([torch.arange(start, end, device=device) for _, _, start, end in rows])
    row_of_token = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)).to(device)
    blocks = tables[row_of_token, positions // block_size].to(torch.int64)
    ends = np.array([end for _, _, _, end in rows], dtype=np.int32)
    return Batch(
        lane=lane,
        token_ids=torch.cat([tokens[start:end] for tokens, _, start, end in rows]),
        positions=positions,
        kv_slots=blocks * block_size + positions % block_size,
        row_of_token=row_of_token,
        block_tables=tables,
        kv_lens=torch.from_numpy(ends).to(device),
        query_starts=np.cumsum([0, *lengths], dtype=np.int32),
        kv_lens_host=ends,
        decode_rows=decode_rows,
        block_size=block_size,
    )


@contextmanager
def own_attention(module: PreTrainedModel) -> Iterator[None]:
    """The model with its own eager attention, for comparison."""
    name = module.config._attn_implementation
    module.config._attn_implementation = "eager"
    try:
        yield
    finally:
        module.config._attn_implementation = name


def check_same(name: str, paged: Tensor, dense: Tensor) -> None:
    """LoadError unless two [T, n] results agree, token by token. In 16 bits the typical token counts: a mixture of
    experts may route single tokens otherwise after rounding."""
    difference = (paged - dense).float().norm(dim=-1) / dense.float().norm(dim=-1).clamp_min(1e-6)
    exact = paged.dtype in _TOLERANCE
    worst = float(difference.max() if exact else difference.median())
    limit = _TOLERANCE.get(paged.dtype, _TOLERANCE_16_BIT)
    if not worst <= limit:
        raise LoadError(
            f"{name} gives other results over a paged KV cache than by itself (relative difference {worst:.1e}, limit "
            f"{limit:.0e}): it keeps state between steps, or attends in a way that the worker does not know"
        )
