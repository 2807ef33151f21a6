"""An unchanged module, traced once for any number of rows, rewritten (see fusion) and compiled.

The trace is made with make_fx over fake tensors: the module's Python runs once, and what it asks of torch is written
down with the number of rows as a symbol. Whatever Python decides is thereby fixed, which is right for a model that is
always called in the same way; a module that looks at values in tensors cannot be traced.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..protocol.errors import ConfigurationError
from .fusion import (
    absorb_rotary,
    fuse_likeliest,
    fuse_sums_with_norms,
    merge_products,
    product_uses,
    put_together,
    share_row_count,
    use_own_products,
)
from .fusion_fp8 import gate_scaled_products, merge_scaled_products, quantize_in_norms
from .last_rows import split_behind_attention
from .traces import Shelf, Trace, names_in

log = logging.getLogger(__name__)

_ROWS: Final = 37
"""Rows of the example that a module is traced with: no dimension of a model, which the trace would take it for.
Compilers take it as a hint."""


def keep_compiled_code() -> None:
    """Lets compiled kernels survive the process, in the user's cache directory, unless the environment names others."""
    for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        if _nobody_chose(os.environ.get(name)):
            os.environ[name] = str(cache_folder() / folder)


def _nobody_chose(named: str | None) -> bool:
    """torch writes folders of its own into the environment, of this process and those that it starts: one when its
    compiler is imported, the other when that is used. They are below /tmp, where anybody may have put code."""
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())  # as torch does
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    own = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
    return named is None or Path(named).is_relative_to(own)


