"""Grammars that a stranger might send, each with a piece of the error that refuses it, or "" if it is harmless and is
followed."""

from __future__ import annotations

import json

from tandem.protocol.structured import StructuredOutputsParams

_ANY = " "
"""Which of the limits is met first is a matter of the machine."""


def _json(schema: object) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=schema if isinstance(schema, str) else json.dumps(schema))


def _regex(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=text)


def _lark(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(grammar=text)


def _fan(keyword: str, last: object) -> StructuredOutputsParams:
    """A schema of 30 levels, each of which refers to the next one twice."""
    levels = {f"d{i}": {"type": "array", keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    if keyword != "prefixItems":
        for level in levels.values():
            del level["type"]
    return _json({"$ref": "#/$defs/d0", "$defs": {**levels, "d30": last}})


HOSTILE: dict[str, tuple[StructuredOutputsParams, str]] = {
    "counts": (_regex("a{1,100000}{1,100000}"), ""),
    "count": (_regex("(ab|cd){1,1000000}"), ""),
    "exponential": (_regex("(a|b|ab)*" * 50 + "c{500}"), ""),
    "exponential-dfa": (_regex(".*a.{200}"), ""),
    "nested-groups": (_regex("(" * 10_000 + "a" + ")" * 10_000), "invalid regex"),
    "nested-stars": (_regex("(" * 3_000 + "a" + "+)*" * 3_000), "invalid regex"),
    "look-around": (_regex("(?=a)b"), "look-around"),
    "back-reference": (_regex(r"(a)\1"), "backreferences"),
    "unclosed": (_regex("((("), "unclosed group"),
    "all-of-unicode": (_regex(r"(\p{L}|\p{N}){1,1000}(\p{Lu}\p{Ll}){500}"), ""),
    "intersection": (_lark("start: T\nT: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(1, 40))), _ANY),
    "late-intersection": (
        _lark("start: T\nT: /z/ | (" + " & ".join(f"/qqqq(.*a.{{{i}}}b.*)/" for i in range(1, 40)) + ")"),
        _ANY,
    ),
    "complement": (_lark("start: T\nT: ~/.*a.{30}/"), ""),
    "doubling-terminals": (
        _lark("start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "a"'),
        _ANY,
    ),
    "doubling-rules": (
        _lark("start: t0\n" + "\n".join(f"t{i}: t{i + 1} t{i + 1}" for i in range(40)) + '\nt40: "a"'),
        "Too many items",
    ),
    "many-terminals": (
        _lark(
            "start: "
            + " | ".join(f"T{i}" for i in range(2_000))
            + "\n"
            + "\n".join(f"T{i}: /.*{i}.*/" for i in range(2_000))
        ),
        "items",
    ),
    "left-recursion": (_lark('start: start start | "a" |'), ""),
    "ambiguity": (_lark('start: a a a a a a\na: b b b b b b\nb: c*\nc: /[a-z]*/ | "x" | start'), ""),
    "unknown-rule": (_lark("start: nowhere\n"), "unknown name"),
    "no-grammar": (_lark("\x00\x01 what?"), "GBNF"),
    "nested-lark": (_lark("start: " + "(" * 10_000 + '"a"' + ")" * 10_000), "nested"),
    "nested-gbnf": (_lark("root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000), "recursion"),
    "endless-rule": (_lark("start: a\na: a"), "nothing that the model can write"),
    "schema-of-nothing": (_json({"type": "string", "enum": [1]}), "Unsatisfiable"),
    "schema-not-json": (_json("{"), "expected"),
    "schema-not-object": (_json("[1]"), "object or boolean"),
    "nested-schema": (_json('{"type":"array","items":' * 2_000 + "{}" + "}" * 2_000), "recursion limit"),
    "endless-references": (
        _json({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        "nothing that the model can write",
    ),
    "reference-fan": (_fan("prefixItems", {"type": "null"}), ""),
    "all-of-fan": (_fan("allOf", {"type": "string"}), ""),
    "any-of-fan": (_fan("anyOf", {"type": "string"}), ""),
    "any-of-product": (
        _json(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}": {"type": t}}} for t in ("string", "integer")]}
                    for i in range(20)
                ]
            }
        ),
        "too large",
    ),
    "huge-enum": (_json({"enum": list(range(10_000))}), ""),
    "huge-strings": (_json({"type": "string", "minLength": 1_000_000, "maxLength": 100_000_000}), ""),
    "huge-array": (
        _json({"type": "array", "minItems": 100_000, "maxItems": 1_000_000, "items": {"type": "integer"}}),
        "",
    ),
    "many-properties": (
        _json({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(2_400)}}),
        "items",
    ),
    "patterns": (
        _json({"patternProperties": {f"^p{i}.*x{{{i}}}$": {"type": "string"} for i in range(500)}}),
        "disjoint",
    ),
    "pattern-counts": (_json({"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}), ""),
    "remote-reference": (_json({"$ref": "https://example.com/schema.json"}), "does not fetch"),
    "file-reference": (_json({"$ref": "file:///etc/passwd"}), "does not fetch"),
    "zalgo": (_json({"enum": ["e" + "\u0301" * 5_000, "\U0010ffff" * 1_000, "\u202e" * 1_000]}), "satisfy the grammar"),
}
