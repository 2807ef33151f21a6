"""Traced and rewritten modules, kept between starts: tracing runs a model's Python anew for each layer, which takes ten
seconds for 32 of them.

A trace holds what that Python decided. So its key has what it decides by: versions, the code of the module's classes
(with what they take from transformers, and what lies beside it, where a model brings its own) and of this package, the
config, the plain attributes of all submodules, and names, shapes and dtypes of parameters.
A file is a list of calls in JSON, of operators that are looked up by name: nothing in it is run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import operator
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

log = logging.getLogger(__name__)

MOST_KEPT: Final = 64
"""Traces in a folder, of some 200 KB each."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A function's rewritten graph, without the values of its parameters."""

    graph: GraphModule
    """Takes the function's arguments, then one tensor for each of `inputs`."""
    inputs: list[list[str]]
    """Names of the parameters that lie one below the other in each input; mostly one."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where the trace of one function of a module is kept."""

    folder: Path
    about: str
    """Which function, and whatever it decides by that `key_of` does not find in the module."""

    def place(self, module: nn.Module, examples: Sequence[Tensor]) -> Path | None:
        """Of the trace of such a module; None, with a warning, if it cannot be told from others."""
        try:
            return self.folder / f"{key_of(module, examples, self.about)}.trace"
        except (OSError, TypeError) as error:
            log.warning("the trace of %s is not kept, since some code of the model has no file: %s", self.about, error)
            return None

    def take(self, path: Path) -> Trace | None:
        """The trace that was put there; None if there is none that can be read."""
        try:
            trace = _read(json.loads(path.read_text(encoding="utf-8")))
            os.utime(path)  # used, so it stays
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - of many kinds, and the module is traced instead
            log.warning("the kept trace %s cannot be read (%s: %s): tracing anew", path, type(error).__name__, error)
            return None
        return trace

    def put(self, path: Path, trace: Trace) -> Trace:
        """Keeps it; returns it as `take` will give it, so that a compiler's caches see the same graph then as now.
        A trace that cannot be kept is returned as it is, with a warning."""
        try:
            written = json.dumps(_written(trace))
            kept = _read(json.loads(written))
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(written)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except Exception as error:  # noqa: BLE001 - of many kinds, and the start goes on without
            log.warning("the trace of %s cannot be kept: %s: %s", self.about, type(error).__name__, error)
            return trace
        self._tidy()
        return kept

    def _tidy(self) -> None:
        """Removes what has not been used for longest: each version of a model or of our code leaves one behind."""
        found = []
        for path in self.folder.glob("*.trace"):
            with suppress(OSError):  # another process tidies up too
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found)[:-MOST_KEPT]:
            with suppress(OSError):
                path.unlink()


_NAMESPACES: Final = ("aten", "prims", "tandem")
_NAMED: Final = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def _written(trace: Trace) -> dict[str, Any]:
    """As JSON has it. Raises TypeError for a graph with something that `_read` would not know."""
    nodes = list(trace.graph.graph.nodes)
    number = {node: at for at, node in enumerate(nodes)}
    calls = [
        [node.op, _name_of(node), _value_written(node.args, number), _value_written(dict(node.kwargs), number)]
        for node in nodes
    ]
    return {"calls": calls, "inputs": trace.inputs}


def _read(written: dict[str, Any]) -> Trace:
    """Raises whatever a wrong type, name or number leads to."""
    graph, nodes = Graph(), list[Node]()
    for op, name, args, kwargs in written["calls"]:
        match op:
            case "placeholder":
                nodes.append(graph.placeholder(name))
            case "call_function":
                nodes.append(graph.call_function(_target(name), _value_read(args, nodes), _value_read(kwargs, nodes)))
            case "output":
                nodes.append(graph.output(_value_read(args, nodes)[0]))
            case _:
                raise ValueError(f"a node that is a {op}")
    graph.lint()
    inputs = [[str(name) for name in names] for names in written["inputs"]]
    return Trace(GraphModule(nn.Module(), graph), inputs)


def _name_of(node: Node) -> str:
    target: Any = node.target
    if node.op in ("placeholder", "output"):
        return str(target)
    own = getattr(target, "__name__", "")
    name = f"operator.{own}" if getattr(operator, own, None) is target else str(target)
    if node.op != "call_function" or _target(name) is not target:
        raise TypeError(f"{node.op} {target} cannot be found by its name")
    return name


