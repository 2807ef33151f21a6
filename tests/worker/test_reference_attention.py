"""Reference attention against attention written out, and what its tiles promise."""

import random

import pytest
import torch
from torch import Tensor

from tandem.worker.attention.flashinfer import page_indices
from tandem.worker.attention.reference import TILE, ReferenceAttention
from tandem.worker.inspection import dense_attention, make_batch
from tandem.worker.kv_cache import KVCache, LayerKV

CPU = torch.device("cpu")
# (tokens in the cache before, tokens of the step), decode rows first
ROWS = [(0, 1), (127, 1), (128, 1), (300, 1), (0, 5), (120, 20), (250, 33)]
DECODE_ROWS = 4


def layer(**changes: object) -> LayerKV:
    given: dict[str, object] = {
        "layer_idx": 0,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "value_dim": 16,
        "window": None,
        "scale": 0.25,
        "softcap": None,
    }
    return LayerKV(**{**given, **changes})  # type: ignore[arg-type]


LAYERS = [
    layer(),
    layer(window=1),
    layer(window=7),
    layer(window=130),
    layer(softcap=2.0, window=50),
    layer(query_heads=6, kv_heads=1, head_dim=24, scale=0.1),
    layer(query_heads=3, kv_heads=3, value_dim=8),
]


class Case:
    """Sequences with known queries, keys and values, their past in the cache and their last tokens in a batch."""

    def __init__(self, spec: LayerKV, block_size: int, seed: int = 0, fill: float = 0.0) -> None:
        torch.manual_seed(seed)
        self.spec = spec
        needed = [-(-(before + count) // block_size) for before, count in ROWS]
        self.cache = KVCache((spec,), sum(needed) + 5, block_size, dtype=torch.float32, device=CPU)
        self.cache.keys[0].fill_(fill)
        self.cache.values[0].fill_(fill)
        ids = list(range(sum(needed) + 5))
        random.Random(seed).shuffle(ids)
        self.sequences: list[tuple[Tensor, Tensor, Tensor]] = []
        rows = []
        for (before, count), blocks in zip(ROWS, needed, strict=True):
            length = before + count
            table = [ids.pop() for _ in range(blocks)]
            query = torch.randn(length, spec.query_heads, spec.head_dim)
            key = torch.randn(length, spec.kv_heads, spec.head_dim)
            value = torch.randn(length, spec.kv_heads, spec.value_dim)
            at = torch.arange(before)
            slots = torch.tensor(table)[at // block_size] * block_size + at % block_size
            self.cache.append(0, slots, key[:before], value[:before])
            self.sequences.append((query, key, value))
            rows.append((torch.zeros(length, dtype=torch.int64), table, before, length))
        self.batch = make_batch(rows, DECODE_ROWS, block_size, self.cache.scratch_block, CPU)

    def attend(self, *, per_query: bool) -> list[Tensor]:
        counts = [count for _, count in ROWS]
        query, key, value = (
            torch.cat([parts[i][-count:] for parts, count in zip(self.sequences, counts, strict=True)])
            for i in range(3)
        )
        step = ReferenceAttention(self.cache, per_query=per_query).begin(self.batch)
        return list(step.attend(0, query, key, value).split(counts))

    def expected(self) -> list[Tensor]:
        return [
            dense_attention(self.spec, *parts)[-count:] for parts, (_, count) in zip(self.sequences, ROWS, strict=True)
        ]


@pytest.mark.parametrize("spec", LAYERS, ids=str)
@pytest.mark.parametrize("per_query", [True, False])
def test_equals_attention_written_out(spec: LayerKV, per_query: bool) -> None:
    case = Case(spec, block_size=16)
    for found, expected in zip(case.attend(per_query=per_query), case.expected(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_block_size_leaves_the_bits(spec: LayerKV) -> None:
    found = [Case(spec, block_size).attend(per_query=True) for block_size in (8, 16, 32)]
    for parts in zip(*found, strict=True):
        assert torch.equal(parts[0], parts[1])
        assert torch.equal(parts[0], parts[2])


@pytest.mark.parametrize("per_query", [True, False])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_what_a_former_owner_left_does_not_show(per_query: bool, garbage: float) -> None:
    """Blocks hold garbage beyond a row's tokens: a request that overflowed must not spoil those that come after."""
    spec = layer(window=40)
    clean, dirty = Case(spec, 16), Case(spec, 16, fill=garbage)
    for found, expected in zip(dirty.attend(per_query=per_query), clean.attend(per_query=per_query), strict=True):
        assert torch.equal(found, expected)


def test_tiles_beyond_every_query_leave_the_bits() -> None:
    """As when a captured graph's block tables are wider than today's rows."""
    case = Case(layer(), 16)
    expected = case.attend(per_query=True)
    wider = torch.nn.functional.pad(case.batch.block_tables, (0, 40), value=case.cache.scratch_block)
    case.batch.block_tables = wider
    step = ReferenceAttention(case.cache, per_query=True).begin(case.batch)
    step.by_host, step.prefill, step.scattered = False, [], case.batch.num_tokens  # as on a GPU
    counts = [count for _, count in ROWS]
    query, key, value = (
        torch.cat([parts[i][-count:] for parts, count in zip(case.sequences, counts, strict=True)]) for i in range(3)
    )
    for found, wanted in zip(step.attend(0, query, key, value).split(counts), expected, strict=True):
        assert torch.equal(found, wanted)


def test_dense_attention_against_torch() -> None:
    """The yardstick itself."""
    torch.manual_seed(1)
    query, key, value = torch.randn(30, 4, 16), torch.randn(30, 2, 16), torch.randn(30, 2, 16)
    q, k, v = (given.transpose(0, 1)[None] for given in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(dense_attention(layer(), query, key, value), expected[0].transpose(0, 1))


def test_block_sizes_that_do_not_divide_a_tile_are_refused() -> None:
    cache = KVCache((layer(),), 4, 24, dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match=f"divides {TILE}, got 24"):
        ReferenceAttention(cache, per_query=True)


def test_page_indices_are_the_rows_blocks_in_order() -> None:
    tables = [[7, 3, 9], [1], [4, 8]]
    ends = [33, 5, 32]
    rows = [(torch.zeros(end, dtype=torch.int64), table, end - 1, end) for table, end in zip(tables, ends, strict=True)]
    batch = make_batch(rows, 3, 16, 10, CPU)
    assert page_indices(batch, 0, 6).tolist() == [7, 3, 9, 1, 4, 8]
    assert page_indices(batch, 1, 3).tolist() == [1, 4, 8]
    assert page_indices(batch, 0, 6).dtype == torch.int32
