"""FlashInfer's attention in bfloat16 against float32 reference attention on the same numbers."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.worker.attention.base import AttentionBackend
from tandem.worker.attention.flashinfer import FlashInferAttention
from tandem.worker.attention.reference import ReferenceAttention
from tandem.worker.batch import Batch
from tandem.worker.inspection import dense_attention, make_batch
from tandem.worker.kv_cache import KVCache, LayerKV

from support.cuda import no_waiting
from support.decode_cases import WAYS

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16
LIMIT = 1e-2
# (tokens in the cache before, tokens of the step), decode rows first
STEPS = {
    "prefill": [(0, 1), (0, 16), (0, 700), (100, 33), (513, 129)],
    "mixed": [(0, 1), (511, 1), (1500, 1), (0, 200), (300, 77)],
    "decode": [(0, 1), (15, 1), (16, 1), (127, 1), (128, 1), (700, 1), (3000, 1)],
}
DECODE_ROWS = {"prefill": 0, "mixed": 3, "decode": 7}
PLAIN = LayerKV(
    layer_idx=0, query_heads=8, kv_heads=2, head_dim=128, value_dim=128, window=None, scale=128**-0.5, softcap=None
)
LAYERS = {
    "64": replace(PLAIN, query_heads=4, kv_heads=4, head_dim=64, value_dim=64, scale=0.125),
    "128": PLAIN,
    "128, seven queries per key": replace(PLAIN, query_heads=28, kv_heads=4),
    "128, window": replace(PLAIN, window=100),
    "128, soft cap": replace(PLAIN, softcap=5.0),
    "256, window and soft cap": replace(
        PLAIN, query_heads=8, kv_heads=4, head_dim=256, value_dim=256, scale=0.0625, window=257, softcap=30.0
    ),
}


class Case:
    """The same sequences in a bfloat16 and a float32 cache, and their last tokens as a batch."""

    def __init__(self, layers: tuple[LayerKV, ...], step: str, lane: int = 0) -> None:
        self.device = torch.device("cuda")
        self.layers = layers
        self.rows = STEPS[step]
        torch.manual_seed(7)
        needed = [-(-(before + count) // BLOCK_SIZE) for before, count in self.rows]
        self.caches = {
            dtype: KVCache(layers, sum(needed) + 9, BLOCK_SIZE, dtype=dtype, device=self.device)
            for dtype in (torch.bfloat16, torch.float32)
        }
        ids = list(range(sum(needed) + 9))
        random.Random(0).shuffle(ids)
        tables = [[ids.pop() for _ in range(blocks)] for blocks in needed]
        rows = [
            (torch.zeros(before + count, dtype=torch.int64, device=self.device), table, before, before + count)
            for (before, count), table in zip(self.rows, tables, strict=True)
        ]
        scratch = self.caches[torch.float32].scratch_block
        self.batch: Batch = make_batch(rows, DECODE_ROWS[step], BLOCK_SIZE, scratch, self.device, lane)
        self.inputs = [self._fill(index, layer, tables) for index, layer in enumerate(layers)]

    def _fill(self, index: int, layer: LayerKV, tables: list[list[int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Whole sequences' queries, keys and values, bfloat16; their pasts are put into both caches."""
        made = []
        for (before, count), table in zip(self.rows, tables, strict=True):
            shape = (before + count, layer.kv_heads, layer.head_dim)
            key, value = (torch.randn(shape, device=self.device).bfloat16() for _ in range(2))
            query = torch.randn(shape[0], layer.query_heads, layer.head_dim, device=self.device).bfloat16()
            at = torch.arange(before, device=self.device)
            slots = torch.tensor(table, device=self.device)[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            for cache in self.caches.values():
                cache.append(index, slots, key[:before], value[:before])
            made.append((query, key, value))
        return made

    def attend(self, backend: AttentionBackend, dtype: torch.dtype, layer: int) -> Tensor:
        counts = [count for _, count in self.rows]
        query, key, value = (
            torch.cat([parts[i][-count:] for parts, count in zip(self.inputs[layer], counts, strict=True)]).to(dtype)
            for i in range(3)
        )
        return backend.begin(self.batch).attend(layer, query, key, value).float()

    def flashinfer(self, lanes: int = 1) -> FlashInferAttention:
        return FlashInferAttention(self.caches[torch.bfloat16], dtype=torch.bfloat16, lanes=lanes, device=self.device)

    def reference(self) -> ReferenceAttention:
        return ReferenceAttention(self.caches[torch.float32], per_query=False)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", LAYERS)
def test_within_a_hundredth_of_float32(name: str, step: str) -> None:
    case = Case((LAYERS[name],), step)
    expected = case.attend(case.reference(), torch.float32, 0)
    dense = torch.cat(
        [
            dense_attention(LAYERS[name], *(part.float() for part in parts))[-count:]
            for parts, (_, count) in zip(case.inputs[0], case.rows, strict=True)
        ]
    )
    torch.testing.assert_close(expected, dense, rtol=1e-4, atol=1e-4)
    found = case.attend(case.flashinfer(), torch.bfloat16, 0)
    assert relative(found, expected) < LIMIT
    worst = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert float(worst.max()) < 3 * LIMIT  # no token is wrong behind a good average


def test_layers_of_several_kinds_and_steps_of_two_lanes_keep_apart() -> None:
    """As with Gemma2 and a lookahead of 1: the second step is planned before the first attends."""
    layers = (PLAIN, replace(PLAIN, layer_idx=1, window=100), replace(PLAIN, layer_idx=2))
    case = Case(layers, "decode")
    # The second step computes the last five tokens of the longer sequences once more, as prefill chunks.
    again = [row for row, (before, _) in enumerate(case.rows) if before > 5]
    tables = case.batch.block_tables.tolist()
    rows = [
        (torch.zeros(sum(case.rows[row]), dtype=torch.int64, device=case.device), tables[row], sum(case.rows[row]) - 5)
        for row in again
    ]
    second = make_batch(
        [(tokens, table, start, start + 5) for tokens, table, start in rows],
        0,
        BLOCK_SIZE,
        case.caches[torch.bfloat16].scratch_block,
        case.device,
        lane=1,
    )
    backend = case.flashinfer(lanes=2)
    steps = [backend.begin(case.batch), backend.begin(second)]
    for layer, spec in enumerate(layers):
        for step, sequences, count in ((steps[0], range(len(case.rows)), 1), (steps[1], again, 5)):
            parts = [case.inputs[layer][row] for row in sequences]
            query, key, value = (torch.cat([part[i][-count:] for part in parts]) for i in range(3))
            found = step.attend(layer, query, key, value).float()
            dense = [dense_attention(spec, q.float(), k.float(), v.float())[-count:] for q, k, v in parts]
            assert relative(found, torch.cat(dense)) < LIMIT


@pytest.mark.parametrize("name", WAYS)
def test_contexts_are_cut_for_each_kind_of_layers(name: str) -> None:
    layers = (PLAIN, replace(PLAIN, layer_idx=1, window=100), replace(PLAIN, layer_idx=2, kv_heads=4))
    case = Case(layers, "decode")
    backend = FlashInferAttention(
        case.caches[torch.bfloat16], dtype=torch.bfloat16, lanes=1, device=case.device, way=WAYS[name]
    )
    pieces = np.empty(backend.cutting.room(len(case.rows)), np.int32)
    backend.cutting.write(case.batch.kv_lens_host, pieces)
    case.batch = replace(case.batch, pieces=torch.from_numpy(pieces).to(case.device))
    for layer in range(len(layers)):
        expected = case.attend(case.reference(), torch.float32, layer)
        assert relative(case.attend(backend, torch.bfloat16, layer), expected) < LIMIT


def test_a_step_waits_for_nothing() -> None:
    case = Case((PLAIN,), "mixed")
    arguments: list[Any] = [case.flashinfer(), torch.bfloat16, 0]
    case.attend(*arguments)  # compiles
    with no_waiting():
        case.attend(*arguments)
