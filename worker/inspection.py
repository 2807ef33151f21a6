"""What a model's attention layers are, found by running it, and the proof that it computes the same when paged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .attention.registry import (
    MASKED_NAME,
    STEP_KWARG,
    LayerInspector,
    LayerSink,
    ShowMask,
    UnsupportedAttentionError,
    layer_idx_of,
)
from .batch import Batch
from .kv_cache import LayerKV
from .sources import LoadError

PROBE_TOKENS = 20
PROBE_BLOCK_SIZE = 8
PROBE_BLOCKS = 6
PROBE_SEQUENCES = 2
PROBE_WINDOW = 5
"""For which a config's sliding window is exchanged while its masks are looked at: they show it within the probe."""
_TOLERANCE_32_BIT = 1e-3
_TOLERANCE_16_BIT = 0.1
_TOLERANCE_8_BIT = 0.7
"""Rounding to 8 bits turns differences in the last of 16 bits into ones of a sixteenth, again in each layer. Results
that have nothing to do with each other differ by 1.4."""


def run_trunk(trunk: nn.Module, token_ids: Tensor, positions: Tensor, sink: LayerSink | ShowMask) -> Tensor:
    """The trunk (embedding to final norm) over T tokens: [T, hidden]. Attention goes to `sink`."""
    out = trunk(
        input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, **{STEP_KWARG: sink}
    )
    hidden: Tensor = out.last_hidden_state
    return hidden.squeeze(0)


@contextmanager
def named_failures(module: PreTrainedModel) -> Iterator[None]:
    """What a model raises on its first steps becomes a LoadError; a full device stays what it is."""
    try:
        yield
    except (LoadError, torch.OutOfMemoryError):
        raise
    except UnsupportedAttentionError as error:
        raise LoadError(str(error)) from error
    except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise LoadError(
            f"{type(module).__name__} cannot be run as a decoder-only transformers model over a paged KV cache: "
            f"{type(error).__name__}: {error}"
        ) from error


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
    return (weights @ v).transpose(0, 1).contiguous().to(query.dtype)


def probe_tokens(vocab_size: int, salt: int, device: torch.device) -> Tensor:
    """[PROBE_TOKENS] token ids spread over the vocabulary."""
    return (torch.arange(PROBE_TOKENS, device=device) * 7919 + 13 + 101 * salt) % vocab_size


def inspect_layers(module: PreTrainedModel, trunk: nn.Module, device: torch.device) -> tuple[LayerKV, ...]:
    """The model's attention layers in the order in which they run. Raises LoadError naming what is not supported."""
    config: PretrainedConfig = module.config
    if config.num_hidden_layers < 1:
        raise LoadError(f"{type(module).__name__} has {config.num_hidden_layers} layers by its config; it needs one")
    inspector = LayerInspector(dense_attention)
    tokens = probe_tokens(config.vocab_size, 0, device)
    with torch.no_grad():
        run_trunk(trunk, tokens, torch.arange(PROBE_TOKENS, device=device), inspector)
    layers, expected = inspector.layers, config.num_hidden_layers
    if len(layers) != expected:
        raise LoadError(
            f"{type(module).__name__} has {expected} layers, but {len(layers)} of them call transformers' attention "
            "registry; layers of other kinds (linear attention, state space, convolution) are not supported"
        )
    return tuple(layers) if device.type == "meta" else _with_windows(module, trunk, layers, tokens)


def _with_windows(
    module: PreTrainedModel, trunk: nn.Module, layers: list[LayerKV], tokens: Tensor
) -> tuple[LayerKV, ...]:
    """The layers, with the windows of those whose model tells them by masks alone. Raises LoadError if a layer's mask
    is wider than the window that it hands to its attention: it cannot be told which one the model was trained with."""
    config: Any = module.config
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window <= 0:
        return tuple(layers)
    hides: dict[int, bool] = {}

    def show(layer: nn.Module, mask: Tensor | None) -> None:
        if mask is not None:  # of what is added to scores, or of what is seen
            first = mask[0, 0, -1, 0]
            hides[layer_idx_of(layer)] = bool(~first if mask.dtype == torch.bool else first < -1.0)

    name = config._attn_implementation
    config._attn_implementation, config.sliding_window = MASKED_NAME, PROBE_WINDOW
    try:
        with torch.no_grad():
            run_trunk(trunk, tokens, torch.arange(len(tokens), device=tokens.device), show)
    finally:
        config._attn_implementation, config.sliding_window = name, window
    for layer in layers:
        if layer.window is not None and not hides.get(layer.layer_idx, True):
            raise LoadError(
                f"{type(module).__name__}: layer {layer.layer_idx} hands a window of {layer.window} tokens to its "
                "attention, but its mask has none"
            )
    return tuple(
        replace(layer, window=window) if layer.window is None and hides.get(layer.layer_idx) else layer
        for layer in layers
    )


