"""A jinja2 environment in which a template of unknown origin cannot reach Python, nor use time or memory without bound.

jinja2's sandbox keeps a template from Python's internals. It does not bound what a template costs: nested loops, text
doubled in a loop, `"x" * 10**9`. Here every loop turn and macro call is counted, everything that can grow text or
lists is measured before it is done, and a deadline ends what slips through. Templates see plain JSON-like data only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .metering import GROWING, MAX_INT_BITS, Budget, TemplateLimitError, require_growth

MAX_SOURCE_CHARS = 128 * 1024

REMOVED_FILTERS = frozenset({"urlize", "wordwrap", "xmlattr", "pprint", "random"})
REMOVED_GLOBALS = frozenset({"lipsum"})

_budget: ContextVar[Budget] = ContextVar("budget")


class _Metering(Extension):
    """The calls that _Rewriter writes into templates, and the `generation` tag of training templates, which renders
    what it holds."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Callable[[], str]) -> str:
        return caller()

    def turn(self) -> str:
        _budget.get().turn()
        return ""

    def join(self, *parts: object) -> str:
        return _join(_text(part) for part in parts)

    def part(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        result = value[start:stop:step]
        _budget.get().admit_value(result)
        return result


class _Rewriter(NodeTransformer):
    """Puts a count into every loop and macro body, and makes measured calls of `~` and of slices."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("turn", [])).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join", node.nodes).set_lineno(node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        borders = [border or nodes.Const(None) for border in (node.arg.start, node.arg.stop, node.arg.step)]
        return _call("part", [node.node, *borders]).set_lineno(node.lineno)


def _call(method: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.ExtensionAttribute(_Metering.identifier, method), args, [], None, None)


def _text(value: object) -> str:
    _budget.get().measure(value)
    return str(value)


def _join(parts: Iterable[str]) -> str:
    budget, pieces = _budget.get(), []
    left = budget.size
    for part in parts:
        left -= len(part)
        if left < 0:
            break
        pieces.append(part)
    budget.admit(budget.size - left)
    return "".join(pieces)


def _finalize(value: object) -> object:
    """Called with everything that is about to be printed."""
    if type(value) is not str:
        budget = _budget.get(None)
        if budget is not None:
            budget.measure(value)
    return value


def _guard_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skip = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        if len(args) > skip:
            if isinstance(args[skip], Iterator):
                args = (*args[:skip], list(args[skip]), *args[skip + 1 :])  # so that it can be measured
            if name in GROWING:
                require_growth(_budget.get(), name, args[skip], args[skip + 1 :], kwargs)
            else:
                budget.measure(args[skip])
        result = function(*args, **kwargs)
        budget.admit_value(result)
        return result

    return guarded


class _Namespace(Namespace):
    """jinja2's namespace, with names that start with an underscore refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


class _DictMaker:
    """`dict(...)` and `dict.fromkeys(...)`, without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. Only `render_bounded` may render its templates: a rendering needs a Budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_join)

    def __init__(self, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Metering, "jinja2.ext.loopcontrols"],
            finalize=_finalize,
            cache_size=0,
        )
        self.filters.update(filters)
        self.filters = {
            name: _guard_filter(name, function)
            for name, function in self.filters.items()
            if name not in REMOVED_FILTERS
        }
        for name in REMOVED_GLOBALS:
            del self.globals[name]
        self.globals.update(functions)
        self.globals["dict"] = _DictMaker()
        self.globals["namespace"] = _Namespace

    def compile_bounded(self, source: str) -> jinja2.Template:
        """The template. Raises jinja2.TemplateError if it is too long, nested too deeply, or no template."""
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateLimitError(f"the template has {len(source)} characters; the limit is {MAX_SOURCE_CHARS}")
        token = _budget.set(Budget())
        try:
            tree = _Rewriter().visit(self.parse(source))
            return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))
        except RecursionError:
            raise TemplateLimitError("the template is nested too deeply") from None
        finally:
            _budget.reset(token)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "%" and isinstance(left, str | bytes):
            values = right if isinstance(right, tuple) else (right,)
            require_growth(_budget.get(), "%", left if isinstance(left, str) else left.decode("latin-1"), values, {})
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                    budget.admit(len(one) * max(other, 0))
        elif operator == "+" and isinstance(left, str | bytes | list | tuple) and isinstance(right, type(left)):
            budget.admit(len(left) + len(right))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INT_BITS:
                raise TemplateLimitError(f"the template calculates with a number of over {MAX_INT_BITS} bits")
        result = super().call_binop(context, operator, left, right)
        budget.admit_value(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        name = getattr(__obj, "__name__", None)
        owner = getattr(__obj, "__self__", None)
        if owner is None and hasattr(__obj, "__wrapped__"):  # jinja2's stand-in for str.format
            owner = getattr(__obj.__wrapped__, "__self__", None)
        if name in GROWING and isinstance(owner, str | bytes | int):
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            require_growth(_budget.get(), str(name), owner, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        _budget.get().admit_value(result)
        return result


def render_bounded(template: jinja2.Template, variables: Mapping[str, Any], budget: Budget) -> str:
    """Renders within `budget`. Raises TemplateLimitError beyond it, and whatever else the template raises."""
    token = _budget.set(budget)
    try:
        return template.render(variables)
    except RecursionError:
        raise TemplateLimitError("the template calls itself too deeply") from None
    finally:
        _budget.reset(token)
