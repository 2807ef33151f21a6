"""A kept trace gives what tracing gave, and is not taken for another model's."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from transformers import PreTrainedModel

from tandem.worker import traces
from tandem.worker.attention.ops import OperatorRouter
from tandem.worker.compiling import Compiled, compile_rows
from tandem.worker.inspection import inspect_layers, run_trunk
from tandem.worker.quantization import quantize_linears
from tandem.worker.traces import Shelf, Trace, key_of

from support.compiled import DenseStep, kept, paged
from support.tiny_models import VOCAB

pytestmark = pytest.mark.thorough


class Untraceable(OperatorRouter):
    """The model's Python must not run."""

    def attend_layer(self, *_: Any) -> Tensor:
        raise AssertionError("the model was traced anew")


def compiled_by(shelf: Shelf, model: PreTrainedModel, router: Callable[..., OperatorRouter], caller: int) -> Compiled:
    trunk = model.get_decoder()
    layers = inspect_layers(model, trunk, torch.device("cpu"))
    routes = router({layer.layer_idx: index for index, layer in enumerate(layers)})
    routes.caller = caller
    routes.enter(DenseStep(layers))  # type: ignore[arg-type]
    example = torch.zeros(2, dtype=torch.int64)
    return compile_rows(
        trunk, lambda ids, at: run_trunk(trunk, ids, at, routes), [example, example], backend=kept([]), shelf=shelf
    )


def hidden(compiled: Compiled, count: int = 37) -> Tensor:
    return compiled(torch.arange(count) * 31 % VOCAB, torch.arange(count))


