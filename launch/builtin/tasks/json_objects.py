"""JSON on request: objects with given fields, lists, and facts read out of a sentence."""

import json

from ..chat import JsonObject
from .source import Exchange, Source, held_out_by_prompt
from .words import ADJECTIVES, ANIMALS, CITIES, COLORS, COMMON_WORDS, FOODS, NAMES, THINGS, a

_TEXT_KEYS: dict[str, tuple[str, ...]] = {
    "name": NAMES, "first_name": NAMES, "friend": NAMES, "author": NAMES, "owner": NAMES, "user": NAMES,
    "city": CITIES, "hometown": CITIES, "color": COLORS, "animal": ANIMALS, "pet": ANIMALS, "food": FOODS,
    "fruit": FOODS, "item": THINGS, "product": THINGS, "thing": THINGS, "mood": ADJECTIVES, "title": COMMON_WORDS,
    "word": COMMON_WORDS, "tag": COMMON_WORDS, "topic": COMMON_WORDS, "type": COMMON_WORDS, "label": COMMON_WORDS,
    "category": COMMON_WORDS, "status": ("open", "closed", "new", "done", "active"),
    "size": ("small", "medium", "large"),
}  # fmt: skip
_NUMBER_KEYS = (
    "age",
    "price",
    "count",
    "id",
    "year",
    "number",
    "quantity",
    "score",
    "height",
    "weight",
    "stock",
    "level",
    "total",
    "amount",
    "width",
)
_BOOLEAN_KEYS = ("active", "open", "available", "admin", "paid", "ready", "done", "visible", "happy", "valid")
_ASK = (
    "Give me a JSON object with {x}.", "Write a JSON object with {x}.", "Make a JSON object with {x}.",
    "Create a JSON object with {x}.", "JSON object with {x}", "Return JSON with {x}.", "Please write JSON with {x}.",
    "Can you make a JSON object with {x}?", "Generate JSON: {x}", "Output a JSON object with {x}.",
    "Turn this into JSON: {x}", "Convert to JSON: {x}", "Write this as JSON: {x}", "Give me JSON for {x}.",
    "I need a JSON object with {x}.",
)  # fmt: skip
_ABOUT = (
    "Give me a JSON object about {x}.", "Describe {x} as JSON.", "Write {x} as a JSON object.",
    "Turn this into JSON: {x}", "Convert this to JSON: {x}", "Make a JSON object for {x}.", "JSON for {x}",
)  # fmt: skip


def _value(s: Source, key: str) -> object:
    if key in _NUMBER_KEYS:
        return s.integer(1900, 2030) if key == "year" else s.number()
    if key in _BOOLEAN_KEYS:
        return s.chance(0.5)
    return s.pick(_TEXT_KEYS[key])


def _fields(s: Source, count: int) -> JsonObject:
    keys: list[str] = []
    while len(keys) < count:
        kind = s.rng.random()
        key = (
            s.pick(tuple(_TEXT_KEYS)) if kind < 0.5 else s.pick(_NUMBER_KEYS) if kind < 0.85 else s.pick(_BOOLEAN_KEYS)
        )
        if s.chance(0.08):
            key = s.pick(COMMON_WORDS)
        if key not in keys:
            keys.append(key)
    known = {*_TEXT_KEYS, *_NUMBER_KEYS, *_BOOLEAN_KEYS}
    return {key: _value(s, key) if key in known else s.pick((s.number(), s.pick(COMMON_WORDS))) for key in keys}


def _phrase(s: Source, fields: JsonObject) -> str:
    style = s.rng.random()
    if style < 0.45:
        pairs = [f"{key} {json.dumps(value)}" for key, value in fields.items()]
    elif style < 0.75:
        pairs = [f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in fields.items()]
    elif style < 0.88:
        return ", ".join(
            f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in fields.items()
        )
    else:
        return ", ".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in fields.items()
        )
    return ", ".join(pairs[:-1]) + " and " + pairs[-1] if len(pairs) > 1 else pairs[0]


def dumped(value: object) -> str:
    """JSON as the model writes it."""
    return json.dumps(value, ensure_ascii=False)