def cache_folder() -> Path:
    """Of what a start need not find out again, in the user's cache directory. Raises ConfigurationError for a user
    without one: code is run that was kept there, so a place that is another's will not do."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
    except RuntimeError as error:  # no $HOME, and a user whom the system does not know, as in some containers
        raise ConfigurationError(
            f"no place for compiled code: {error} set HOME or XDG_CACHE_HOME to a directory of your own"
        ) from error


class Compiled:
    """A compiled function of tensors whose first dimension, of any length, is the rows'. Called under no_grad."""

    def __init__(
        self, function: Callable[..., Any], parameters: list[Tensor], products: list[tuple[str, Tensor]]
    ) -> None:
        self._function = function
        self._parameters = parameters
        self.products = products
        """Operators that multiply rows by a weight, and which; see fusion.product_uses."""

    def __call__(self, *rows: Tensor) -> Tensor:
        return self.all(*rows)[0]

    def all(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """What a function of several results gives."""
        out = self._function(*rows, *self._parameters)
        return tuple(out) if isinstance(out, (list, tuple)) else (out,)


class CompiledTrunk:
    """A compiled trunk in two, if it can be split: see last_rows. Called under no_grad."""

    def __init__(self, first: Compiled, last: Compiled | None) -> None:
        self.first, self.last = first, last

    @property
    def products(self) -> list[tuple[str, Tensor]]:
        return [*self.first.products, *([] if self.last is None else self.last.products)]

    def begin(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Up to the last attention: tensors of one row a token, for `end`."""
        return self.first.all(*rows)

    def end(self, begun: Sequence[Tensor], wanted: Tensor | None = None) -> Tensor:
        """The trunk's result for the rows `wanted` ([N] int64), or for all: [N, …]."""
        if wanted is not None:
            begun = [rows.index_select(0, wanted) for rows in begun]
        return begun[0] if self.last is None else self.last(*(rows.contiguous() for rows in begun))


Backend = Callable[[GraphModule, list[Any]], Callable[..., Any]]
"""Turns a rewritten graph and fake inputs into a callable."""


def compile_rows(
    module: nn.Module,
    function: Callable[..., Tensor],
    examples: Sequence[Tensor],
    *,
    backend: Backend | None = None,
    shelf: Shelf | None = None,
) -> Compiled:
    """Compiles `function`, which calls `module` and returns one tensor.

    `examples` are tensors like its arguments; the length of their first dimension is taken to vary, and to be the same
    for all. Without a `backend`, inductor compiles. `shelf` keeps the rewritten graph for the next start, and has it
    from the last. Parameters of `module` may become views of larger ones. Raises whatever a tracer or compiler raises
    over code it cannot take.
    """
    start = time.perf_counter()
    rewritten = _rewritten(module, function, examples, shelf)
    compiled = _compiled(rewritten.graph, rewritten.parameters, examples, backend)
    _tell(module, start, rewritten)
    return compiled


def compile_trunk(
    module: nn.Module,
    function: Callable[..., Tensor],
    examples: Sequence[Tensor],
    *,
    backend: Backend | None = None,
    shelf: Shelf | None = None,
) -> CompiledTrunk:
    """As `compile_rows`, for a function with attention: what is behind the last one is compiled by itself."""
    start = time.perf_counter()
    rewritten = _rewritten(module, function, examples, shelf)
    split = split_behind_attention(rewritten.graph, *_fakes(examples, rewritten.parameters), len(examples))
    if split is None:
        log.info("%s: computed whole for every token, since it goes across them to its end", type(module).__name__)
        trunk = CompiledTrunk(_compiled(rewritten.graph, rewritten.parameters, examples, backend), None)
    else:
        first, last = (
            _compiled(part.graph, [rewritten.parameters[at] for at in part.parameters], rows, backend)
            for part, rows in ((split.first, examples), (split.last, split.handed_over))
        )
        trunk = CompiledTrunk(first, last)
    _tell(module, start, rewritten)
    return trunk


@dataclass(frozen=True, slots=True)
class _Rewritten:
    graph: GraphModule
    parameters: list[Tensor]
    """Which it takes behind the rows."""
    kept: bool
    """From the last start."""
    seconds: float


def _rewritten(
    module: nn.Module, function: Callable[..., Tensor], examples: Sequence[Tensor], shelf: Shelf | None
) -> _Rewritten:
    start = time.perf_counter()
    call = _Call(module, function)
    named = {**dict(call.named_parameters()), **dict(call.named_buffers())}
    place = None if shelf is None else shelf.place(module, examples)
    trace = None if shelf is None or place is None else shelf.take(place)
    kept = trace is not None
    if trace is None:
        trace, parameters = _trace(call, named, examples)
        if shelf is not None and place is not None:
            trace = shelf.put(place, trace)
    else:
        parameters = [
            named[names[0]] if len(names) == 1 else put_together([named[name] for name in names])
            for names in trace.inputs
        ]
    return _Rewritten(trace.graph, parameters, kept, time.perf_counter() - start)


def _tell(module: nn.Module, start: float, rewritten: _Rewritten) -> None:
    log.info(
        "compiled %s in %.1f s, %.1f s of them for %s",
        type(module).__name__,
        time.perf_counter() - start,
        rewritten.seconds,
        "reading the kept trace" if rewritten.kept else "tracing",
    )


def _compiled(
    graph: GraphModule, parameters: list[Tensor], examples: Sequence[Tensor], backend: Backend | None
) -> Compiled:
    mode, fakes = _fakes(examples, parameters)
    with tracing(TracingContext(mode)), torch.no_grad():
        function = (backend or _inductor)(graph, fakes)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders[len(examples) :], parameters, strict=True))
    return Compiled(function, parameters, product_uses(graph.graph, inputs))


def _fakes(examples: Sequence[Tensor], parameters: list[Tensor]) -> tuple[FakeTensorMode, list[Any]]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return mode, [*_fake_rows(mode, examples), *(mode.from_tensor(value, static_shapes=True) for value in parameters)]


