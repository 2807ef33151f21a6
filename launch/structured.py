"""Flags that say what answers must look like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..protocol.errors import ConfigurationError, InvalidRequest
from .options import Parameter, flag

_FLAGS: Final = {"json_schema": "json", "json_object": "json_object", "regex": "regex", "choice": "choice",
                 "grammar": "grammar"}  # fmt: skip
"""Flags, and the fields of StructuredOutputsParams that they give."""
_FILES: Final = ("json_schema", "grammar")


def structured_flags() -> list[Parameter]:
    """At most one of them may be given."""
    heading = "Structured output (one of these)"
    return [
        flag("json_schema", str, heading, "File with a JSON schema that answers follow.", metavar="FILE"),
        flag("json_object", bool, heading, "Answers are JSON objects."),
        flag("regex", str, heading, "Regular expression that answers match as a whole."),
        flag("choice", list[str], heading, "Answers are one of these texts; give the flag once for each."),
        flag("grammar", str, heading, "File with a grammar (Lark or GBNF) that answers follow.", metavar="FILE"),
    ]


def with_structure(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request whose flags of structured output have become the client's argument. Raises ConfigurationError naming
    the flag."""
    from ..client.structured import wire_form

    given = {name: request[name] for name in _FLAGS if request.get(name)}
    rest = {name: value for name, value in request.items() if name not in _FLAGS}
    if not given:
        return rest
    if len(given) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigurationError(f"{flags} each say what answers look like; give one of them")
    ((name, value),) = given.items()
    dashed = "--" + name.replace("_", "-")
    if name in _FILES:
        value = _read(dashed, value)
    try:
        return {**rest, "structured_outputs": wire_form({_FLAGS[name]: value})}
    except InvalidRequest as error:
        _, _, story = str(error).partition(": ")
        raise ConfigurationError(f"{dashed}: {story}") from error


def _read(dashed: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{dashed}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{dashed}: {path} is not UTF-8 text") from error
