"""Random JSON schemas with finitely many instances, apart from whitespace: every part has a bound."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

WORDS = "name age city tags score id kind note size when ok items count path owner état 名前".split()


def bounded_schema(seed: int) -> dict[str, Any]:
    """An object of up to five properties, nested up to three deep, with most of the keywords that people use."""
    rng = random.Random(seed)
    definitions: dict[str, Any] = {}
    schema = _object(rng, 0, definitions)
    if definitions:
        schema["$defs"] = definitions
    return schema


_Maker = Callable[[random.Random, int, dict[str, Any]], dict[str, Any]]


def _any(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    simple: list[_Maker] = [_string, _integer, _enum, _const, _boolean, _pattern, _format]
    nested: list[_Maker] = [_object, _array, _tuple, _any_of, _reference]
    make = rng.choice(simple if depth >= 3 else simple + nested)
    return make(rng, depth, definitions)


def _object(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 5 - depth))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth + 1, definitions) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {
        "type": "array",
        "items": _any(rng, depth + 1, definitions),
        "minItems": least,
        "maxItems": least + rng.randint(0, 3),
    }


def _tuple(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    parts = [_any(rng, depth + 1, definitions) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any_of(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth + 1, definitions) for _ in range(rng.randint(2, 3))]}


def _reference(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    name = f"d{len(definitions)}"
    definitions[name] = {}  # its number is taken
    definitions[name] = _any(rng, 3, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _string(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(1, 12)}


def _pattern(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> dict[str, Any]:
    pattern = rng.choice([r"^[A-Z]{2}[0-9]{2,4}$", r"^(red|green|blue)(-[a-z]{1,3})?$", r"^\d{3}-\d{4}$", "^x+y{2}$"])
    return {"type": "string", "pattern": pattern, "maxLength": 12}


def _format(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(["date", "uuid", "ipv4"])}


def _integer(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> dict[str, Any]:
    least = rng.randint(-1_000, 1_000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 10_000)}


def _enum(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> dict[str, Any]:
    return {"enum": rng.sample([*WORDS, 1, 2.5, None, True, 'a "quoted" one', "new\nline"], rng.randint(1, 6))}


def _const(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> dict[str, Any]:
    return {"const": rng.choice([*WORDS, 7, None, False])}


def _boolean(rng: random.Random, _depth: int, _definitions: dict[str, Any]) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null"])}
