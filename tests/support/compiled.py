"""Rewritten models without a cache: attention of one sequence with itself, and what a graph calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from tandem.worker.attention.ops import OperatorRouter
from tandem.worker.attention.registry import ATTENTION_NAME, register
from tandem.worker.compiling import Compiled, CompiledTrunk, compile_rows, compile_trunk
from tandem.worker.inspection import dense_attention, inspect_layers, run_trunk
from tandem.worker.kv_cache import LayerKV

from support.tiny_models import save_tiny


class DenseStep:
    """Attention of one sequence with itself, without a cache."""

    def __init__(self, layers: tuple[LayerKV, ...]) -> None:
        self.layers = layers

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dense_attention(self.layers[layer], query, key, value).contiguous()


class DenseRouter:
    """The same for a model that is not compiled."""

    def __init__(self, step: DenseStep, layer_of: dict[int, int]) -> None:
        self.step, self.layer_of = step, layer_of

    def attend_layer(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any) -> Tensor:
        layer_idx: Any = module.layer_idx
        return self.step.attend(self.layer_of[layer_idx], query, key, value)


def kept(graphs: list[GraphModule]) -> Callable[[GraphModule, list[Any]], GraphModule]:
    """A backend that runs the rewritten graph as it is."""

    def backend(traced: GraphModule, _: list[Any]) -> GraphModule:
        graphs.append(traced)
        return traced

    return backend


def calls(graph: GraphModule, name: str) -> int:
    return sum(str(node.target).startswith(f"tandem.{name}.") for node in graph.graph.nodes)


def split_beside_own(
    model: PreTrainedModel,
) -> tuple[list[GraphModule], CompiledTrunk, Callable[[Tensor, Tensor], Tensor]]:
    """A model's rewritten graph in two, and its trunk both ways: token ids and positions to hidden rows."""
    graphs: list[GraphModule] = []
    trunk, run, own = _both_ways(model)
    example = torch.zeros(2, dtype=torch.int64)
    return graphs, compile_trunk(trunk, run, [example, example], backend=kept(graphs)), own


def compiled_beside_own(
    model: PreTrainedModel,
) -> tuple[GraphModule, Compiled, Callable[[Tensor, Tensor], Tensor]]:
    """A model's rewritten graph as a whole, and its trunk both ways: token ids and positions to hidden rows."""
    graphs: list[GraphModule] = []
    trunk, run, own = _both_ways(model)
    example = torch.zeros(2, dtype=torch.int64)
    compiled = compile_rows(trunk, run, [example, example], backend=kept(graphs))
    return graphs[0], compiled, own


def _both_ways(
    model: PreTrainedModel,
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The trunk; what is to be compiled; the same by the model's own code alone."""
    trunk = model.get_decoder()
    layers = inspect_layers(model, trunk, torch.device("cpu"))
    step, layer_of = DenseStep(layers), {layer.layer_idx: index for index, layer in enumerate(layers)}
    router = OperatorRouter(layer_of)
    router.enter(step)  # type: ignore[arg-type]
    return (
        trunk,
        lambda ids, at: run_trunk(trunk, ids, at, router),
        lambda ids, at: run_trunk(trunk, ids, at, DenseRouter(step, layer_of)),
    )


def paged(arch: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    register()
    model: Any = save_tiny(arch, folder)
    model.to(dtype)
    model.requires_grad_(False)
    model.config._attn_implementation = ATTENTION_NAME
    own: PreTrainedModel = model
    return own
