"""What a caller may pass as structured_outputs, and what travels."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from tandem import InvalidRequest, StructuredOutputsParams
from tandem.client.structured import MAX_SCHEMA_TEXT, wire_form
from tandem.protocol.codec import decode, encode
from tandem.protocol.structured import MAX_CHOICES, MAX_GRAMMAR_BYTES, problem


class Person(pydantic.BaseModel):
    name: str
    age: int


SCHEMA = {"type": "object", "properties": {"é": {"type": "null"}}}


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (SCHEMA, SCHEMA),
        (json.dumps(SCHEMA), SCHEMA),
        ("  {}  ", {}),
        (True, True),
        (Person, Person.model_json_schema()),
    ],
)
def test_a_schema_may_be_text_or_dict_or_pydantic_model(given: Any, schema: Any) -> None:
    for made in (wire_form({"json": given}), wire_form(StructuredOutputsParams(json=given))):
        assert made.json is not None
        assert json.loads(made.json) == schema
        assert decode(encode(made), StructuredOutputsParams) == made
        assert problem(made) is None


def test_other_kinds_travel_as_they_are() -> None:
    for given in ({"regex": "a+"}, {"grammar": "start: /a/"}, {"choice": ("a", "b")}, {"json_object": True}):
        made = wire_form({**given, "json": None})
        assert made == StructuredOutputsParams(**given)
        assert made.kind == next(iter(given))
        assert decode(encode(made), StructuredOutputsParams) == made
    assert wire_form({"choice": ["a"]}).choice == ("a",)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("[a-z]", ""),
        ({}, "json"),
        ({"json": None}, "json"),
        ({"json": "{"}, "json"),
        ({"json": "[" * 100_000}, "json"),
        ({"json": 7}, "json"),
        ({"json": int}, "json"),
        ({"json": {"enum": [object()]}}, "json"),
        ({"json": {"const": "x" * MAX_GRAMMAR_BYTES}}, "json"),
        ({"json": {}, "regex": "a"}, "regex"),
        ({"regex": 7}, "regex"),
        ({"regex": "é" * (MAX_GRAMMAR_BYTES // 2 + 1)}, "regex"),
        ({"regex": "\ud800"}, "regex"),
        ({"choice": "yes"}, "choice"),
        ({"choice": []}, "json"),
        ({"choice": ["a", 7]}, "choice.1"),
        ({"choice": ["a", "\udfff"]}, "choice.1"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "choice"),
        ({"json_object": "yes"}, "json_object"),
        ({"regex": "a", "whitespace_pattern": "_"}, "whitespace_pattern"),
        ({"json_object": True, "whitespace_pattern": "_", "disable_any_whitespace": True}, "whitespace_pattern"),
        ({"json_schema": {}}, "json_schema"),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(given: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire_form(given)
    assert caught.value.field == f"structured_outputs.{field}".removesuffix(".")
    assert len(str(caught.value)) < 500


def test_a_schema_as_text_is_bounded_before_it_is_read() -> None:
    schema = '{"type": "boolean"}'
    padded = schema + " " * (MAX_SCHEMA_TEXT - len(schema))
    assert wire_form({"json": padded}) == wire_form({"json": schema})
    for text in (padded + " ", "[" * (MAX_SCHEMA_TEXT + 1)):
        with pytest.raises(InvalidRequest, match=f"at most {MAX_SCHEMA_TEXT} characters") as refused:
            wire_form({"json": text})
        assert refused.value.field == "structured_outputs.json"
