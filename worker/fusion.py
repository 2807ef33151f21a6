"""Rewrites of a traced model that a compiler would not find.

Products of the same rows by several weights become one. The rotary embedding moves into the attention operator, where
it shares a kernel with the writes to the KV cache. Products, products under a SiLU gate, and sums that are normalised
become operators of ours (see operators), in 16 bits.

All look for the operations themselves, not for a model's name, and leave what they do not recognise as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, Node

from . import operators  # noqa: F401 - defines what the rewrites call

aten = torch.ops.aten

_16_BITS: Final = (torch.bfloat16, torch.float16)
_VIEWS: Final = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True, slots=True)
class Product:
    """rows @ weight.T (+ bias), where weight and bias are the graph's inputs."""

    node: Node
    weight: Node
    bias: Node | None


def share_row_count(graph: Graph, rows: Node) -> None:
    """Whoever asks a tensor how many rows there are asks `rows`, an input: no other tensor is kept for that alone."""
    count = rows.meta["val"].shape[0]
    with graph.inserting_after(rows):
        shared = graph.call_function(aten.sym_size.int, (rows, 0))
    shared.meta["val"] = count
    for node in list(graph.nodes):
        if node.target is aten.sym_size.int and node is not shared and str(node.meta["val"]) == str(count):
            node.replace_all_uses_with(shared)
            graph.erase_node(node)


def merge_products(graph: Graph, inputs: dict[Node, Tensor]) -> int:
    """Products of the same rows become one with the weights one below the other, whose columns are then dealt out.

    `inputs` gives the value of each parameter's placeholder and is brought up to date; the parameters that were
    merged become views of the merged tensor, so that nothing is kept twice. Returns how many products went.
    """
    groups: dict[tuple[Node, int, bool], list[Product]] = {}
    for node in graph.nodes:
        product = _product(node, inputs)
        if product is not None:
            width = inputs[product.weight].shape[1]
            groups.setdefault((_rows_source(node), width, product.bias is not None), []).append(product)
    merged = 0
    for (_, _, biased), products in groups.items():
        weights = [inputs[product.weight] for product in products]
        if len(products) < 2 or len({(weight.dtype, weight.device) for weight in weights}) > 1:
            continue
        weight = merged_input(graph, inputs, [product.weight for product in products])
        bias = merged_input(graph, inputs, [product.bias for product in products if product.bias]) if biased else None
        _replace_products(graph, products, [weight.shape[0] for weight in weights], weight, bias)
        merged += len(products) - 1
    return merged


def _product(node: Node, inputs: dict[Node, Tensor]) -> Product | None:
    if node.target is aten.mm.default:
        bias, transposed = None, node.args[1]
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, transposed = node.args[0], node.args[2]
        if not _own(bias, inputs, dims=1):
            return None
    else:
        return None
    if not isinstance(transposed, Node) or transposed.target is not aten.t.default or len(transposed.users) > 1:
        return None
    weight = transposed.args[0]
    if not isinstance(weight, Node) or not _own(weight, inputs, dims=2):
        return None
    return Product(node, weight, bias if isinstance(bias, Node) else None)


def _own(node: Any, inputs: dict[Node, Tensor], dims: int) -> bool:
    """A parameter that is used once, and is laid out row by row."""
    if not isinstance(node, Node) or node not in inputs or len(node.users) > 1:
        return False
    value = inputs[node]
    return value.dim() == dims and value.is_contiguous() and value.storage_offset() == 0


def _rows_source(product: Node) -> Node:
    """What the product's rows are a two-dimensional view of. Flattened, one tensor gives the same rows every time."""
    rows: Any = product.args[0] if product.target is aten.mm.default else product.args[1]
    while rows.target in _VIEWS:
        rows = rows.args[0]
    source: Node = rows
    return source


def merged_input(graph: Graph, inputs: dict[Node, Tensor], nodes: list[Node]) -> Node:
    """A new input that holds the values of `nodes` one below the other; these become views of it."""
    value = put_together([inputs[node] for node in nodes])
    last: Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        merged: Node = graph.placeholder(f"merged_{nodes[0].name}")
    inputs[merged] = value
    return merged


def put_together(values: list[Tensor]) -> Tensor:
    """A tensor of these one below the other, which become views of it."""
    value = torch.cat(values)
    start = 0
    for part in values:
        part.data = value[start : start + part.shape[0]]
        start += part.shape[0]
    return value


def _replace_products(
    graph: Graph, products: list[Product], widths: list[int], weight: Node, bias: Node | None
) -> None:
    first = products[0].node
    rows: Any = first.args[0] if bias is None else first.args[1]
    with graph.inserting_before(first):
        transposed = graph.call_function(aten.t.default, (weight,))
        if bias is None:
            whole = graph.call_function(aten.mm.default, (rows, transposed))
        else:
            whole = graph.call_function(aten.addmm.default, (bias, rows, transposed))
        parts = graph.call_function(aten.split_with_sizes.default, (whole, widths, 1))
        columns = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(products))]
    for product, part in zip(products, columns, strict=True):
        product.node.replace_all_uses_with(part)
        graph.erase_node(product.node)