@dataclass(frozen=True, slots=True)
class ProbeStep:
    """A step over probe sequences: (sequence, first position, end position) per row, decode rows first."""

    spans: list[tuple[int, int, int]]
    decode_rows: int
    vocab_size: int
    device: torch.device

    @property
    def sequences(self) -> list[int]:
        return [sequence for sequence, _, _ in self.spans]

    @property
    def lengths(self) -> list[int]:
        return [end - start for _, start, end in self.spans]

    def batch(self, scratch_block: int) -> Batch:
        # Blocks of the sequences alternate, so that a mistake in the tables shows.
        rows = [
            (
                probe_tokens(self.vocab_size, sequence, self.device),
                list(range(sequence, PROBE_BLOCKS, PROBE_SEQUENCES)),
                start,
                end,
            )
            for sequence, start, end in self.spans
        ]
        return make_batch(rows, self.decode_rows, PROBE_BLOCK_SIZE, scratch_block, self.device)


def mixed_steps(vocab_size: int, device: torch.device) -> list[ProbeStep]:
    """Both probe sequences in three steps: prefill chunks; a decode row beside a chunk; what is left."""
    end = PROBE_TOKENS
    return [
        ProbeStep([(0, 0, 13), (1, 0, 9)], 0, vocab_size, device),
        ProbeStep([(1, 9, 10), (0, 13, end)], 1, vocab_size, device),
        ProbeStep([(1, 10, end)], 0, vocab_size, device),
    ]


def single_steps(vocab_size: int, device: torch.device) -> list[ProbeStep]:
    """The first probe sequence in one chunk, the second token by token."""
    one_by_one = [ProbeStep([(1, at, at + 1)], 1, vocab_size, device) for at in range(PROBE_TOKENS)]
    return [ProbeStep([(0, 0, PROBE_TOKENS)], 0, vocab_size, device), *one_by_one]


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


@torch.no_grad()
def own_logits(module: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """What the model computes by itself, with its own eager attention and no cache: [T, vocab] float32."""
    config = module.config
    name = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        logits: Tensor = module(input_ids=token_ids.unsqueeze(0), use_cache=False).logits
    finally:
        config._attn_implementation = name
    return logits.squeeze(0).float()


def check_same(name: str, paged: Tensor, own: Tensor, dtype: torch.dtype, *, quantized: bool = False) -> None:
    """LoadError unless two [T, vocab] logits agree, token by token, as well as `dtype` lets them, and 8 bits if the
    model is quantised. Below 32 bits the typical token counts: a mixture of experts may route single tokens otherwise
    after rounding."""
    difference = (paged - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-6)
    exact = dtype == torch.float32
    worst = float(difference.max() if exact else difference.median())
    if not own.isfinite().all():
        raise LoadError(
            f"{name} computes {'NaN' if own.isnan().any() else 'infinite logits'} from ordinary tokens, by itself too: "
            "its weights are damaged, its config has a value that cannot be, or numbers leave the range of "
            f"{str(dtype).removeprefix('torch.')} (--dtype float32 has the widest)"
        )
    limit = _TOLERANCE_32_BIT if exact else _TOLERANCE_8_BIT if quantized else _TOLERANCE_16_BIT
    if not worst <= limit:
        raise LoadError(
            f"{name} gives other results over a paged KV cache than by itself (relative difference {worst:.1e}, limit "
            f"{limit:.0e}): it keeps state between steps, or attends in a way that the worker does not know"
        )


def check_same_bits(name: str, mixed: list[Tensor], alone: list[Tensor]) -> None:
    """LoadError unless two runs of the probe sequences gave the same logits bit for bit."""
    for one, other in zip(mixed, alone, strict=True):
        if not torch.equal(one, other):
            at = int((one != other).any(dim=-1).nonzero()[0, 0])
            raise LoadError(
                f"batch-invariant mode does not work for {name} here: token {at} of a test sequence got other logits "
                "in another batch; try float32, or at most 2 CPU threads"
            )