class _Call(nn.Module):
    """A function as the forward pass of a module that owns what the function uses."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *rows: Tensor) -> Tensor:
        return self._function(*rows)


def _trace(call: _Call, named: dict[str, Tensor], examples: Sequence[Tensor]) -> tuple[Trace, list[Tensor]]:
    """The trace, and the parameters that its graph takes after the rows. `named`: the call's, of which some may become
    views of larger ones."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake_rows = _fake_rows(mode, examples)
    fake_parameters = [mode.from_tensor(value, static_shapes=True) for value in named.values()]

    def flat(*arguments: Tensor) -> Tensor:
        rows, parameters = arguments[: len(examples)], arguments[len(examples) :]
        result: Tensor = torch.func.functional_call(call, dict(zip(named, parameters, strict=True)), rows)
        return result

    with torch.no_grad():
        traced: GraphModule = make_fx(flat, tracing_mode="symbolic")(*fake_rows, *fake_parameters)
    graph = traced.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders[len(examples) :], named.values(), strict=True))
    share_row_count(graph, placeholders[0])
    rewritten = {
        "rotary embeddings": absorb_rotary(graph),
        "merged products": merge_products(graph, inputs) + merge_scaled_products(graph, inputs),
        "sums with a norm": fuse_sums_with_norms(graph),
        "norms that quantise": quantize_in_norms(graph),
        "own products": use_own_products(graph, inputs) + gate_scaled_products(graph, inputs),
        "searches": fuse_likeliest(graph),
    }
    counts = ", ".join(f"{many} {what}" for what, many in rewritten.items())
    log.info("%s: rewrote %s", type(call.module).__name__, counts)
    _drop_unused(traced, keep=placeholders[: len(examples)])
    del traced.shape_env  # which no cache of compiled code can take into its key
    for node in graph.nodes:
        node.meta.clear()  # of this mode, where a compiler uses another; a kept trace has none either
    parameters = [inputs[node] for node in graph.nodes if node.op == "placeholder" and node in inputs]
    return Trace(traced, [names_in(named, value) for value in parameters]), parameters


def _fake_rows(mode: FakeTensorMode, examples: Sequence[Tensor]) -> list[Any]:
    """Fake tensors like the examples, all with one symbol for their first dimension."""
    example = torch.empty(_ROWS, dtype=torch.int64, device=examples[0].device)
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    source = torch._dynamo.source.ConstantSource("rows")
    rows = mode.from_tensor(example, symbolic_context=context, source=source).shape[0]
    with mode:
        return [torch.empty((rows, *e.shape[1:]), dtype=e.dtype, device=e.device) for e in examples]


def _drop_unused(traced: GraphModule, keep: list[torch.fx.Node]) -> None:
    graph = traced.graph
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users and node not in keep:
            graph.erase_node(node)
    graph.lint()
    traced.recompile()


_FRAMES_PER_NODE: Final = 10
"""More than inductor's recursion takes for one operation behind another."""


@contextmanager
def _deep(frames: int) -> Iterator[None]:
    """Lets inductor take a chain of operations as long as a model of many layers is deep, `frames` of recursion.

    It asks an operation for its symbols, which asks those that it takes its inputs from, and so on to the first layer:
    more than the 2,000 frames that it allows itself. And what it writes of an operation, for an error or, in torch
    2.11, for a log that nobody keeps, holds all that the inputs were computed from, once for each way to them: with 8
    layers in 8 bits that takes minutes, with 32 longer than anyone waits. So it writes the operation's name alone.
    """
    from torch._inductor.exc import OperatorIssue

    def name(target: Any, _args: Any, _kwargs: Any) -> str:
        return f"  target: {target}"

    former = sys.getrecursionlimit()
    sys.setrecursionlimit(max(former, frames))
    try:
        with patch.object(OperatorIssue, "operator_str", staticmethod(name)):
            yield
    finally:
        sys.setrecursionlimit(former)


def _inductor(traced: GraphModule, fakes: list[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    with warnings.catch_warnings(), _deep(_FRAMES_PER_NODE * len(traced.graph.nodes)):
        # Products in 32 bits are meant to be exact.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        # Few kernels differ, so processes that compile them side by side would cost more than they save.
        compiled: Any = compile_fx(traced, fakes, config_patches={"compile_threads": 1})
    function: Callable[..., Any] = compiled
    return function
