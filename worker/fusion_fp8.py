"""Rewrites of a traced model whose products are in 8 bits (see quantization); what fusion.py does for 16 bits.

Products of the same rows become one, so that the rows are quantised once; a norm quantises its own result; a SiLU gate
joins its product.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .fusion import _VIEWS, aten, gated_source, merged_input, view_shape

_quantize = torch.ops.tandem.quantize_rows.default
_product = torch.ops.tandem.scaled_product.default


@dataclass(frozen=True, slots=True)
class ScaledProduct:
    """A product of quantised rows by a weight with scales, both of which are the graph's inputs."""

    node: Node
    quantized: Node
    """The `quantize_rows` that its rows and their scales come from."""
    weight: Node
    scale: Node
    dtype: torch.dtype


def merge_scaled_products(graph: Graph, inputs: dict[Node, Tensor]) -> int:
    """Products of the same rows become one, as `fusion.merge_products` does it. Returns how many went."""
    groups: dict[tuple[Node, torch.dtype], list[ScaledProduct]] = {}
    for node in graph.nodes:
        found = _scaled_product(node, inputs)
        if found is not None:
            groups.setdefault((_unviewed(found.quantized.args[0]), found.dtype), []).append(found)
    merged = 0
    for products in groups.values():
        if len(products) < 2:
            continue
        widths = [inputs[product.weight].shape[0] for product in products]
        weight = merged_input(graph, inputs, [product.weight for product in products])
        scale = merged_input(graph, inputs, [product.scale for product in products])
        first = products[0]
        with graph.inserting_before(first.node):
            whole = graph.call_function(_product, (*first.node.args[:2], weight, scale, first.dtype))
            parts = graph.call_function(aten.split_with_sizes.default, (whole, widths, 1))
            columns = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(products))]
        for product, part in zip(products, columns, strict=True):
            part.meta = dict(product.node.meta)
            product.node.replace_all_uses_with(part)
            graph.erase_node(product.node)
        merged += len(products) - 1
    graph.eliminate_dead_code()
    return merged


def quantize_in_norms(graph: Graph) -> int:
    """An `add_norm` whose norm is only ever quantised becomes `add_norm_quantize`. Returns how many did."""
    fused = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.tandem.add_norm.default:
            continue
        parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        normed = parts.get(1)
        quantizing = _only_quantized(normed) if normed is not None else []
        if not quantizing:
            continue
        with graph.inserting_before(node):
            triple = graph.call_function(torch.ops.tandem.add_norm_quantize.default, node.args)
            total, rows, scale = (graph.call_function(operator.getitem, (triple, index)) for index in range(3))
        if 0 in parts:
            total.meta = dict(parts[0].meta)
            parts[0].replace_all_uses_with(total)
        for quantize in quantizing:
            for user in list(quantize.users):
                replacement = rows if user.args[1] == 0 else scale
                replacement.meta = dict(user.meta)
                user.replace_all_uses_with(replacement)
        fused += 1
    graph.eliminate_dead_code()
    return fused


def gate_scaled_products(graph: Graph, inputs: dict[Node, Tensor]) -> int:
    """silu(gate) * up of a merged product becomes `scaled_gated_product`. Returns how many did."""
    gated = 0
    for node in list(graph.nodes):
        source = gated_source(node)
        found = _scaled_product(source, inputs) if source is not None else None
        if found is None:
            continue
        shape = view_shape(node)
        with graph.inserting_before(node):
            out = graph.call_function(torch.ops.tandem.scaled_gated_product.default, found.node.args)
            viewed = graph.call_function(aten.view.default, (out, shape))
        viewed.meta = dict(node.meta)
        node.replace_all_uses_with(viewed)
        gated += 1
    graph.eliminate_dead_code()
    return gated


def _scaled_product(node: Node, inputs: dict[Node, Tensor]) -> ScaledProduct | None:
    if node.target is not _product:
        return None
    rows: Any
    row_scale: Any
    rows, row_scale, weight, scale, dtype = node.args
    if rows.target is not operator.getitem or row_scale.target is not operator.getitem:
        return None
    quantized = rows.args[0]
    if row_scale.args[0] is not quantized or quantized.target is not _quantize:
        # Behind a norm that quantises, nothing is left to be merged; the rows are what they are.
        quantized = rows
    if not isinstance(weight, Node) or not isinstance(scale, Node) or not isinstance(dtype, torch.dtype):
        return None
    if any(parameter not in inputs or len(parameter.users) > 1 for parameter in (weight, scale)):
        return None
    return ScaledProduct(node, quantized, weight, scale, dtype)


def _unviewed(node: Any) -> Node:
    while isinstance(node, Node) and node.target in _VIEWS:
        node = node.args[0]
    found: Node = node
    return found


def _only_quantized(normed: Node) -> list[Node]:
    """The `quantize_rows` of a norm, seen through views; empty if anything else uses it."""
    found: list[Node] = []
    pending = list(normed.users)
    while pending:
        user = pending.pop()
        if user.target is _quantize:
            found.append(user)
        elif user.target in (*_VIEWS, aten.unsqueeze.default, aten.squeeze.dim):
            pending.extend(user.users)
        else:
            return []
    return found