def _target(name: str) -> Any:
    """operator.X, or an operator of torch or of ours with its overload. Raises ValueError for any other."""
    space, _, rest = name.partition(".")
    if space == "operator" and not rest.startswith("_"):
        return getattr(operator, rest)
    packet, _, overload = rest.partition(".")
    if space not in _NAMESPACES:
        raise ValueError(f"{name} is no operator that a trace may have")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def _value_written(value: Any, number: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"node": number[value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {"dict": {str(key): _value_written(item, number) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_value_written(item, number) for item in value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _NAMED.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise TypeError(f"a {type(value).__name__} among the arguments")


def _value_read(written: Any, nodes: list[Node]) -> Any:
    if not isinstance(written, dict):
        return written
    ((kind, value),) = written.items()
    match kind:
        case "node":
            return nodes[value]
        case "dict":
            return {key: _value_read(item, nodes) for key, item in value.items()}
        case "list":
            return [_value_read(item, nodes) for item in value]
        case "tuple":
            return tuple(_value_read(item, nodes) for item in value)
        case "device":
            return torch.device(value)
    found = getattr(torch, value)
    if not isinstance(found, _NAMED[kind]):
        raise TypeError(f"torch.{value} is no {kind}")
    return found


def key_of(module: nn.Module, examples: Sequence[Tensor], about: str) -> str:
    """Hex digits that differ where the trace of a function of `module` might. Raises OSError or TypeError if the code
    of one of its classes is in no file that can be read."""
    found = hashlib.sha256()
    for part in _decisive(module, examples, about):
        found.update(part if isinstance(part, bytes) else repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:40]


def _decisive(module: nn.Module, examples: Sequence[Tensor], about: str) -> Iterator[Any]:
    yield about, sys.version, torch.__version__, transformers.__version__
    yield [(tuple(example.shape[1:]), example.dtype, _device(example)) for example in examples]
    config = getattr(module, "config", None)
    yield None if config is None else sorted(config.to_dict().items(), key=lambda item: str(item[0]))
    kinds = set()
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, int | float | str | tuple | None)}
        yield name, type(part).__module__, type(part).__qualname__, sorted(plain.items())
        kinds.add(type(part))
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        yield name, tuple(value.shape), value.stride(), value.dtype, _device(value)
    files = {*Path(__file__).parent.rglob("*.py"), *_files_of(kinds)}
    for path in sorted(files):
        yield path.read_bytes()


def _device(value: Tensor) -> tuple[str, str]:
    """Constants of a trace lie on a device by number, and code asks what it can do."""
    device = value.device
    return str(device), torch.cuda.get_device_name(device) if device.type == "cuda" else ""


_VERSIONED: Final = frozenset({"builtins", "torch", *sys.stdlib_module_names})
"""Packages whose code goes by their version."""


def _files_of(kinds: Iterable[type]) -> Iterator[Path]:
    """Where the code of classes and of those that they inherit from is. Of a model's own code also what lies beside it,
    since its classes may call that; and what their modules take from transformers, of which a checkout changes without
    its version."""
    modules = set()
    for base in {base for kind in kinds for base in kind.__mro__}:
        package = base.__module__.partition(".")[0]
        if package in _VERSIONED:
            continue
        file = Path(inspect.getfile(base))
        yield file
        if package != "transformers":
            yield from file.parent.glob("*.py")
        modules.add(base.__module__)
    yield from _files_in_transformers(modules)


def _files_in_transformers(modules: set[str]) -> Iterator[Path]:
    """Of the modules of transformers that define what these modules name, and what those do in turn."""
    seen = set[str]()
    while left := (modules - seen) & sys.modules.keys():
        seen |= left
        values = [value for name in left for value in vars(sys.modules[name]).values()]
        named = {value.__module__ for value in values if isinstance(value, type | FunctionType)}
        modules = {name for name in named if name and name.startswith("transformers.")}
    for name in seen:
        if file := getattr(sys.modules[name], "__file__", None):
            yield Path(file)


def names_in(values: Mapping[str, Tensor], whole: Tensor) -> list[str]:
    """Which of `values` is `whole`, or lies in its memory, from the first to the last."""
    for name, value in values.items():
        if value is whole:
            return [name]
    memory = whole.untyped_storage().data_ptr()
    inside = [name for name, value in values.items() if value.untyped_storage().data_ptr() == memory]
    return sorted(inside, key=lambda name: values[name].storage_offset())
