"""Command-line flags made from the fields of the processes' configurations, so that each option is defined once.

A flag that was not given is None, which tells it from one that was given its default; the help names the default.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Parameter = inspect.Parameter


@dataclass(frozen=True)
class Group:
    """The fields of a configuration that a command offers as flags, under a heading of its help."""

    model: type[BaseModel]
    heading: str
    without: Collection[str] = ()
    """Fields that the launcher sets itself."""

    @property
    def names(self) -> list[str]:
        return [name for name in self.model.model_fields if name not in self.without]


def flags(*groups: Group) -> list[Parameter]:
    """Keyword parameters for typer, one for each field of the groups; a field that two groups share appears once."""
    found: dict[str, Parameter] = {}
    for group in groups:
        for name in group.names:
            if name not in found:
                found[name] = _flag(name, group.model.model_fields[name], group.heading)
    return list(found.values())


def option_names(parameters: Sequence[Parameter]) -> list[str]:
    """Which options a configuration file may hold for a command with these flags."""
    return [parameter.name for parameter in parameters]


def with_flags(parameters: Sequence[Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates `command(..., **options)`: the keyword rest becomes the given flags, seen by typer one by one."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not Parameter.VAR_KEYWORD
        ]
        own_names = {parameter.name for parameter in own}

        def called(**given: Any) -> None:
            arguments = {name: value for name, value in given.items() if name in own_names}
            options = {name: value for name, value in given.items() if name not in own_names}
            command(**arguments, **options)

        called.__name__ = command.__name__
        called.__doc__ = command.__doc__
        called.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
        return called

    return decorate


def flag(
    name: str, kind: Any, heading: str, help_text: str, default: object = None, metavar: str | None = None
) -> Parameter:
    """A flag `--name` of a plain type (bool, int, float, str), None where it is not given; `default` is what the help
    says."""
    dashed = name.replace("_", "-")
    declared = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
    if default not in (None, "", False):
        help_text = f"{help_text.removesuffix('.')} (default {default})."
    option = typer.Option(declared, help=help_text, rich_help_panel=heading, metavar=metavar, show_default=False)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _flag(name: str, field: FieldInfo, heading: str) -> Parameter:
    kind, choices = plain(field.annotation)
    help_text = field.description or ""
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        default = json.dumps(default) if default else None
    return flag(name, kind, heading, help_text, default, "|".join(map(str, choices)) if choices else None)


def plain(annotation: Any) -> tuple[type, tuple[Any, ...]]:
    """The type that a flag's text is converted to, and the only values if there is a list of them."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return plain(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        (inner,) = (part for part in typing.get_args(annotation) if part is not type(None))
        return plain(inner)
    if origin is Literal:
        choices = typing.get_args(annotation)
        return type(choices[0]), choices
    if origin is tuple:  # written as a JSON list, which the configuration's field reads
        return str, ()
    if annotation in (bool, int, float, str):
        return annotation, ()
    raise TypeError(f"no flag can be made from the type {annotation!r}")