def json_fields(s: Source) -> Exchange:
    """An object with fields that the request names."""
    fields = s.problem(lambda: _fields(s, s.pick((1, 2, 2, 3, 3, 4))), lambda drawn: f"json {dumped(drawn)}")
    return s.pick(_ASK).format(x=_phrase(s, fields)), dumped(fields)


def _described(s: Source) -> tuple[str, JsonObject]:
    name, age, city, animal = s.pick(NAMES), s.integer(1, 99), s.pick(CITIES), s.pick(ANIMALS)
    kind = s.integer(0, 4)
    if kind == 0:
        return f"a person named {name}, {age} years old, from {city}", {"name": name, "age": age, "city": city}
    if kind == 1:
        return f"{a(animal)} called {name} that is {age} years old", {"animal": animal, "name": name, "age": age}
    if kind == 2:
        thing, color = s.pick(THINGS), s.pick(COLORS)
        return f"{a(color)} {thing} that costs {age} dollars", {"item": thing, "color": color, "price": age}
    if kind == 3:
        return f"{name} is {age} years old and lives in {city}", {"name": name, "age": age, "city": city}
    friend = s.pick(NAMES)
    return f"{name} who lives in {city} and has a friend called {friend}", {
        "name": name,
        "city": city,
        "friend": friend,
    }


def json_described(s: Source) -> Exchange:
    """An object read out of a description."""
    text, fields = s.problem(lambda: _described(s), lambda drawn: f"described {drawn[0]}")
    return s.pick(_ABOUT).format(x=text), dumped(fields)


@held_out_by_prompt
def json_nested(s: Source) -> Exchange:
    """A list, or an object that holds a list or another object."""
    kind = s.integer(0, 2)
    words = s.rng.sample(COMMON_WORDS, s.integer(2, 5))
    if kind == 0:
        items: list[object] = list(words) if s.chance(0.5) else [s.number() for _ in words]
        frames = (
            "Give me a JSON list with {x}.",
            "Write a JSON array with {x}.",
            "Make a JSON list of {x}.",
            "Turn this list into JSON: {x}",
        )
        return s.pick(frames).format(x=", ".join(map(str, items))), dumped(items)
    if kind == 1:
        name, key = s.pick(NAMES), s.pick(("tags", "words", "items", "friends", "topics"))
        items = list(words)
        request = s.pick(_ASK[:8]).format(x=f"name {name} and a list {key} with {', '.join(words)}")
        return request, dumped({"name": name, key: items})
    fields, key = _fields(s, s.integer(1, 2)), s.pick(("user", "data", "address", "owner", "result", "item"))
    return s.pick(_ASK[:8]).format(x=f"an object {key} that has {_phrase(s, fields)}"), dumped({key: fields})


def follow_ups(s: Source) -> list[Exchange]:
    """An object, changed step by step."""
    fields = _fields(s, s.integer(1, 3))
    exchanges = [(s.pick(_ASK).format(x=_phrase(s, fields)), dumped(fields))]
    for _ in range(s.integer(1, 2)):
        if len(fields) > 1 and s.chance(0.3):
            key = s.pick(tuple(fields))
            fields = {other: value for other, value in fields.items() if other != key}
            request = s.pick(("Remove {k}.", "Now remove the field {k}.", "Delete {k}.")).format(k=key)
        elif s.chance(0.4):
            key = s.pick(tuple(fields))
            fields = fields | {
                key: _value(s, key) if key in _TEXT_KEYS or key in _NUMBER_KEYS or key in _BOOLEAN_KEYS else s.number()
            }
            request = s.pick(("Change {k} to {v}.", "Now set {k} to {v}.", "Set {k} to {v}.")).format(
                k=key, v=json.dumps(fields[key])
            )
        else:
            new = {key: value for key, value in _fields(s, 1).items() if key not in fields} or {
                "note": s.pick(COMMON_WORDS)
            }
            fields = fields | new
            request = s.pick(("Add {x}.", "Now add {x}.", "Also add {x}.")).format(x=_phrase(s, new))
        exchanges.append((s.casual(request), dumped(fields)))
    return exchanges
