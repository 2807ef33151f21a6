"""Batch-invariant mode on CUDA: a row's bits in any company, of kernels, of models and (`systems`) of whole systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.worker.inspection import make_batch
from tandem.worker.logprobs import tell
from tandem.worker.sampler import SamplingColumns, sample

from support.attention import Cached, dense
from support.cuda import no_waiting, replayed
from support.exactness import TIGHT, check_systems
from support.identity import Case, cases, check_cell
from support.paged import check_any_batch, load, load_tiny, random_tokens
from support.tiny_models import ARCHITECTURES, VOCAB, save_tiny

pytestmark = pytest.mark.gpu

COUNTS = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 299, 300)
CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def limit(dtype: torch.dtype) -> float:
    return 3e-5 if dtype == torch.float32 else 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("depth", "width"), [(64, 160), (4096, 1024), (1000, 300), (2048, 17_000), (14_336, 512)])
def test_a_row_of_a_product_is_the_same_in_any_batch(depth: int, width: int, dtype: torch.dtype) -> None:
    from tandem.worker.invariant_kernels import product

    torch.manual_seed(0)
    rows = torch.randn(300, depth, device="cuda").to(dtype)
    weight, bias = torch.randn(width, depth, device="cuda").to(dtype), torch.randn(width, device="cuda").to(dtype)
    whole = product(rows, weight.t(), bias)
    assert relative(whole, rows.double() @ weight.double().t() + bias.double()) < limit(dtype)
    for count in COUNTS:
        for start in (0, 1, 300 - count):
            part = product(rows[start : start + count], weight.t(), bias)
            assert torch.equal(part, whole[start : start + count]), (count, start)
    backwards = torch.arange(299, -1, -1, device="cuda")
    assert torch.equal(product(rows[backwards], weight.t(), bias), whole[backwards])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_grouped_product_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    from tandem.worker.invariant_kernels import grouped_product

    torch.manual_seed(0)
    experts, depth, width = 60, 512, 384
    weight = torch.randn(experts, width, depth, device="cuda").to(dtype).transpose(1, 2)
    rows = torch.randn(300, depth, device="cuda").to(dtype)
    expert = torch.randint(0, experts, (300,), device="cuda").sort().values
    ends = torch.bincount(expert, minlength=experts).cumsum(0).to(torch.int32)
    whole = grouped_product(rows, weight, ends)
    exact = torch.stack([rows[i].double() @ weight[e].double() for i, e in enumerate(expert.tolist())])
    assert relative(whole, exact) < limit(dtype)
    for row in range(0, 300, 7):
        own = (torch.arange(experts, device="cuda") >= expert[row]).to(torch.int32)
        assert torch.equal(grouped_product(rows[row : row + 1], weight, own)[0], whole[row])


@pytest.mark.parametrize("width", [1, 8, 64, 1000, 4096, 128_256, 151_937])
def test_sums_and_softmax_of_a_row_are_the_same_in_any_batch(width: int) -> None:
    from tandem.worker.invariant_kernels import column_sums, row_sums, softmax

    torch.manual_seed(0)
    values = torch.randn(300, width, device="cuda") * 3
    exact = values.double()
    ways: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (row_sums, exact.sum(-1)),
        (lambda v: row_sums(v, mean=True), exact.mean(-1)),
        (lambda v: column_sums(v[:, :, None]).flatten(), exact.sum(-1)) if width < 100 else (row_sums, exact.sum(-1)),
        (lambda v: softmax(v, torch.float32), exact.softmax(-1)),
        (lambda v: softmax(v, torch.float32, log=True), exact.log_softmax(-1)),
    ]
    for way, expected in ways:
        whole = way(values)
        torch.testing.assert_close(whole.double(), expected, rtol=1e-4, atol=1e-3)
        for count in COUNTS:
            for start in (0, 1, 300 - count):
                assert torch.equal(way(values[start : start + count]), whole[start : start + count]), (count, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["cache as queries", "cache in 8 bits"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "dim", "value_dim", "window", "softcap"),
    [
        (32, 8, 128, 128, None, None),
        (28, 4, 64, 64, 100, None),
        (8, 8, 256, 256, 65, 30.0),
        (20, 1, 96, 96, None, 5.0),
        (16, 16, 192, 128, None, None),
    ],
)
def test_a_query_attends_to_the_same_bits_decoding_and_in_any_chunk(
    query_heads: int, kv_heads: int, dim: int, value_dim: int, window: int | None, softcap: float | None, small: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(1)
    cached = Cached((1, 63, 64, 65, 300, 1_111), query_heads, kv_heads, dim, dtype, small, CUDA, value_dim)
    options: dict[str, Any] = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    whole = [cached.attend([(row, 0, length)], 0, **options) for row, length in enumerate(cached.lengths)]
    for row, got in enumerate(whole):
        assert relative(got, dense(cached, row, **options)) < (1e-4 if dtype == torch.float32 else 2e-2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        order = torch.randperm(len(whole), generator=generator).tolist()
        singles = int(torch.randint(0, len(whole) + 1, (1,), generator=generator))
        spans = []
        for place, row in enumerate(order):
            start = int(torch.randint(0, cached.lengths[row], (1,), generator=generator))
            most = 1 if place < singles else cached.lengths[row] - start
            spans.append((row, start, start + int(torch.randint(1, most + 1, (1,), generator=generator))))
        got = cached.attend(spans, singles, **options).split([end - start for _, start, end in spans])
        for (row, start, end), part in zip(spans, got, strict=True):
            assert torch.equal(part, whole[row][start:end]), (spans, row)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chunks_company_preemption_and_block_size_leave_the_bits(arch: str, dtype: str, tmp_path: Path) -> None:
    model, own = load_tiny(arch, tmp_path, device="cuda", dtype=dtype, batch_invariant=True)
    assert model.attention_backend == "invariant"
    check_any_batch(model, own, tolerance=1e-3 if dtype == "float32" else None)


@pytest.mark.parametrize("arch", ["gemma2", "qwen3_moe"])
def test_a_decode_step_waits_for_nothing_and_can_be_captured(arch: str, tmp_path: Path) -> None:
    model, _ = load_tiny(arch, tmp_path, device="cuda", dtype="bfloat16", batch_invariant=True)
    for captured, wanted in replayed(model):
        assert torch.equal(captured, wanted)
    tokens = torch.tensor(random_tokens(60, VOCAB, 0), device="cuda")
    batch = make_batch([(tokens, [3, 4], 20, 21), (tokens, [7, 1, 9], 0, 33)], 1, 16, 40, model.device)
    with no_waiting():
        model.logits(model.hidden(batch))


def test_sampling_and_log_probabilities_do_not_depend_on_company(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, device="cuda", batch_invariant=True)
    torch.manual_seed(0)
    n, vocab = 48, 50_001  # an odd number: not every row begins at an aligned address
    logits = torch.randn(n, vocab, device="cuda") * 2
    numbers = torch.arange(n, device="cuda", dtype=torch.int32)
    columns = SamplingColumns(
        temperature=torch.full((n,), 0.8, device="cuda"),
        top_k=numbers % 3 * 50,
        top_p=torch.where(numbers % 2 == 0, 1.0, 0.95),
        seed=numbers.long(),
        sample_index=torch.zeros_like(numbers),
        position=numbers,
        min_p=torch.where(numbers % 5 == 0, 0.01, 0.0),
    )
    tokens = sample(logits, columns)
    told = tell(logits, tokens, 5, model.log_softmax)
    for row in range(n):
        own = slice(row, row + 1)
        fields = ("temperature", "top_k", "top_p", "seed", "sample_index", "position", "min_p")
        single = SamplingColumns(**{name: getattr(columns, name)[own] for name in fields})
        assert torch.equal(sample(logits[own], single), tokens[own])
        assert torch.equal(tell(logits[own], tokens[own], 5, model.log_softmax), told[own])


SYSTEMS: dict[str, dict[str, Any]] = {
    "eager, tight, lookahead 0": {**TIGHT, "lookahead": 0, "enforce_eager": True},
    "graphs, tight, lookahead 1": {**TIGHT, "lookahead": 1},
    "graphs, tight, lookahead 2": {**TIGHT, "lookahead": 2, "max_cudagraph_capture_size": 3},
}


@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("gemma2", "bfloat16"), ("qwen3_moe", "bfloat16")]
)
def test_systems_give_the_same_bits_alone_in_a_crowd_and_preempted(tmp_path: Path, arch: str, dtype: str) -> None:
    save_tiny(arch, tmp_path)
    check_systems({"model": str(tmp_path), "device": "cuda", "dtype": dtype, "batch_invariant": True}, SYSTEMS)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    with cases(tmp_path_factory.mktemp) as made:
        yield made


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize(("lookahead", "cache"), [(0, "roomy"), (2, "tight")])
def test_systems_give_what_transformers_gives(
    case_of: Callable[[str], Case], arch: str, lookahead: int, cache: str
) -> None:
    check_cell(case_of(arch), (arch, lookahead, 16, cache), device="cuda", dtype="float32", batch_invariant=True)