def absorb_rotary(graph: Graph) -> int:
    """`attend` of a rotated query and key becomes `rotate_attend` of them as they were. Returns how many did."""
    absorbed = 0
    angles: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.target is not torch.ops.tandem.attend.default:
            continue
        query, key, value, layer, caller = node.args
        of_query, of_key = _rotated(query), _rotated(key)
        if of_query is None or of_key is None or of_query[1:] != of_key[1:]:
            continue
        for angle in of_query[1:]:
            if angle not in angles:  # inductor would compute them for each layer
                with graph.inserting_after(angle):
                    squeezed = graph.call_function(aten.squeeze.dim, (angle, 0))
                with graph.inserting_after(squeezed):
                    angles[angle] = graph.call_function(torch.ops.tandem.settled.default, (squeezed,))
        cos, sin = (angles[angle] for angle in of_query[1:])
        with graph.inserting_before(node):
            vectors = [_heads_first(graph, plain) for plain in (of_query[0], of_key[0])]
            fused = graph.call_function(
                torch.ops.tandem.rotate_attend.default, (*vectors, value, cos, sin, layer, caller)
            )
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        absorbed += 1
    return absorbed


def _heads_first(graph: Graph, vectors: Node) -> Node:
    """[1, heads, T, D] as [T, heads, D]."""
    one = graph.call_function(aten.squeeze.dim, (vectors, 0))
    return graph.call_function(aten.transpose.int, (one, 0, 1))


def _rotated(node: Any) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) if `node` is [T, heads, D] of x [1, heads, T, D] rotated in the halves layout:
    x * cos + cat(-x_high, x_low) * sin, with cos and sin [1, T, D] given a dimension for the heads."""
    total = _through(_through(node, aten.transpose.int, 0, 1), aten.squeeze.dim, 0)
    straight, turned = _pair(total, aten.add.Tensor)
    x, cos = _pair(straight, aten.mul.Tensor)
    halves, sin = _pair(turned, aten.mul.Tensor)
    cos, sin = (_through(angle, aten.unsqueeze.default, 1) for angle in (cos, sin))
    if x is None or halves is None or cos is None or sin is None or halves.target is not aten.cat.default:
        return None
    dim = x.meta["val"].shape[-1]
    half = dim // 2
    if dim % 2 or cos.meta["val"].shape[-1] != dim or halves.args[1:] not in ((-1,), (3,)):
        return None
    parts: Any = halves.args[0]
    negated, low = parts
    high = negated.args[0] if negated.target is aten.neg.default else None
    if _slice(low) != (x, 0, half) or _slice(high) != (x, half, dim):
        return None
    return x, cos, sin


def _through(node: Any, target: Any, *arguments: int) -> Node | None:
    """What `target` was called on, if `node` is its call with these arguments."""
    if not isinstance(node, Node) or node.target is not target or node.args[1:] != arguments:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) else None


def _pair(node: Any, target: Any) -> tuple[Node | None, Node | None]:
    if not isinstance(node, Node) or node.target is not target or node.kwargs:
        return None, None
    left, right = node.args
    return (left, right) if isinstance(left, Node) and isinstance(right, Node) else (None, None)


def _slice(node: Any) -> tuple[Any, int, int] | None:
    """(x, first, end) of a slice of x's last dimension."""
    if not isinstance(node, Node) or node.target is not aten.slice.Tensor or len(node.args) != 4:
        return None
    source: Any
    dim: Any
    first: Any
    end: Any
    source, dim, first, end = node.args
    shape = source.meta["val"].shape
    if dim not in (-1, len(shape) - 1):
        return None
    return source, first, min(end, shape[-1])


def fuse_sums_with_norms(graph: Graph) -> int:
    """weight * RMSNorm(left + right), in transformers' usual form, becomes `add_norm`. Returns how many did."""
    fused = 0
    for node in list(graph.nodes):
        found = _normed_sum(node)
        if found is None:
            continue
        total, weight, eps = found
        with graph.inserting_before(total):
            left, right = (graph.call_function(aten.squeeze.dim, (term, 0)) for term in total.args)
            pair = graph.call_function(torch.ops.tandem.add_norm.default, (left, right, weight, eps))
            summed, normed = (
                graph.call_function(aten.unsqueeze.default, (graph.call_function(operator.getitem, (pair, index)), 0))
                for index in range(2)
            )
        summed.meta, normed.meta = dict(total.meta), dict(node.meta)
        node.replace_all_uses_with(normed)
        total.replace_all_uses_with(summed)
        fused += 1
    graph.eliminate_dead_code()
    return fused


