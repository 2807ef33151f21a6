"""What follows a model's last attention, for some rows alone: the same rows as for all, whatever the model is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tandem.protocol.messages import StepPlan
from tandem.worker import compiling
from tandem.worker.attention import ops
from tandem.worker.compiling import CompiledTrunk, compile_trunk
from tandem.worker.model import PagedModel

from support.compiled import calls, kept, paged, split_beside_own
from support.deadlines import DEADLINE_S
from support.grammar_rig import Rig
from support.paged import load_tiny
from support.step_plans import ints, joining
from support.tiny_models import ARCHITECTURES, VOCAB

DENSE = [arch for arch in ARCHITECTURES if "moe" not in arch]
"""Experts are dispatched by kernels that cannot be traced in every dtype."""
CALLER = 10**6


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_wanted_rows_are_those_of_a_whole_step(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    graphs, trunk, own = split_beside_own(paged(arch, tmp_path, dtype))
    last = graphs[1]
    assert not calls(last, "attend")
    assert not calls(last, "rotate_attend")
    for count, wanted in ((1, [0]), (2, [1]), (37, [36, 0, 5]), (37, [4] * 64), (64, list(range(64)))):
        ids, at, rows = torch.arange(count) * 31 % VOCAB, torch.arange(count), torch.tensor(wanted)
        begun = trunk.begin(ids, at)
        assert all(len(tensor) == count for tensor in begun)
        expected = own(ids, at)
        for got, same in ((trunk.end(begun), expected), (trunk.end(begun, rows), expected[rows])):
            assert got.shape == same.shape
            if dtype == torch.float32:
                torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)
            else:
                assert (got - same).float().norm() / same.float().norm() < 0.02


def test_of_a_llamas_last_layer_all_but_its_attention_is_left_out(tmp_path: Path) -> None:
    model = paged("llama", tmp_path, torch.bfloat16)
    graphs, trunk, _ = split_beside_own(model)
    first, last = graphs
    layers = model.config.num_hidden_layers
    assert calls(first, "rotate_attend") == layers
    assert [calls(last, name) for name in ("product", "gated_product", "add_norm")] == [2, 1, 2]
    assert [calls(first, name) for name in ("product", "gated_product")] == [3 * layers - 2, layers - 1]
    assert trunk.last is not None
    assert [name for name, _ in trunk.last.products] == ["product", "gated_product", "product"]
    assert len(trunk.products) == 4 * layers
    final = model.get_decoder().layers[-1]
    norms = [final.post_attention_layernorm.weight, model.get_decoder().norm.weight]
    used = [weight for _, weight in trunk.last.products] + norms
    assert sorted(value.data_ptr() for value in trunk.last._parameters) == sorted(value.data_ptr() for value in used)


class Parallel(nn.Module):
    """Attention beside a product of the same rows, as some models have it, and positions and a constant behind it."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8), requires_grad=False)
        self.own = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.mean = mean

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        rows = self.table[ids]
        heads = rows.unsqueeze(1)
        attended: Tensor = torch.ops.tandem.attend(heads, heads, heads, 0, CALLER).squeeze(1)
        mixed = attended * 2 + (rows @ self.own).tanh() + at.unsqueeze(1) * self.own.sum()
        return mixed - mixed.mean(0) if self.mean else mixed.reshape(ids.shape[0] * 2, 4).reshape(ids.shape[0], 8)


class Doubled:
    def record(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + key


@pytest.mark.parametrize("mean", [False, True])
def test_a_product_beside_the_last_attention_is_left_out_too(mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a mean over rows is not one over some of them."""
    monkeypatch.setitem(ops._steps, CALLER, Doubled())
    module, graphs, example = Parallel(mean), list[GraphModule](), torch.zeros(2, dtype=torch.int64)
    trunk = compile_trunk(module, lambda ids, at: module(ids, at), [example, example], backend=kept(graphs))
    ids, at, wanted = torch.arange(9), torch.arange(9) + 5, torch.tensor([7, 2, 2])
    expected = module(ids, at)
    torch.testing.assert_close(trunk.end(trunk.begin(ids, at), wanted), expected[wanted])
    torch.testing.assert_close(trunk.end(trunk.begin(ids, at)), expected)
    assert len(graphs) == (1 if mean else 2)
    in_first = {str(node.target) for node in graphs[0].graph.nodes}
    assert ("aten.tanh.default" in in_first) == mean


def compiled_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PagedModel:
    monkeypatch.setattr(compiling, "_inductor", kept([]))
    model, _ = load_tiny("llama", folder)
    model.compile()
    return model


def test_a_model_that_knows_which_rows_are_wanted_runs_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def end(self: CompiledTrunk, begun: list[Tensor], wanted: Tensor | None = None) -> Tensor:
        whole = end_of(self, begun)
        return whole if wanted is None else whole[wanted].roll(1, 0)

    end_of = CompiledTrunk.end
    monkeypatch.setattr(CompiledTrunk, "end", end)
    with caplog.at_level(logging.WARNING):
        assert not compiled_as_it_is(tmp_path, monkeypatch).compiled
    assert "LlamaForCausalLM runs uncompiled" in caplog.text


def test_steps_compute_what_follows_for_the_rows_that_want_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled up to the head's numbers of rows; not at all if none wants one; for all if a prompt's are told."""
    asked: list[int | None] = []

    def end(self: CompiledTrunk, begun: list[Tensor], wanted: Tensor | None = None) -> Tensor:
        asked.append(None if wanted is None else len(wanted))
        return end_of(self, begun, wanted)

    end_of = CompiledTrunk.end
    monkeypatch.setattr(CompiledTrunk, "end", end)
    monkeypatch.setattr(compiling, "_inductor", kept([]))
    prompt = list(range(5, 25))
    tell = {"prompt_logprobs_slot": ints(1), "prompt_logprobs": ints(2)}
    plans = [
        joining(0, 0, prompt, [0, 1], chunk_length=ints(12)),
        StepPlan(epoch=1, registration=1, step=1, chunk_slot=ints(0), chunk_length=ints(8)),
        joining(2, 1, prompt[:9], [2], **tell),
        joining(3, 2, prompt[3:7], [3]),
    ]
    found = []
    for compiled in (False, True):
        rig = Rig(tmp_path / str(compiled), lookahead=3)
        if compiled:
            rig.pipeline._state.model.compile()
            rig.pipeline._state.head_rows = (2, 4)
            asked.clear()
        for plan in plans:
            rig.pipeline.launch(plan)
        results = [rig.result() for _ in plans]
        assert rig.pipeline.drain(DEADLINE_S)
        rig.pipeline.close(DEADLINE_S)
        found.append([(result.token.tolist(), result.prompt_entry_token.tolist()) for result in results])
    assert found[0] == found[1]
    assert [len(tokens) for tokens, _ in found[0]] == [0, 1, 2, 3]
    assert asked == [2, None, 4]
