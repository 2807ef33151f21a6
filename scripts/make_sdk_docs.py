#!/usr/bin/env python3
"""Writes docs/sdk.md, the reference of what `import tandem` offers, from docstrings and signatures.

They are read from the source, where those of attributes stand too. `--check` writes nothing, and fails if the page is
not what would be written.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import tandem

PAGE = Path(__file__).resolve().parents[1] / "docs/sdk.md"
WIDTH = 110

SECTIONS = {
    "Clients": "Client SyncCompletionStream AsyncClient CompletionStream",
    "What is asked": "SamplingParams StructuredOutputsParams ChatOptions TokensPrompt",
    "What is answered": "Completion Choice Chunk Usage Timings PositionLogprobs TokenLogprob",
    "Offline": "LLM RequestOutput CompletionOutput Logprob",
    "Exceptions": "TandemError ConfigurationError ServiceUnavailable VersionMismatch AuthenticationError ProtocolError "
    "OffsetError RequestError InvalidRequest Overloaded RequestFailed ModelChanged RequestTimeout RequestCancelled",
}

HEAD = """<!-- Written by scripts/make_sdk_docs.py from docstrings. Mend those, and run it. -->
# Python SDK

Everything here is imported from `tandem`. More on sampling parameters: [sampling.md](sampling.md); output of a given
form: [structured-output.md](structured-output.md); coming from vLLM: [migration.md](migration.md).
"""


def page() -> str:
    """The whole page. Raises SystemExit if a public name is in no section."""
    listed = [name for names in SECTIONS.values() for name in names.split()]
    if sorted(listed) != sorted(tandem.__all__):
        raise SystemExit(f"SECTIONS and tandem.__all__ differ: {sorted({*listed} ^ {*tandem.__all__})}")
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names.split():
            parts.extend(_class(getattr(tandem, name)))
    return "\n".join(parts)


def _class(thing: type) -> Iterator[str]:
    module = inspect.getmodule(thing)
    assert module is not None
    tree = ast.parse(inspect.getsource(module))
    plain = _Plain(module, tree)
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == thing.__name__)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"### `{node.name}{f'({bases})' if bases else ''}`\n"
    yield f"{ast.get_docstring(node)}\n"
    attributes: list[str] = []
    methods: list[str] = []
    for child, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name) and child.target.id[0] != "_":
            attributes.append(_attribute(child, after, plain))
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(one) for one in child.decorator_list}
            if "property" in decorators and child.name[0] != "_":
                kind = "" if child.returns is None else f": {ast.unparse(child.returns)}"
                attributes.append(_item(f"{child.name}{kind}", ast.get_docstring(child)))
            elif "overload" not in decorators and (child.name[0] != "_" or _is_told(child)):
                methods.append(_method(node.name, child, plain))
    if attributes:
        yield "\n".join(attributes) + "\n"
    yield from methods


def _is_told(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Constructors without a docstring are called by the library alone."""
    return node.name == "__init__" and ast.get_docstring(node) is not None


def _attribute(node: ast.AnnAssign, after: ast.stmt | None, plain: _Plain) -> str:
    text = f"{ast.unparse(node.target)}: {plain.text(node.annotation)}"
    if node.value is not None:
        text += f" = {plain.text(node.value)}"
    match after:
        case ast.Expr(value=ast.Constant(value=str(doc))):
            return _item(text, inspect.cleandoc(doc))
    return _item(text, None)


def _item(code: str, doc: str | None) -> str:
    return f"- `{code}`" + (f": {doc[0].lower() if doc[:2].istitle() else doc[0]}{doc[1:]}" if doc else "")


def _method(owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef, plain: _Plain) -> str:
    is_init = node.name == "__init__"
    name = owner if is_init else ("await " if isinstance(node, ast.AsyncFunctionDef) else "") + node.name
    ending = "" if is_init or node.returns is None else f" -> {ast.unparse(node.returns)}"
    arguments = list(_arguments(node.args, plain))
    call = f"{name}({', '.join(arguments)}){ending}"
    if len(call) > WIDTH:
        call = f"{name}(\n" + "".join(f"    {one},\n" for one in arguments) + f"){ending}"
    doc = ast.get_docstring(node)
    return f"```python\n{call}\n```\n" + (f"\n{doc}\n" if doc else "")


def _arguments(given: ast.arguments, plain: _Plain) -> Iterator[str]:
    """Each as it is written, `self` left out."""
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(given.defaults)), *given.defaults]
    for argument, default in list(zip(positional, defaults, strict=True))[1:]:
        yield _argument(argument, default, plain)
    if given.kwonlyargs:
        yield "*"
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield _argument(argument, default, plain)
    if given.kwarg is not None:
        yield f"**{ast.unparse(given.kwarg)}"


def _argument(argument: ast.arg, default: ast.expr | None, plain: _Plain) -> str:
    return ast.unparse(argument) + ("" if default is None else f" = {plain.text(default)}")


class _Plain(ast.NodeTransformer):
    """Types without what pydantic is told about them, private names for types and constants replaced by what they
    stand for."""

    def __init__(self, module: ModuleType, tree: ast.Module) -> None:
        self._module = module
        self._aliases = {
            node.target.id: node.value
            for node in tree.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
            if node.target.id.startswith("_") and ast.unparse(node.annotation) == "TypeAlias"
        }

    def text(self, node: ast.expr) -> str:
        return ast.unparse(self.visit(node))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self._aliases:
            alias: ast.expr = self.visit(self._aliases[node.id])
            return alias
        value = getattr(self._module, node.id, None)
        return ast.Constant(value) if node.id.isupper() and isinstance(value, int | float | str) else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
            inner: ast.expr = self.visit(node.slice.elts[0])
            return inner
        self.generic_visit(node)
        return node


def main() -> int:
    arguments = argparse.ArgumentParser(description="Writes docs/sdk.md from docstrings.")
    arguments.add_argument("--check", action="store_true", help="only say whether the page is current")
    text = page()
    if not arguments.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f"{PAGE.name} is not what the docstrings say: run scripts/make_sdk_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
