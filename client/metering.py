"""What a template may use, and what its operations would make, measured before they are done."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jinja2

MAX_WIDTH = 1_000
"""Largest width, indent or precision that a template may ask for."""
MAX_NODES = 200_000
"""Most values in one nested list or dict."""
MAX_DEPTH = 100
MAX_INT_BITS = 4_096


class TemplateLimitError(jinja2.TemplateError):
    """The template asked for more than it may have."""


@dataclass(slots=True)
class Budget:
    """What one rendering may use: `turns` of loops and macro calls, a `size` of one value and a `total` of all values
    together that were ever made (characters, or an eighth of it list elements), and `seconds`."""

    turns: int = 500_000
    size: int = 8 << 20
    total: int = 512 << 20
    seconds: float = 10.0
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    def turn(self) -> None:
        self.turns -= 1
        if self.turns < 0:
            raise TemplateLimitError("the template's loops and macros run over the limit of turns")
        if not self.turns & 63 and time.monotonic() > self.deadline:
            raise TemplateLimitError(f"the template runs longer than {self.seconds:g} s")

    def admit(self, size: int) -> None:
        """Before or after a value of this size is made."""
        self._check(size)
        self.total -= size
        if self.total < 0:
            raise TemplateLimitError("the template makes too many large values")

    def admit_value(self, value: object) -> None:
        if isinstance(value, str | bytes):
            self.admit(len(value))
        elif isinstance(value, list | tuple):
            self.admit(8 * len(value))

    def _check(self, size: int) -> None:
        if size > self.size:
            raise TemplateLimitError(f"the template makes a value of over {self.size} characters or elements")

    def measure(self, value: object) -> None:
        """Refuses a value that would be too large as text: too long, too many parts, nested too deeply."""
        if isinstance(value, str | bytes):
            self._check(len(value))
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self._measure_container(value)

    def _measure_container(self, value: object) -> None:
        left, size = MAX_NODES, 0
        stack: list[tuple[object, int]] = [(value, 0)]
        while stack:
            item, depth = stack.pop()
            left -= 1
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, list | tuple | dict | set | frozenset):
                left -= len(item)
                if left >= 0:
                    parts: Iterable[object] = item
                    if isinstance(item, dict):
                        parts = [*item.keys(), *item.values()]
                    stack.extend((part, depth + 1) for part in parts)
            if left < 0 or depth > MAX_DEPTH:
                raise TemplateLimitError(f"the template makes a value of over {MAX_NODES} parts or {MAX_DEPTH} levels")
        self._check(size)


def _require_width(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise TemplateLimitError(f"the template asks for a width of {value}; the limit is {MAX_WIDTH}")
        if isinstance(value, str) and len(value) > MAX_WIDTH:
            raise TemplateLimitError(f"the template pads with {len(value)} characters; the limit is {MAX_WIDTH}")


_LONG_NUMBER = re.compile(r"\d{4,}")


def _require_small_format(template: str, args: Iterable[object]) -> None:
    if _LONG_NUMBER.search(template):
        raise TemplateLimitError(f"the template formats with a width of over {MAX_WIDTH}")
    if "*" in template or re.search(r"\{[^{}]*\{", template):
        _require_width(args)


def require_growth(budget: Budget, name: str, value: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Measures, before the work is done, what the growing filter or method `name` would make of `value`."""
    rest = (*args, *kwargs.values())
    for part in (value, *rest):
        budget.measure(part)
    if name == "replace" and len(args) >= 2 and isinstance(value, str):
        old, new = str(args[0]), str(args[1])
        budget.admit(len(value) + value.count(old) * len(new))
    elif name == "join":
        separator = value if isinstance(value, str) and args and not isinstance(args[0], str) else None
        items, between = (args[0], separator) if separator is not None else (value, str(args[0]) if args else "")
        if isinstance(items, list | tuple | dict | str | range):
            budget.admit(len(items) * len(between or ""))
    elif name in ("format", "format_map", "%"):
        _require_small_format(str(value), rest)
    elif name == "sum":
        if any(isinstance(part, list | tuple | str) for part in args[1:]) or isinstance(
            kwargs.get("start"), list | tuple | str
        ):
            raise TemplateLimitError("the template sums lists or text; only numbers can be summed")
    elif name in _PADDING:
        _require_width(rest)
        if isinstance(value, str | bytes):
            text = value if isinstance(value, str) else value.decode("latin-1")
            budget.admit(len(text) + MAX_WIDTH * (text.count("\t") if name == "expandtabs" else 0))
            if name == "indent":
                budget.admit(len(text) + MAX_WIDTH // 8 * text.count("\n"))
    elif name == "translate":
        raise TemplateLimitError("the template uses translate, which is not offered to templates")


_PADDING = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "round", "to_bytes"}
)
GROWING = _PADDING | {"replace", "join", "format", "format_map", "sum", "translate"}
