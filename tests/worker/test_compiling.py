"""What is rewritten before a model is compiled computes the same as the model, and what cannot be compiled runs on."""

from __future__ import annotations

import getpass
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from tandem.worker.compiling import compile_rows
from tandem.worker.sampler import greedy

from support.compiled import calls, compiled_beside_own, kept, paged
from support.paged import load_tiny
from support.tiny_models import ARCHITECTURES, VOCAB

DENSE = [arch for arch in ARCHITECTURES if "moe" not in arch]
"""Experts are dispatched by kernels that cannot be traced in every dtype."""


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_compiled_code_is_kept_where_only_the_user_writes(given: str | None, tmp_path: Path) -> None:
    """In a process of its own: importing torch's compiler names a folder below /tmp."""
    code = """if True:
        import os
        from tandem.worker import process
        from tandem.worker.compiling import keep_compiled_code
        keep_compiled_code()
        from torch._inductor.runtime.cache_dir_utils import cache_dir
        print(cache_dir(), os.environ["TRITON_CACHE_DIR"])"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "TRITON"))}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    own = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    environment |= {"TRITON_CACHE_DIR": f"{own}/triton/0"}  # as a process has it that torch's compiler has been used in
    if given is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / given)
    found = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    expected = [str(tmp_path / (given or "tandem/inductor")), str(tmp_path / "tandem/triton")]
    assert found.stdout.split() == expected, found.stderr


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_rewritten_model_computes_the_same_for_any_number_of_tokens(
    arch: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, compiled, own = compiled_beside_own(paged(arch, tmp_path, dtype))
    for count in (1, 2, 7, 32, 37, 64):
        ids = torch.arange(count) * 31 % VOCAB
        got, expected = compiled(ids, torch.arange(count)), own(ids, torch.arange(count))
        if dtype == torch.float32:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        else:
            difference = (got - expected).float().norm() / expected.float().norm()
            assert difference < 0.02


def test_a_llama_in_16_bits_is_rewritten_whole(tmp_path: Path) -> None:
    model = paged("llama", tmp_path, torch.bfloat16)
    graph, compiled, _ = compiled_beside_own(model)
    layers = model.config.num_hidden_layers
    assert calls(graph, "rotate_attend") == layers
    assert not calls(graph, "attend")
    assert calls(graph, "gated_product") == layers
    assert calls(graph, "product") == 3 * layers  # query, key and value in one; output; down
    assert calls(graph, "add_norm") == 2 * layers  # all but the first, which follows no sum
    assert not any(str(node.target).startswith("aten.mm.") for node in graph.graph.nodes)
    first, *_ = (layer.mlp for layer in model.get_decoder().layers)
    assert [name for name, _ in compiled.products] == ["product", "product", "gated_product", "product"] * layers
    (_, gated), (_, down) = compiled.products[2:4]
    assert torch.equal(gated, torch.cat([first.gate_proj.weight, first.up_proj.weight]))
    assert gated.data_ptr() == first.gate_proj.weight.data_ptr()
    assert torch.equal(down, first.down_proj.weight)


def test_in_32_bits_only_what_rounds_the_same_is_rewritten(tmp_path: Path) -> None:
    model = paged("llama", tmp_path, torch.float32)
    graph, compiled, _ = compiled_beside_own(model)
    assert calls(graph, "rotate_attend") == model.config.num_hidden_layers
    assert not any(calls(graph, name) for name in ("product", "gated_product", "add_norm"))
    assert not compiled.products


def test_merged_weights_are_kept_once_and_the_model_goes_on(tmp_path: Path) -> None:
    model = paged("llama", tmp_path, torch.float32)
    before = {name: value.clone() for name, value in model.named_parameters()}
    _, _, own = compiled_beside_own(paged("llama", tmp_path, torch.float32))
    model2 = paged("llama", tmp_path, torch.float32)
    _, _, own2 = compiled_beside_own(model2)
    attention: Any = model2.get_decoder().layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    starts = [weight.untyped_storage().data_ptr() for weight in weights]
    assert len(set(starts)) == 1
    assert weights[0].untyped_storage().nbytes() == sum(weight.numel() for weight in weights) * 4
    for name, value in model2.named_parameters():
        assert torch.equal(value, before[name]), name
    ids = torch.arange(9)
    assert torch.equal(own(ids, ids), own2(ids, ids))


def test_the_likeliest_token_is_found_without_storing_logits(tmp_path: Path) -> None:
    model = paged("llama", tmp_path, torch.bfloat16)
    head = model.get_output_embeddings()
    rows = torch.randn(5, model.config.hidden_size).to(torch.bfloat16)
    graphs: list[GraphModule] = []
    compiled = compile_rows(
        head, lambda hidden: greedy(head(hidden.unsqueeze(0))[0].float()), [rows[:2]], backend=kept(graphs)
    )
    assert calls(graphs[0], "likeliest") == 1
    ((name, weight),) = compiled.products
    assert name == "likeliest"
    assert torch.equal(weight, head.weight)
    assert torch.equal(compiled(rows), head(rows).argmax(-1))


def test_a_model_that_cannot_be_traced_runs_uncompiled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_tiny("llama", tmp_path)
    trunk: Any = model.module.get_decoder()
    forward = trunk.layers[1].mlp.forward

    def looks_at_values(hidden: Tensor) -> Tensor:
        return forward(hidden) if float(hidden.sum()) > -1e9 else hidden

    trunk.layers[1].mlp.forward = looks_at_values
    with caplog.at_level(logging.WARNING):
        model.compile()
    assert not model.compiled
    assert "LlamaForCausalLM runs uncompiled, and so without CUDA graphs" in caplog.text


class Deep(torch.nn.Module):
    """A chain of operations, each of which takes both results of the one before."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)
        self.depth = depth

    def forward(self, rows: Tensor) -> Tensor:
        total, normed = rows, rows
        for _ in range(self.depth):
            total, normed = torch.ops.tandem.add_norm(total, normed, self.weight, 1e-5)
        return torch.cumsum(normed, dim=-1)


@pytest.mark.slow
def test_a_model_of_many_layers_is_compiled_however_deep_the_compiler_recurses() -> None:
    """As deep as some 80 layers in 16 bits, or 50 in 8. Without care inductor fails, and then tells of it for hours."""
    module, rows = Deep(400), torch.randn(5, 8)
    compiled = compile_rows(module, lambda rows: module(rows), [rows])
    torch.testing.assert_close(compiled(rows), module(rows))


def test_an_operation_that_cannot_be_compiled_deep_in_a_model_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at once: written out with all that it was computed from, it would be 2 to the power of 60 lines. What torch
    2.11 writes of each operator that it meets for the first time is the same."""
    from torch._inductor import lowering

    def refuse(*_arguments: Any, **_more: Any) -> None:
        raise ValueError("not this one")

    monkeypatch.setitem(lowering.lowerings, torch.ops.aten.cumsum.default, refuse)
    module, rows = Deep(60), torch.randn(5, 8)
    with pytest.raises(Exception, match="ValueError: not this one\n *target: aten.cumsum.default"):
        compile_rows(module, lambda rows: module(rows), [rows])
