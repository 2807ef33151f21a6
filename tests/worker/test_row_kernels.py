"""Batch-invariant mode for CUDA as far as it can be tried without a GPU: what it takes and refuses, its kernels in
Triton's interpreter, in a process of their own, and that they compile for Hopper."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tandem.worker
from tandem.worker import invariance
from tandem.worker.inspection import make_batch
from tandem.worker.row_kernels import RowKernels
from tandem.worker.sources import LoadError

from support import plain_kernels, triton_interpreter
from support.paged import load, random_tokens
from support.tiny_models import ARCHITECTURES, VOCAB, tiny_config
from support.zoo import ZOO, zoo_model

pytestmark = pytest.mark.thorough

OF_A_KIND = ("deepseek_v3: latent attention", "gpt2: learned positions", "jetmoe", "olmo")
LACKING = {"jetmoe": "aten::index_add", "phimoe: windows told by masks alone": "aten::max"}
"""JetMoE adds experts up by atomic operations, PhiMoE asks for the last position of the batch."""
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


def test_all_of_it_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_row_kernels.py")
    triton_interpreter.run("pytest", "-q", "-p", "no:cacheprovider", str(file))


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Triton's own code, from Python 3.13 on
        made: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return made


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
