"""The kernels of batch-invariant mode for CUDA, on a CPU. test_row_kernels.py runs these tests in a process of their
own, whose Triton interprets: pytest collects them only when it is given this file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tandem.worker import invariance
from tandem.worker.row_kernels import RowKernels

from support import triton_interpreter
from support.attention import Cached, dense
from support.paged import Sequences, load_tiny, random_tokens
from support.tiny_models import ARCHITECTURES, VOCAB

assert triton_interpreter.ON, f"needs {triton_interpreter.VARIABLE}=1 from the start of the process"
QUICK = ("gemma2", "qwen3_moe")
some_architectures = pytest.mark.parametrize(
    "arch",
    [*QUICK, *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES if arch not in QUICK)],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("depth", "width"), [(64, 90), (100, 130)])
def test_products_are_products_whatever_the_rows(depth: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(70, depth).to(dtype)
    layer = nn.Linear(depth, width).to(dtype)
    with torch.no_grad():
        exact = nn.functional.linear(rows.double(), layer.weight.double(), layer.bias.double())
        with RowKernels():
            whole = layer(rows[None])[0]
            for count in (1, 2, 17, 65):
                assert torch.equal(layer(rows[3 : 3 + count]), whole[3 : 3 + count])
    exactness = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(whole.double(), exact, rtol=exactness, atol=exactness)


def test_grouped_products_are_products_whatever_the_rows() -> None:
    from tandem.worker.invariant_kernels import grouped_product

    torch.manual_seed(0)
    rows, weight = torch.randn(41, 40), torch.randn(6, 50, 40).transpose(1, 2)
    ends = [0, 3, 3, 37, 38, 41]
    whole = grouped_product(rows, weight, torch.tensor(ends, dtype=torch.int32))
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        torch.testing.assert_close(whole[start:end], rows[start:end] @ weight[group], rtol=1e-4, atol=1e-4)
        if end > start:
            own = torch.tensor([0] * group + [1] * (6 - group), dtype=torch.int32)
            assert torch.equal(grouped_product(rows[end - 1 : end], weight, own)[0], whole[end - 1])


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda v: v.sum(-1),
    "mean": lambda v: v.mean((-2, -1), keepdim=True),
    "mean, not of the last": lambda v: v.mean(1, keepdim=True),
    "sum, as experts are": lambda v: v.sum(dim=1),
    "of 16 bits": lambda v: v.to(torch.bfloat16).sum(-1, dtype=torch.float32),
    "softmax": lambda v: nn.functional.softmax(v, dim=-1),
    "softmax of 16 bits": lambda v: nn.functional.softmax(v.to(torch.bfloat16), dim=-1, dtype=torch.float32),
    "softmax, not of the last": lambda v: v[:, :, :9].softmax(1),
    "log_softmax": lambda v: v.log_softmax(-1),
    "layer_norm": lambda v: nn.functional.layer_norm(v, v.shape[-1:], v[0, 0], v[0, 1], 1e-5),
    "rms_norm": lambda v: nn.functional.rms_norm(v, v.shape[-1:], v[0, 0], 1e-5),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_torchs_whatever_the_rows(name: str) -> None:
    torch.manual_seed(0)
    values, way = torch.randn(3, 4, 1_100), REDUCTIONS[name]
    with torch.no_grad():
        expected = way(values)
        with RowKernels():
            whole = way(values)
            if "norm" not in name:
                assert torch.equal(way(values[1:2]), whole[1:2])
    assert whole.dtype == expected.dtype
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "dim", "value_dim", "window", "softcap", "dtype", "small"),
    [
        (4, 2, 32, 32, None, None, torch.float32, False),
        (7, 1, 24, 16, 20, 5.0, torch.float32, False),
        (20, 1, 16, 16, 5, None, torch.float32, False),
        (4, 1, 16, 16, 70, None, torch.bfloat16, False),
        (2, 2, 16, 16, None, None, torch.float32, True),
    ],
)
def test_a_query_attends_to_the_same_bits_decoding_and_in_any_chunk(
    query_heads: int, kv_heads: int, dim: int, value_dim: int, window: int | None, softcap: float | None,
    dtype: torch.dtype, small: bool,
) -> None:  # fmt: skip
    torch.manual_seed(1)
    cached = Cached((1, 33, 80), query_heads, kv_heads, dim, dtype, small, torch.device("cpu"), value_dim)
    options: dict[str, Any] = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    whole = [cached.attend([(row, 0, length)], 0, **options) for row, length in enumerate(cached.lengths)]
    exactness = 1e-4 if dtype == torch.float32 else 2e-2
    for row, got in enumerate(whole):
        torch.testing.assert_close(got.float(), dense(cached, row, **options), rtol=exactness, atol=exactness)
    for spans, singles in (
        ([(2, 79, 80), (1, 0, 1), (0, 0, 1)], 3),
        ([(1, 31, 32), (2, 3, 6), (0, 0, 1), (1, 32, 33)], 1),
        ([(2, 50, 71), (1, 30, 33)], 0),
    ):
        got = cached.attend(spans, singles, **options).split([end - start for _, start, end in spans])
        for (row, start, end), part in zip(spans, got, strict=True):
            assert torch.equal(part, whole[row][start:end]), (spans, row)


@some_architectures
def test_a_model_gives_transformers_logits_and_the_same_bits_in_any_chunks(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that takes a CPU for a GPU: its own code, the mode's kernels."""
    model, own = load_tiny(arch, tmp_path)
    monkeypatch.setattr(invariance, "mode_for", lambda _device: RowKernels())
    for name, value in {"batch_invariant": True, "_by_row_kernels": True, "attention_backend": "invariant"}.items():
        monkeypatch.setattr(model, name, value)
    prompts = [random_tokens(3, VOCAB, 0), random_tokens(29, VOCAB, 1)]

    def computed(steps: list[list[tuple[int, int]]], block_size: int) -> list[Tensor]:
        sequences = Sequences(model, block_size=block_size)
        for prompt in prompts:
            sequences.add(prompt)
        parts = [sequences.step(pieces) for pieces in steps]
        return [torch.cat([part[row] for part in parts if row in part]) for row in range(len(prompts))]

    whole = computed([[(0, 3), (1, 29)]], 16)
    for prompt, logits in zip(prompts, whole, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, own(torch.tensor([prompt])).logits[0], rtol=1e-3, atol=1e-3)
    pieces = computed([[(1, 1)], [(1, 17), (0, 2)], [(1, 1), (0, 1)], [(1, 10)]], 8)
    assert all(torch.equal(one, other) for one, other in zip(pieces, whole, strict=True))
    assert torch.equal(model.log_softmax(whole[1])[5], model.log_softmax(whole[1][5:6])[0])
