"""From flags and a configuration file to validated options. A flag beats the file; what neither names keeps its
default; what nobody knows is refused."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ..protocol.errors import ConfigurationError

Options = Mapping[str, Any]
"""Values by field name (`max_num_seqs`), as the user gave them."""

M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, in which a key that is given twice is an error and not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a name must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_file(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options of a YAML file: a mapping whose keys are flags without their dashes (`max-num-seqs: 64`).

    Raises ConfigurationError if it cannot be read, is no mapping, or names an option that is not in `known` (field
    names), telling the nearest valid name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the configuration file {path} is not UTF-8 text") from error
    try:
        loaded = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the configuration file {path} is not valid YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigurationError(
            f"the configuration file {path} must hold options as `name: value`, not a {type(loaded).__name__}"
        )
    options = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigurationError(f"the configuration file {path}: {unknown_option(str(key), known)}")
        if name in options:
            raise ConfigurationError(f"the configuration file {path}: {key!r} is given twice")
        options[name] = value
    return options


def unknown_option(given: str, known: Collection[str]) -> str:
    """A sentence that refuses an option and names the nearest valid one, or all if none is near."""
    flags = {name.replace("_", "-") for name in known}
    near = difflib.get_close_matches(given.replace("_", "-"), sorted(flags), n=1)
    if near:
        return f"unknown option {given!r}; did you mean {near[0]!r}?"
    return f"unknown option {given!r}; known are {', '.join(sorted(flags))}"


def merged(flags: Options, file: Options) -> dict[str, Any]:
    """The file's options, and over them the flags that were given (those that are not None)."""
    return {**file, **{name: value for name, value in flags.items() if value is not None}}


def build(model: type[M], options: Options, /, **fixed: Any) -> M:
    """A validated configuration from those of `options` that `model` has, and from `fixed`, which the launcher sets.

    Raises ConfigurationError that names each bad option, what it may be and what it was.
    """
    values = {name: value for name, value in options.items() if name in model.model_fields}
    for name, value in values.items():
        if isinstance(value, bool) and model.model_fields[name].annotation is not bool:
            raise ConfigurationError(f"--{name.replace('_', '-')}: {str(value).lower()} is not a value it can have")
    try:
        return model.model_validate({**values, **fixed})
    except ValidationError as error:
        raise ConfigurationError("; ".join(_sentence(detail) for detail in error.errors())) from error


def _sentence(detail: Any) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return str(message)
    flag = "--" + str(detail["loc"][0]).replace("_", "-")
    message = message[:1].lower() + message[1:]
    if detail["type"] == "missing":
        return f"{flag} is needed"
    return f"{flag}: {message}, not {detail['input']!r}"