@pytest.mark.parametrize("quantized", [False, True], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen2"])
def test_a_kept_trace_computes_what_the_traced_model_does(arch: str, quantized: bool, tmp_path: Path) -> None:
    found = []
    for router in (OperatorRouter, Untraceable):
        model = paged(arch, tmp_path / "model", torch.bfloat16)
        if quantized:
            quantize_linears(model.get_decoder())
        compiled = compiled_by(Shelf(tmp_path / "traces", "trunk"), model, router, 1_000_000)
        found.append((hidden(compiled), [(name, weight.shape) for name, weight in compiled.products]))
        # What was put together is not kept twice.
        held = {value.untyped_storage().data_ptr() for value in compiled._parameters}
        own = {value.untyped_storage().data_ptr() for value in model.get_decoder().parameters()}
        assert own <= held
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert quantized or found[0][1]


def test_parameters_are_this_models_own(tmp_path: Path) -> None:
    """The trace holds no value."""
    results = []
    for scale in (1.0, 0.5):
        model = paged("llama", tmp_path / "model", torch.bfloat16)
        with torch.no_grad():
            model.get_decoder().layers[0].mlp.down_proj.weight.mul_(scale)
        results.append(hidden(compiled_by(Shelf(tmp_path / "traces", "trunk"), model, OperatorRouter, 1_000_000)))
    assert len(list((tmp_path / "traces").iterdir())) == 1
    assert not torch.equal(*results)


@pytest.mark.parametrize("how", ["cut off", "no trace", "something else", "another operator"])
def test_what_cannot_be_read_is_traced_anew(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(tmp_path / "traces", "trunk")
    expected = hidden(compiled_by(shelf, paged("llama", tmp_path / "model", torch.bfloat16), OperatorRouter, 1_000_000))
    (path,) = shelf.folder.iterdir()
    match how:
        case "cut off":
            path.write_bytes(path.read_bytes()[:-100])
        case "no trace":
            path.write_text("{}")
        case "something else":
            path.write_text("hello")
        case _:
            path.write_text(path.read_text().replace("aten.", "os.", 1))
    with caplog.at_level(logging.WARNING):
        again = compiled_by(shelf, paged("llama", tmp_path / "model", torch.bfloat16), OperatorRouter, 1_000_000)
    assert torch.equal(hidden(again), expected)
    assert "tracing anew" in caplog.text
    # And the new trace took the other's place.
    compiled_by(shelf, paged("llama", tmp_path / "model", torch.bfloat16), Untraceable, 1_000_000)


def test_what_could_not_be_kept_leaves_nothing_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "taken"
    path.mkdir()
    trace = Trace(GraphModule(nn.Module(), Graph()), [])
    assert Shelf(tmp_path, "trunk").put(path, trace) is trace
    assert list(tmp_path.iterdir()) == [path]
    assert "cannot be kept" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "traces").write_text("no folder")
    compiled = compiled_by(
        Shelf(tmp_path / "traces", "trunk"),
        paged("llama", tmp_path / "model", torch.bfloat16),
        OperatorRouter,
        1_000_000,
    )
    assert hidden(compiled).shape[0] == 37
    assert "cannot be kept" in caplog.text


class Scaled(nn.Module):
    def __init__(self, factor: float, width: int = 8) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(width, width)


class Inherited(Scaled):
    pass


def test_whatever_a_trace_depends_on_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [torch.zeros(3, 8)]
    plain = key_of(Scaled(2.0), rows, "rows")
    assert key_of(Scaled(2.0), [torch.zeros(5, 8)], "rows") == plain
    others = [
        key_of(Scaled(2.0), rows, "others"),
        key_of(Scaled(3.0), rows, "rows"),
        key_of(Scaled(2.0, width=9), rows, "rows"),
        key_of(Scaled(2.0).to(torch.float64), rows, "rows"),
        key_of(Scaled(2.0).eval(), rows, "rows"),
        key_of(Inherited(2.0), rows, "rows"),
        key_of(Scaled(2.0), [torch.zeros(3, 9)], "rows"),
        key_of(Scaled(2.0), [rows[0].double()], "rows"),
    ]
    monkeypatch.setattr("tandem.worker.traces.transformers.__version__", "0")
    others.append(key_of(Scaled(2.0), rows, "rows"))
    assert len({plain, *others}) == 1 + len(others)


@pytest.mark.parametrize("changed", ["own_model.py", "own_helpers.py"])
def test_the_code_that_a_model_brings_is_in_its_key(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same names, another body: of a class, and of a function beside it."""
    bodies = {
        "own_model.py": "from torch import nn\n\n\nclass Own(nn.Module):\n    pass\n",
        "own_helpers.py": "def scaled(x):\n    return x\n",
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "own_model", sys)  # the patch forgets the module when the test is over
    del sys.modules["own_model"]
    module = importlib.import_module("own_model")
    before = key_of(module.Own(), [torch.zeros(2, 2)], "rows")
    (tmp_path / changed).write_text(bodies[changed] + "# changed\n")
    assert key_of(module.Own(), [torch.zeros(2, 2)], "rows") != before


def test_what_a_model_of_transformers_calls_is_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout it changes without the version: a function of a module that the model's own module names, or that
    one of these names."""
    files = {
        "far": "def far(x):\n    return x\n",
        "near": "from transformers.far import far\n\n\ndef near(x):\n    return far(x)\n",
        "modeling": "from torch import nn\nfrom transformers.near import near\n\n\nclass Own(nn.Module):\n    pass\n",
        "others": "def other(x):\n    return x\n",
    }
    for name, body in files.items():
        (tmp_path / f"{name}.py").write_text(body)
        spec = importlib.util.spec_from_file_location(f"transformers.{name}", tmp_path / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    own = sys.modules["transformers.modeling"].Own()
    keys = [key_of(own, [torch.zeros(2, 2)], "rows")]
    for changed in files:
        (tmp_path / f"{changed}.py").write_text(files[changed] + "# changed\n")
        keys.append(key_of(own, [torch.zeros(2, 2)], "rows"))
    assert len(set(keys)) == 4
    assert keys[-1] == keys[-2]  # what it does not name


def test_code_that_is_in_no_file_is_traced_each_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing would tell that it has changed."""
    own = type("Own", (nn.Linear,), {"__module__": "nowhere"})(8, 8).requires_grad_(False)
    rows = torch.ones(3, 8)
    compiled = compile_rows(own, lambda x: own(x), [rows], backend=kept([]), shelf=Shelf(tmp_path, "rows"))
    assert torch.equal(compiled(rows), own(rows))
    assert not list(tmp_path.iterdir())
    assert "is not kept" in caplog.text


def test_the_traces_used_last_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MOST_KEPT", 2)
    shelf = Shelf(tmp_path, "rows")
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.neg.default, (graph.placeholder("x"),)))
    made = traces.Trace(torch.fx.GraphModule(nn.Module(), graph), [])
    for number, name in enumerate("ab"):
        shelf.put(tmp_path / f"{name}.trace", made)
        os.utime(tmp_path / f"{name}.trace", (number + 1, number + 1))
    assert shelf.take(tmp_path / "a.trace") is not None
    shelf.put(tmp_path / "c.trace", made)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c"]
