"""Triton kernels against the formulas that they stand for, at sizes around every limit, in and out of step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem.worker import operators
from tandem.worker.attention.ops import rotate

from support.cuda import random

pytestmark = pytest.mark.gpu

COUNTS = (1, 2, 15, 16, 17, 32)


def close(got: Tensor, expected: Tensor) -> bool:
    """As near as two ways to round in 16 bits come."""
    return bool((got.float() - expected.float()).norm() <= 4e-3 * expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("width", "depth"), [(4096, 4096), (8192, 1024), (4096, 14336), (16384, 512)])
def test_products(width: int, depth: int, dtype: torch.dtype) -> None:
    from tandem.worker import product_kernels

    weight = random(width, depth, scale=0.02, dtype=dtype)
    for count in COUNTS:
        rows = random(count, depth, dtype=dtype, seed=count)
        assert product_kernels.takes_product(rows, weight)
        got = product_kernels.product(rows, weight)
        assert close(got, rows.double() @ weight.double().t())
        # Parts of a sum arrive in any order, and are added up in one.
        assert all(torch.equal(product_kernels.product(rows, weight), got) for _ in range(20))
    assert not any(arrived.any() for _, arrived in product_kernels._scratches.values())


def test_products_that_are_left_to_the_library() -> None:
    from tandem.worker import product_kernels

    assert not product_kernels.takes_product(random(33, 4096), random(4096, 4096))
    assert not product_kernels.takes_product(random(8, 4096), random(4100, 4096))
    assert not product_kernels.takes_product(random(8, 4096), random(640, 4096))
    for count, width, depth in [(33, 4096, 4096), (8, 4100, 96), (8, 640, 4096)]:
        rows, weight = random(count, depth), random(width, depth, scale=0.02)
        assert close(operators.product(rows, weight), rows.double() @ weight.double().t())


@pytest.mark.parametrize(("width", "depth"), [(14336, 4096), (64, 64), (192, 320)])
def test_gated_products(width: int, depth: int) -> None:
    weight = random(2 * width, depth, scale=0.05)
    for count in (*COUNTS, 33, 100):
        rows = random(count, depth, seed=count)
        gate, up = (rows.double() @ weight.double().t()).chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
        got = operators.gated_product(rows, weight).float()
        assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_the_likeliest_is_the_lowest_among_equals() -> None:
    weight = random(64 * 40, 256, scale=0.05)
    weight[1_900], weight[70] = weight[7], weight[7]
    for count in (*COUNTS, 33):
        rows = random(count, 256, seed=count)
        rows[-1] = weight[7] * 50
        got = operators.likeliest(rows, weight)
        logits = rows.double() @ weight.double().t()
        chosen = logits.gather(1, got[:, None]).squeeze(1)
        # Rounding may make the runner-up an equal; never more than that.
        assert (chosen >= logits.max(dim=1).values - 0.01 * logits.abs().max()).all()
        assert int(got[-1]) == 7


@pytest.mark.parametrize("width", [64, 100, 4096, 5120])
def test_sums_with_a_norm(width: int) -> None:
    for count in (1, 5, 300):
        left, right, weight = random(count, width, seed=1), random(count, width, seed=2), random(width, seed=3)
        total, normed = operators.add_norm(left, right, weight, 1e-5)
        assert torch.equal(total, left + right)
        wide = total.double()
        expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
        assert (normed.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize(("query_heads", "kv_heads", "dim"), [(32, 8, 128), (4, 2, 64), (12, 3, 80), (9, 1, 256)])
def test_rotation_and_cache(query_heads: int, kv_heads: int, dim: int) -> None:
    from tandem.worker import kernels

    for tokens in (1, 7, 130):
        merged = random(tokens, (query_heads + 2 * kv_heads) * dim, seed=tokens)
        query, key, value = (
            part.unflatten(1, (-1, dim))
            for part in merged.split([query_heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        )
        cos, sin = random(tokens, dim, seed=5), random(tokens, dim, seed=6)
        slots = torch.randperm(200, device="cuda")[:tokens]
        keys, values = torch.zeros(2, 200, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
        got = kernels.rotate_append(query, key, value, cos, sin, slots, keys, values)
        assert close(got, rotate(query.float(), cos.float(), sin.float()))
        assert close(keys[slots], rotate(key.float(), cos.float(), sin.float()))
        assert torch.equal(values[slots], value)
        untouched = torch.ones(200, dtype=torch.bool, device="cuda")
        untouched[slots] = False
        assert not keys[untouched].any()
        assert not values[untouched].any()


def test_the_opening_of_a_decode_step() -> None:
    from tandem.worker import kernels

    slots, width, block_size = 6, 600, 4
    table = torch.arange((slots + 1) * width, dtype=torch.int32, device="cuda").view(slots + 1, width)
    scratch = 99_999
    table[slots] = scratch
    length = torch.tensor([0, 3, 7, 8, 2000, 5, 0], dtype=torch.int32, device="cuda")
    last_token = torch.arange(100, 107, device="cuda")
    row_slot = torch.tensor([1, 3, 4, 6, 6], dtype=torch.int32, device="cuda")  # the last two only fill up
    grow_column = torch.tensor([-1, 2, 500, -1, -1], dtype=torch.int32, device="cuda")
    grow_block = torch.tensor([0, 70_001, 70_002, 0, 0], dtype=torch.int32, device="cuda")
    expected_table = table.clone()
    expected_table[3, 2], expected_table[4, 500] = 70_001, 70_002
    lengths = [3, 8, 2000, 0, 0]
    long = torch.zeros(3, 5, dtype=torch.int64, device="cuda")
    kv_lens = torch.zeros(5, dtype=torch.int32, device="cuda")
    kernels.open_decode(
        row_slot=row_slot,
        grow_column=grow_column,
        grow_block=grow_block,
        block_table=table,
        length=length,
        last_token=last_token,
        token_ids=long[0],
        positions=long[1],
        kv_slots=long[2],
        kv_lens=kv_lens,
        block_size=block_size,
    )
    assert torch.equal(table, expected_table)
    assert length.tolist() == [0, 4, 7, 9, 2001, 5, 0]
    assert long[0].tolist() == [101, 103, 104, 106, 106]
    assert long[1].tolist() == lengths
    assert kv_lens.tolist() == [count + 1 for count in lengths]
    rows = [expected_table[int(slot)] for slot in row_slot.tolist()]
    blocks = [int(row[count // block_size]) for row, count in zip(rows, lengths, strict=True)]
    assert long[2].tolist() == [
        block * block_size + count % block_size for block, count in zip(blocks, lengths, strict=True)
    ]


def near(got: Tensor, expected: Tensor) -> bool:
    """Tensor cores add up products of 8 bits with fewer bits than float32 has: the error grows with the sum's length,
    and is far below that of rounding to 8 bits (about 0.03)."""
    return bool((got.double() - expected).norm() <= 1e-2 * expected.norm())


@pytest.mark.parametrize(("width", "depth"), [(6144, 4096), (4096, 14336), (64, 128), (192, 384)])
def test_products_in_8_bits(width: int, depth: int) -> None:
    from tandem.worker import kernels, product_kernels

    weight, scale = operators.quantize_rows_plain(random(width, depth, scale=0.02))
    for count in (*COUNTS, 33, 64, 65, 300):
        rows = random(count, depth, seed=count) * 3
        quantized, of_row = kernels.quantize_rows(rows)
        plain, plain_scale = operators.quantize_rows_plain(rows)
        assert torch.equal(of_row, plain_scale)
        assert int((quantized.float() != plain.float()).sum()) <= 2 + rows.numel() // 1000  # ties after a division
        exact = (quantized.double() * of_row.double()[:, None]) @ (weight.double() * scale.double()[:, None]).t()
        for dtype in (torch.bfloat16, torch.float16):
            got = operators.scaled_product(quantized, of_row, weight, scale, dtype)
            assert got.dtype == dtype
            assert near(got, exact)
        gate, up = exact.chunk(2, dim=1)
        gated = operators.scaled_gated_product(quantized, of_row, weight, scale, torch.bfloat16)
        assert near(gated, torch.nn.functional.silu(gate) * up)
        if product_kernels.takes_scaled_product(quantized, weight):
            first = product_kernels.scaled_product(quantized, of_row, weight, scale, torch.bfloat16)
            assert all(
                torch.equal(product_kernels.scaled_product(quantized, of_row, weight, scale, torch.bfloat16), first)
                for _ in range(10)
            )


def test_a_norm_that_quantises() -> None:
    from tandem.worker import kernels

    for width in (64, 4096, 5000):
        left, right, weight = random(7, width), random(7, width, seed=1), random(width, seed=2)
        total, normed = kernels.add_norm(left, right, weight, 1e-5)
        own_total, quantized, scale = kernels.add_norm_quantize(left, right, weight, 1e-5)
        expected, expected_scale = kernels.quantize_rows(normed)
        assert torch.equal(own_total, total)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))


def test_keys_and_values_in_8_bits() -> None:
    from tandem.worker import kernels

    tokens, query_heads, kv_heads, dim = 9, 8, 2, 128
    query, key = random(tokens, query_heads, dim), random(tokens, kv_heads, dim, scale=300.0)
    value = random(tokens, kv_heads, dim, scale=300.0, seed=3)
    cos, sin = random(tokens, dim, seed=5), random(tokens, dim, seed=6)
    slots = torch.randperm(50, device="cuda")[:tokens]
    plain, small = (
        [torch.zeros(50, kv_heads, dim, dtype=dtype, device="cuda") for _ in range(2)]
        for dtype in (torch.bfloat16, torch.float8_e4m3fn)
    )
    for keys, values in (plain, small):
        kernels.rotate_append(query, key, value, cos, sin, slots, keys, values)
    for wide, narrow in zip(plain, small, strict=True):
        assert torch.equal(narrow.float(), wide.float().clamp(-448, 448).to(torch.float8_e4m3fn).float())
