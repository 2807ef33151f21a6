"""The arrows of docs/architecture.md: who imports whom, who may import torch, and that every package is installed.

Read from the syntax trees, so that an import inside a function or under TYPE_CHECKING counts as well.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.deadlines import DEADLINE_S

ROOT = Path(__file__).resolve().parents[1]
NOT_CODE = {"tests", "docs", "scripts", "build", "dist"}

# What each package may import of ours, besides itself.
ARROWS = {
    "protocol": set[str](),
    "scheduler": {"protocol"},
    "worker": {"protocol"},
    "client": {"protocol"},
    "gateway": {"client", "protocol"},
    "launch": {"protocol", "scheduler", "worker", "client", "gateway", "bench"},
    "bench": {"protocol", "scheduler", "worker", "client", "gateway", "launch"},
    "__main__": {"launch"},
    "": {"protocol", "client", "launch"},  # the root __init__.py, which re-exports
}
# The model runs in worker/; the built-in model's training and the benchmarks of peers run models of their own.
MAY_IMPORT_TORCH = ("worker.", "launch.builtin.", "bench.")
HEAVY = {"torch", "transformers", "triton", "flashinfer"}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name below `tandem` ("" is the root __init__.py)."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in NOT_CODE or any(part.startswith(".") for part in parts):
            continue
        found[".".join(parts)[: -len(".py")].removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()


def imported(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of what a module imports, ours as `tandem.…`, with the line."""
    package = f"tandem.{name}".removesuffix(".").split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            assert node.level <= len(package), f"{path}:{node.lineno} imports from above the package"
            source = ".".join(base + ([node.module] if node.module else []))
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                dots = len(first.value) - len(first.value.lstrip("."))
                base = package[: len(package) - dots + 1] if dots else []
                yield ".".join([*base, first.value.lstrip(".")]), node.lineno


def package_of(absolute: str) -> str | None:
    """`scheduler` for `tandem.scheduler.core`, "" for a name that the root gives, None for what is not ours."""
    parts = absolute.split(".")
    if parts[0] != "tandem":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ARROWS else ""


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_one_way(package: str) -> None:
    wrong = []
    for name, path in MODULES.items():
        if name.split(".")[0] != package:
            continue
        for target, line in imported(name, path):
            other = package_of(target)
            if other is not None and other != package and other not in ARROWS[package]:
                what = target if other else f"{target}, which is the public API"
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {what}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_its_arrows() -> None:
    assert {name.split(".")[0] for name in MODULES} <= set(ARROWS)


@pytest.mark.parametrize("package", ["protocol", "scheduler", "worker", "client", "gateway", "launch"])
def test_the_architecture_page_names_every_module_and_no_other(package: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(rf"^### `{package}/`\n(.*?)(?=^#|^`bench/`)", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    named = set(re.findall(r"`(\w+/?)`", section[1]))
    inside = {name.split(".")[1] for name in MODULES if name.startswith(f"{package}.")}
    assert named == {f"{name}/" if (ROOT / package / name).is_dir() else name for name in inside}


def test_torch_stays_where_models_run() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in MODULES.items()
        if not f"{name}.".startswith(MAY_IMPORT_TORCH)
        for target, line in imported(name, path)
        if target.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["", "protocol", "scheduler", "client", "gateway", "launch"])
def test_importing_does_not_bring_torch(package: str) -> None:
    """What the syntax trees cannot see: torch arriving through somebody else's package."""
    names = [f"tandem.{name}".removesuffix(".") for name in MODULES if name.split(".")[0] == package]
    names = [name for name in names if not f"{name}.".startswith("tandem.launch.builtin.")]
    if not names:
        return  # the package has no code yet
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [], f"importing {names} imports {run.stdout}"


def test_root_only_reexports() -> None:
    allowed = (ast.Import, ast.ImportFrom)
    for node in ast.parse(MODULES[""].read_text()).body:
        if isinstance(node, allowed):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        if isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) and t.id[:2] == "__" for t in node.targets):
            continue  # __all__, __version__
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__"):
            continue  # a lazy re-export
        pytest.fail(f"__init__.py:{node.lineno} does more than re-export: {ast.unparse(node)[:80]}")


def test_no_module_imports_by_absolute_own_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "tandem")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "tandem" for alias in node.names))
    ]
    assert not wrong, f"import relatively inside the package: {wrong}"


def test_installed_packages_are_those_of_the_tree() -> None:
    """pyproject.toml names each package, because the root is one itself and automatic discovery cannot see that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = set(project["tool"]["setuptools"]["packages"])
    present = {f"tandem.{name}".removesuffix(".") for name, path in MODULES.items() if path.name == "__init__.py"}
    assert named == present
