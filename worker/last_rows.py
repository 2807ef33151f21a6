"""A rewritten trunk in two: all up to its last attention, and what follows.

Behind the last attention no token looks at another any more. So what follows is needed of those rows alone that want a
token, or whose log-probabilities are told: of a chunk of a prompt its last row, or none. For a full step of many
prompts that saves most of a layer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from .attention import ops  # noqa: F401 - defines the operators

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Part:
    """A graph of tensors of rows and, behind them, of parameters."""

    graph: GraphModule
    parameters: list[int]
    """Which of the whole graph's parameters it takes."""


@dataclass(frozen=True, slots=True)
class Split:
    first: Part
    """The whole graph's rows -> a tuple of what is handed over."""
    last: Part
    """What is handed over -> the whole graph's result."""
    handed_over: list[Tensor]
    """Fake tensors like it: [T, …], as many rows each."""


def split_behind_attention(
    whole: GraphModule, mode: FakeTensorMode, inputs: list[Any], row_inputs: int
) -> Split | None:
    """None for a graph without attention, or one that computes across rows behind its last.

    `inputs` are fake tensors of `mode` for the graph's; the first `row_inputs` of them are [T, …]. What the whole
    graph's nodes know about themselves is forgotten.
    """
    FakeTensorProp(whole, mode).propagate_dont_convert_inputs(*inputs)
    try:
        return _Splitter(whole.graph, row_inputs).split()
    except _CannotSplitError:
        return None
    finally:
        for node in whole.graph.nodes:
            node.meta.clear()


class _CannotSplitError(Exception):
    pass


class _Splitter:
    def __init__(self, graph: Graph, row_inputs: int) -> None:
        self._nodes: list[Node] = list(graph.nodes)
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        self._rows, self._parameters = placeholders[:row_inputs], placeholders[row_inputs:]
        self._count = str(_value(self._rows[0]).shape[0])
        self._by_rows = self._downstream(self._rows)
        attends = (torch.ops.tandem.attend.default, torch.ops.tandem.rotate_attend.default)
        self._before = self._upstream([node for node in self._nodes if node.target in attends])
        """What an attention needs, and they themselves."""
        for node in self._nodes:  # of a pair that one operator gives, both are there
            if node.target is operator.getitem and node.args[0] in self._before:
                self._before.add(node)

    def split(self) -> Split:
        if not self._before:
            raise _CannotSplitError
        behind = [node for node in self._nodes if node.op != "placeholder" and node not in self._before]
        for node in behind:
            shape = getattr(_value(node), "shape", None)
            if node in self._by_rows and shape is not None and not any(self._count in str(size) for size in shape):
                raise _CannotSplitError  # of what is computed for each row one value is made
        handed = [
            node
            for node in self._nodes
            if (node in self._rows or (node in self._before and node in self._by_rows))
            and isinstance(_value(node), Tensor)
            and any(user not in self._before for user in node.users)
        ]
        examples = [_value(node)[0] if self._dim(node) else _value(node) for node in handed]
        return Split(self._first(handed), self._last(handed, behind), examples)

    def _first(self, handed: list[Node]) -> Part:
        graph = Graph()
        made = {node: graph.placeholder(str(node.target)) for node in self._rows}
        taken = self._take(graph, made, self._before)
        for node in self._nodes:
            if node in self._before:
                made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(
            tuple(
                graph.call_function(aten.select.int, (made[node], 0, 0)) if self._dim(node) else made[node]
                for node in handed
            )
        )
        return _part(graph, taken)

    def _last(self, handed: list[Node], behind: list[Node]) -> Part:
        graph, made = Graph(), dict[Node, Node]()
        given = [graph.placeholder(f"rows_{at}") for at in range(len(handed))]
        computed = self._again(handed, behind)
        taken = self._take(graph, made, computed)
        count = graph.call_function(aten.sym_size.int, (given[0], 0))
        for node, rows in zip(handed, given, strict=True):
            made[node] = graph.call_function(aten.unsqueeze.default, (rows, 0)) if self._dim(node) else rows
        for node in self._nodes:
            if node in computed:
                made[node] = count if self._counts(node) else graph.node_copy(node, made.__getitem__)
        graph.eliminate_dead_code()
        return _part(graph, taken)

    def _again(self, handed: list[Node], behind: list[Node]) -> set[Node]:
        """What `behind` is computed from but for `handed`: itself, and what parameters and the number of rows give."""
        found, left = set[Node](), list(behind)
        while left:
            node = left.pop()
            if node in found or node in handed or node in self._parameters:
                continue
            if node not in behind and node in self._by_rows and isinstance(_value(node), Tensor):
                raise _CannotSplitError  # whose size is asked for, which is another than the number of rows
            found.add(node)
            if not self._counts(node):
                left.extend(node.all_input_nodes)
        return found

    def _counts(self, node: Node) -> bool:
        return node.target is aten.sym_size.int and str(_value(node)) == self._count

    def _take(self, graph: Graph, made: dict[Node, Node], users: Iterable[Node]) -> list[int]:
        """Placeholders for the parameters of `users`; returns which they are."""
        needed = {source for node in users for source in node.all_input_nodes}
        taken = [at for at, node in enumerate(self._parameters) if node in needed]
        for at in taken:
            node = self._parameters[at]
            made[node] = graph.placeholder(str(node.target))
        return taken

    def _dim(self, node: Node) -> int:
        """Where the rows are: [T, …] or [1, T, …]."""
        shape = [str(size) for size in _value(node).shape]
        if shape[:1] == [self._count]:
            return 0
        if shape[:2] == ["1", self._count]:
            return 1
        raise _CannotSplitError

    def _downstream(self, sources: Iterable[Node]) -> set[Node]:
        found = set(sources)
        for node in self._nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    @staticmethod
    def _upstream(nodes: list[Node]) -> set[Node]:
        found, left = set[Node](), list(nodes)
        while left:
            node = left.pop()
            if node.op != "placeholder" and node not in found:
                found.add(node)
                left.extend(node.all_input_nodes)
        return found


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _part(graph: Graph, parameters: list[int]) -> Part:
    for node in graph.nodes:
        node.meta.clear()
    graph.lint()
    return Part(GraphModule(nn.Module(), graph), parameters)
