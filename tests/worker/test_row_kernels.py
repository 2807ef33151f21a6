"""Batch-invariant mode for CUDA as far as it can be tried without a GPU: what it takes and refuses, its kernels in
Triton's interpreter, in a process of their own, and that they compile for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tandem.worker
from tandem.worker import invariance
from tandem.worker.inspection import make_batch
from tandem.worker.loading import LoadError
from tandem.worker.row_kernels import RowKernels

from support import plain_kernels, triton_interpreter
from support.attention import Cached, dense
from support.paged import Sequences, load, load_tiny, random_tokens
from support.tiny_models import ARCHITECTURES, VOCAB, tiny_config
from support.zoo import ZOO, zoo_model

interpreted = pytest.mark.skipif(
    not (triton_interpreter.AVAILABLE and triton_interpreter.ON),
    reason=f"runs in Triton's interpreter, with {triton_interpreter.VARIABLE}=1",
)
compiled = pytest.mark.skipif(
    not triton_interpreter.AVAILABLE or triton_interpreter.ON, reason="runs with Triton's compiler"
)
OF_A_KIND = ("deepseek_v3: latent attention", "gpt2: learned positions", "jetmoe", "olmo")
LACKING = {"jetmoe": "aten::index_add", "phimoe: windows told by masks alone": "aten::max"}
"""JetMoE adds experts up by atomic operations, PhiMoE asks for the last position of the batch."""
QUICK = ("gemma2", "qwen3_moe")
some_architectures = pytest.mark.parametrize(
    "arch",
    [*QUICK, *(pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES if arch not in QUICK)],
)
HEADS = torch.ones(1, 2, 5, 8)
MASK = torch.tensor([True, False, True])
REFUSED: dict[str, Callable[[], Any]] = {
    r"aten::bmm|\[3, 5, 6\] and \[3, 6, 4\]": lambda: torch.ones(3, 5, 6) @ torch.ones(3, 6, 4),
    "aten::index_add": lambda: torch.zeros(4).index_add(0, torch.tensor([1, 1]), torch.ones(2)),
    "aten::cumsum": lambda: torch.ones(3, 4).cumsum(-1),
    "aten::nonzero": lambda: torch.ones(3).nonzero(),
    "aten::_local_scalar_dense": lambda: torch.ones(3).sum(dtype=torch.int64).item(),
    "aten::mv": lambda: torch.mv(torch.ones(3, 4), torch.ones(4)),
    "aten::convolution": lambda: nn.functional.conv1d(torch.ones(1, 3, 9), torch.ones(2, 3, 3)),
    "aten::linalg_vector_norm": lambda: torch.linalg.vector_norm(torch.ones(3, 4), dim=-1),
    r"aten::index\.Tensor by a mask": lambda: torch.ones(3)[MASK],
    "aten::index_put_ by a mask": lambda: torch.ones(3, 4).index_put_((MASK,), torch.ones(4)),
    "aten::index_put by adding up": lambda: torch.ones(3).index_put((torch.tensor([1, 1]),), torch.ones(2), True),
    r"aten::scatter\.reduce": lambda: torch.ones(3).scatter(0, torch.tensor([1, 1]), torch.ones(2), reduce="add"),
    "aten::_to_copy to the host": lambda: torch.ones(3, device="meta").cpu(),
    "aten::copy_ to the host": lambda: torch.ones(3).copy_(torch.ones(3, device="meta")),
    "scaled_dot_product": lambda: nn.functional.scaled_dot_product_attention(HEADS, HEADS, HEADS),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_has_no_version_of_its_own_is_refused_by_name(named: str) -> None:
    with torch.no_grad(), RowKernels(), pytest.raises(LoadError, match=named):
        REFUSED[named]()


def test_what_does_not_depend_on_other_rows_passes() -> None:
    values = torch.tensor([[2.0, 5.0, 5.0, 1.0]])
    with torch.no_grad(), RowKernels():
        assert torch.topk(values, 3).indices.tolist() == [[1, 2, 0]]
        assert torch.argsort(values, dim=-1).tolist() == [[3, 0, 1, 2]]
        assert (values > 1).sum(-1).tolist() == [3]
        assert torch.ones(3, dtype=torch.int32).cumsum(0).tolist() == [1, 2, 3]
        filled = torch.zeros(3)
        filled[MASK] = 5.0
        assert filled[torch.tensor([2, 1])].tolist() == [5, 0]
        assert torch.zeros(2).scatter(0, torch.tensor([1]), torch.ones(1)).tolist() == [0, 1]
        outer = torch.matmul(torch.ones(3, 5, 1), torch.ones(3, 1, 4))
        assert outer.shape == (3, 5, 4)
        nn.functional.silu(values).mul_(2).amax(-1).add(1).to(torch.bfloat16).view(torch.int16)


def test_attention_goes_by_its_own_rules() -> None:
    mode = RowKernels()
    with torch.no_grad(), mode, mode.own_work():
        assert (torch.ones(2, 3, 4) @ torch.ones(2, 4, 5)).sum() == 2 * 3 * 5 * 4


@pytest.mark.parametrize(
    "name",
    [*ARCHITECTURES, *(name if name in OF_A_KIND else pytest.param(name, marks=pytest.mark.slow) for name in ZOO)],
)
def test_what_architectures_ask_for_is_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain torch in the kernels' place."""
    config = tiny_config(name) if name in ARCHITECTURES else ZOO[name]()
    zoo_model(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    model.allocate_kv_cache(4, 16)
    tokens = torch.tensor(random_tokens(37, VOCAB, 0))

    def logits() -> Tensor:
        batch = make_batch([(tokens, [2, 0, 1], 0, 37)], 0, 16, model.scratch_block, model.device)
        return model.logits(model.hidden(batch))

    expected = logits()
    monkeypatch.setitem(sys.modules, "tandem.worker.invariant_kernels", plain_kernels)
    monkeypatch.setattr(tandem.worker, "invariant_kernels", plain_kernels, raising=False)
    monkeypatch.setattr(invariance, "mode_for", lambda _device: RowKernels())
    monkeypatch.setattr(model, "batch_invariant", True)
    if name in LACKING:
        with pytest.raises(LoadError, match=LACKING[name]):
            logits()
    else:
        torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not triton_interpreter.AVAILABLE or triton_interpreter.ON, reason="starts itself with Triton")
