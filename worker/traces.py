"""Traced and rewritten modules, kept between starts: tracing runs a model's Python anew for each layer, which takes ten
seconds for 32 of them.

A trace holds what that Python decided. So its key has what it decides by: versions, the code of the module's classes
(and what lies beside it, where a model brings its own) and of this package, the config, the plain attributes of all
submodules, and names, shapes and dtypes of parameters.
Like a compiler's caches, the files are code that is run: they belong in a folder of the user's own.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

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
    products: list[tuple[str, int]]
    """Operators that multiply rows by a weight (see fusion.product_uses), and which input that is."""


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
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    log.warning("the kept trace %s can be written by other users: tracing anew", path)
                    return None
                trace = pickle.load(file)  # noqa: S301 - the user's own, as a compiler's caches are
                os.utime(file.fileno())  # used, so it stays
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - of many kinds, and the module is traced instead
            log.warning("the kept trace %s cannot be read (%s: %s): tracing anew", path, type(error).__name__, error)
            return None
        return trace if isinstance(trace, Trace) else None

    def put(self, path: Path, trace: Trace) -> Trace:
        """Keeps it; returns it as `take` will give it, so that a compiler's caches see the same graph then as now.
        A trace that cannot be kept is returned as it is, with a warning."""
        try:
            written = pickle.dumps(trace)
            kept = pickle.loads(written)  # noqa: S301 - as above
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(written)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except Exception as error:  # noqa: BLE001 - of many kinds, and the start goes on without
            log.warning("the trace of %s cannot be kept: %s: %s", self.about, type(error).__name__, error)
            return trace
        assert isinstance(kept, Trace)
        self._tidy()
        return kept

    def _tidy(self) -> None:
        """Removes what has not been used for longest: each version of a model or of our code leaves one behind."""
        found = []
        for path in self.folder.glob("*.trace"):
            with suppress(FileNotFoundError):  # another process tidies up too
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found)[:-MOST_KEPT]:
            path.unlink(missing_ok=True)


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
    files = {*Path(__file__).parent.rglob("*.py"), *itertools.chain.from_iterable(map(_files_of, kinds))}
    for path in sorted(files):
        yield path.read_bytes()


def _device(value: Tensor) -> tuple[str, str]:
    """Constants of a trace lie on a device by number, and code asks what it can do."""
    device = value.device
    return str(device), torch.cuda.get_device_name(device) if device.type == "cuda" else ""


_VERSIONED: Final = frozenset({"builtins", "torch", *sys.stdlib_module_names})
"""Packages whose code goes by their version."""


def _files_of(kind: type) -> Iterator[Path]:
    """Where the code of a class and of those that it inherits from is, and of a model's own code also what lies beside
    it, since its classes may call that."""
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package in _VERSIONED:
            continue
        file = Path(inspect.getfile(base))
        yield file
        if package != "transformers":
            yield from file.parent.glob("*.py")


def names_in(values: Mapping[str, Tensor], whole: Tensor) -> list[str]:
    """Which of `values` is `whole`, or lies in its memory, from the first to the last."""
    for name, value in values.items():
        if value is whole:
            return [name]
    memory = whole.untyped_storage().data_ptr()
    inside = [name for name, value in values.items() if value.untyped_storage().data_ptr() == memory]
    return sorted(inside, key=lambda name: values[name].storage_offset())
