"""What a caller passes as `structured_outputs`, as it travels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from ..protocol.errors import InvalidRequest
from ..protocol.structured import StructuredOutputsParams, problem

FIELDS = tuple(f.name for f in fields(StructuredOutputsParams))


def wire_form(given: object) -> StructuredOutputsParams:
    """A StructuredOutputsParams or a dict of its fields, whose `json` may be a schema as text or dict, or a pydantic
    model. Raises InvalidRequest naming field, limit and value."""
    if isinstance(given, StructuredOutputsParams):
        values = {name: getattr(given, name) for name in FIELDS}
    elif isinstance(given, Mapping):
        values = dict(given)
    else:
        raise InvalidRequest(
            f"structured_outputs: expected a StructuredOutputsParams or a dict, got {type(given).__name__}",
            field="structured_outputs",
        )
    unknown = sorted(str(name) for name in values if name not in FIELDS)
    if unknown:
        raise _fault(unknown[0], f"unknown; these are known: {', '.join(FIELDS)}", None, unknown[0])
    if values.get("json") is not None:
        values["json"] = _schema(values["json"])
    if values.get("json_object") is None:
        values.pop("json_object", None)
    choice = values.get("choice")
    if isinstance(choice, str):
        raise _fault("choice", "expected a list of texts, got one text", None, choice)
    values["choice"] = () if choice is None else choice
    try:
        made = _adapter().validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        limit = next((value for key, value in first.get("ctx", {}).items() if key != "error"), None)
        where = ".".join(str(part) for part in first["loc"])
        raise _fault(where, f"{first['msg']}, got {first['input']!r:.100}", limit, first["input"]) from error
    found = problem(made)
    if found is not None:
        raise _fault(found.field, found.message, found.limit, found.value)
    return made


MAX_SCHEMA_TEXT = 1 << 20
"""Characters, with all whitespace; without it there are far fewer."""


def _schema(given: object) -> str:
    """JSON text of a schema."""
    if isinstance(given, type) and issubclass(given, BaseModel):
        given = given.model_json_schema()
    if isinstance(given, str):
        if len(given) > MAX_SCHEMA_TEXT:  # before it is read, which takes as long as it is
            message = f"a schema as text has at most {MAX_SCHEMA_TEXT} characters, and this has {len(given)}"
            raise _fault("json", message, MAX_SCHEMA_TEXT, len(given))
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise _fault("json", f"a schema is JSON, and this is not: {error}", None, str(given)[:100]) from error
    if not isinstance(given, Mapping | bool):
        raise _fault(
            "json",
            f"a JSON schema is an object, given as text, dict or pydantic model; got {type(given).__name__}",
            None,
            repr(given)[:100],
        )
    try:
        return json.dumps(given, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise _fault("json", f"cannot be written as JSON: {error}", None, repr(type(given))) from error


def _fault(name: str, message: str, limit: Any, value: Any) -> InvalidRequest:
    field = f"structured_outputs.{name}"
    return InvalidRequest(f"{field}: {message}", field=field, limit=limit, value=value)


@cache
def _adapter() -> TypeAdapter[StructuredOutputsParams]:
    return TypeAdapter(StructuredOutputsParams)