def test_all_of_it_in_the_interpreter() -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, triton_interpreter.VARIABLE: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]


@interpreted
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


@interpreted
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


@interpreted
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


@interpreted
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


@interpreted
@some_architectures
def test_a_model_gives_transformers_logits_and_the_same_bits_in_any_chunks(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that takes a CPU for a GPU: its own code, the mode's kernels."""
    model, own = load_tiny(arch, tmp_path)
    monkeypatch.setattr(invariance, "mode_for", lambda _device: RowKernels())
    for name, value in {"batch_invariant": True, "_by_row_kernels": True, "attention_backend": "invariant"}.items():
        monkeypatch.setattr(model, name, value)
    prompts = [random_tokens(3, VOCAB, 0), random_tokens(37, VOCAB, 1)]

    def computed(steps: list[list[tuple[int, int]]], block_size: int) -> list[Tensor]:
        sequences = Sequences(model, block_size=block_size)
        for prompt in prompts:
            sequences.add(prompt)
        parts = [sequences.step(pieces) for pieces in steps]
        return [torch.cat([part[row] for part in parts if row in part]) for row in range(len(prompts))]

    whole = computed([[(0, 3), (1, 37)]], 16)
    for prompt, logits in zip(prompts, whole, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, own(torch.tensor([prompt])).logits[0], rtol=1e-3, atol=1e-3)
    pieces = computed([[(1, 1)], [(1, 20), (0, 2)], [(1, 1), (0, 1)], [(1, 15)]], 8)
    assert all(torch.equal(one, other) for one, other in zip(pieces, whole, strict=True))
    assert torch.equal(model.softmax(whole[1])[5], model.softmax(whole[1][5:6])[0])


def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> str:
    """What Triton makes of a kernel for Hopper; of arguments that are not named, 32-bit integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in constants and types.get(name, "").startswith("*")
        },
    )
    options = {"num_warps": warps, "num_stages": stages}
    made: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return made


@compiled
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_products_compile_for_hopper(dtype: torch.dtype, name: str) -> None:
    from tandem.worker import invariant_kernels

    for width in (4_096, 128_256):
        tile = invariant_kernels.tiling(width, dtype)
        types = {"rows": f"*{name}", "weight": f"*{name}", "bias": f"*{name}", "out": f"*{name}"}
        constants = {"BIAS": True, "BAND": 8, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
        constants |= {"WHOLE": True, "weight_depth": 1}
        code = ptx(invariant_kernels._product, types, constants, tile.warps, tile.stages)
        assert ("wgmma.mma_async" in code) == (dtype == torch.bfloat16)
        assert "tf32" not in code


@compiled
@pytest.mark.parametrize(
    ("dtype", "name", "cache"),
    [(torch.bfloat16, "bf16", "bf16"), (torch.bfloat16, "bf16", "fp8e4nv"), (torch.float32, "fp32", "fp32")],
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_attention_compiles_for_hopper(dtype: torch.dtype, name: str, cache: str, dim: int) -> None:
    from tandem.worker.attention import invariant_kernels

    tile = invariant_kernels.shape(dim, dtype)
    types = {"query": f"*{name}", "keys": f"*{cache}", "values": f"*{cache}", "out": f"*{name}", "tables": "*i32"}
    types |= {"lines": "*i32", "row_of_token": "*i64", "positions": "*i64", "scale": "fp32", "softcap": "fp32"}
    constants = {"KV_HEADS": 8, "GROUP": 4, "HEADS": 4, "PARTS": 1, "QUERIES": tile.queries, "BLOCK_SIZE": 16}
    constants |= {"DIM": dim, "VALUE_DIM": dim, "WIDTH": dim, "VALUE_WIDTH": dim, "TILE": tile.keys}
    single = dtype == torch.float32
    constants |= {"WINDOW": True, "SOFTCAP": True, "SINGLE": single, "HALF": cache == "fp8e4nv"}
    code = ptx(invariant_kernels._attend, types, constants, tile.warps, tile.stages)
    assert ("wgmma.mma_async" in code) == (not single)
    assert "tf32" not in code
