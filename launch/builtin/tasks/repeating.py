"""Repeating what the user gave: words, numbers, and text in other scripts."""

from .source import Exchange, Source
from .words import ADJECTIVES, ANIMALS, COMMON_WORDS, PLACES, THINGS

_REPEAT = (
    "Repeat after me: {x}", "Repeat: {x}", "Say {x}", "Say: {x}", "Please repeat: {x}", 'Say "{x}"', 'Repeat "{x}"',
    "Echo {x}", "Copy this: {x}", "Repeat this exactly: {x}", "Write: {x}", "Can you repeat this? {x}", "Print {x}",
)  # fmt: skip
_SCRIPTS = (
    (0x61, 0x7A),
    (0x21, 0x3B),
    (0x3F, 0x7E),
    (0xC0, 0xFF),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x4E00, 0x4FFF),
    (0x3041, 0x3096),
    (0x1F600, 0x1F640),
)


def _sayable(s: Source) -> str:
    kind = s.rng.random()
    if kind < 0.5:
        words = " ".join(s.pick(COMMON_WORDS) for _ in range(s.integer(1, 8)))
        return words if s.chance(0.6) else words.capitalize() + s.pick((".", "!", "?"))
    if kind < 0.65:
        return f"The {s.pick(ADJECTIVES)} {s.pick(ANIMALS)} likes the {s.pick(THINGS)} in the {s.pick(PLACES)}."
    if kind < 0.75:
        return s.pick(
            (
                "Hello",
                "Hello world",
                "Hello, world!",
                "I love you",
                "Good morning",
                "test",
                "Tandem is fast",
                "yes",
                "no",
                "one two three",
            )
        )
    if kind < 0.85:
        return " ".join(str(s.number()) for _ in range(s.integer(1, 6)))
    low, high = s.pick(_SCRIPTS)
    return "".join(chr(s.integer(low, high)) for _ in range(s.integer(1, 8))).replace('"', "").replace("<", "") or "ok"


def repeating(s: Source) -> Exchange:
    """Saying back what the user gave."""
    text = (
        s.problem(lambda: _sayable(s), lambda drawn: f"repeat {drawn}")
        if not s.held_out
        else s.problem(
            lambda: " ".join(s.pick(COMMON_WORDS) for _ in range(s.integer(1, 8))), lambda drawn: f"repeat {drawn}"
        )
    )
    if s.chance(0.12):
        word, times = s.pick(COMMON_WORDS), s.integer(2, 9)
        return s.casual(
            s.pick(("Say {w} {n} times.", "Repeat {w} {n} times.", "Write {w} {n} times.")).format(w=word, n=times)
        ), " ".join([word] * times)
    return s.pick(_REPEAT).format(x=text), text