def _normed_sum(node: Node) -> tuple[Node, Node, float] | None:
    """(left + right, weight, eps) if `node` is weight * round(x * rsqrt(mean(x ** 2) + eps)), x = float(left + right),
    where the sum is [1, T, H] in 16 bits and weight is an input."""
    first, second = _pair(node, aten.mul.Tensor)
    for weight, rounded in ((first, second), (second, first)):
        if weight is None or rounded is None or weight.op != "placeholder":
            continue
        wide, inverse = _pair(_cast_of(rounded), aten.mul.Tensor)
        if wide is None or inverse is None or inverse.target is not aten.rsqrt.default:
            continue
        with_eps: Any = inverse.args[0]
        if with_eps.target is not aten.add.Tensor or not isinstance(with_eps.args[1], float):
            continue
        mean: Any = with_eps.args[0]
        if mean.target is not aten.mean.dim or mean.args[1:] != ([-1], True):
            continue
        square: Any = mean.args[0]
        total = _cast_of(wide)
        if square.target is not aten.pow.Tensor_Scalar or square.args != (wide, 2) or total is None:
            continue
        left, right = _pair(total, aten.add.Tensor)
        value = total.meta["val"]
        if left is None or right is None or value.dim() != 3 or value.dtype not in _16_BITS:
            continue
        if any(tuple(term.meta["val"].shape) != tuple(value.shape) for term in (left, right)):
            continue
        if rounded.meta["val"].dtype == value.dtype == weight.meta["val"].dtype and weight.meta["val"].dim() == 1:
            return total, weight, with_eps.args[1]
    return None


def _cast_of(node: Any) -> Node | None:
    """What `node` casts to another dtype, and does nothing else with."""
    if not isinstance(node, Node) or node.target is not aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) else None


def use_own_products(graph: Graph, inputs: dict[Node, Tensor]) -> int:
    """Products by 16-bit weights without a bias become `product`, and silu(gate) * up of a merged one `gated_product`.
    Returns how many did."""
    gated = 0
    for node in list(graph.nodes):
        source = gated_source(node)
        found = _product(source, inputs) if source is not None else None
        if found is None or found.bias is not None or inputs[found.weight].dtype not in _16_BITS:
            continue
        shape: Any = view_shape(node)
        with graph.inserting_before(node):
            rows = found.node.args[0]
            out = graph.call_function(torch.ops.tandem.gated_product.default, (rows, found.weight))
            viewed = graph.call_function(aten.view.default, (out, shape))
        viewed.meta = dict(node.meta)
        node.replace_all_uses_with(viewed)
        gated += 1
    graph.eliminate_dead_code()
    plain = 0
    for node in list(graph.nodes):
        found = _product(node, inputs)
        if found is None or found.bias is not None or inputs[found.weight].dtype not in _16_BITS:
            continue
        with graph.inserting_before(node):
            out = graph.call_function(torch.ops.tandem.product.default, (node.args[0], found.weight))
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        plain += 1
    graph.eliminate_dead_code()
    return gated + plain


def fuse_likeliest(graph: Graph) -> int:
    """The largest of a `product`, whatever its dtype and view in between, becomes `likeliest`. Returns how many did."""
    fused = 0
    for node in list(graph.nodes):
        if node.target is not aten.argmax.default or node.args[1:] not in ((-1,), (1,)):
            continue
        source: Any = node.args[0]
        while source.target in (*_VIEWS, aten._to_copy.default, aten.select.int, aten.slice.Tensor):
            source = source.args[0]
        values = node.args[0]
        if source.target is not torch.ops.tandem.product.default or not isinstance(values, Node):
            continue
        if tuple(values.meta["val"].shape) != tuple(source.meta["val"].shape):
            continue
        with graph.inserting_before(node):
            out = graph.call_function(torch.ops.tandem.likeliest.default, source.args)
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        fused += 1
    graph.eliminate_dead_code()
    return fused


def product_uses(graph: Graph, inputs: dict[Node, Tensor]) -> list[tuple[str, Tensor]]:
    """The operators of ours that multiply rows by a weight of 16 bits, by name, each with that weight."""
    names = {getattr(torch.ops.tandem, name).default: name for name in ("product", "gated_product", "likeliest")}
    return [(names[node.target], inputs[node.args[1]]) for node in graph.nodes if node.target in names]


def gated_source(node: Node) -> Node | None:
    """The product whose two halves `node` multiplies, the first one through a SiLU."""
    first, second = _pair(node, aten.mul.Tensor)
    for gate, up in ((first, second), (second, first)):
        if gate is None or gate.target is not aten.silu.default:
            continue
        halves = [_unviewed(half) for half in (gate.args[0], up)]
        if any(half.target is not operator.getitem for half in halves):
            continue
        (split, low), (other, high) = (half.args for half in halves)
        if split is not other or (low, high) != (0, 1) or split.target is not aten.split_with_sizes.default:
            continue
        whole, widths, _ = split.args
        if len(widths) == 2 and widths[0] == widths[1]:
            source: Node = whole
            return source
    return None


def _unviewed(node: Any) -> Any:
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def view_shape(product: Node) -> Any:
    """The shape that a half of the product was viewed in before it was multiplied."""
    for half in product.all_input_nodes:
        view = half.args[0] if half.target is aten.silu.default else half
        if isinstance(view, Node) and view.target in _VIEWS:
            return view.args[1]
    return list(product.meta["val"].shape)
