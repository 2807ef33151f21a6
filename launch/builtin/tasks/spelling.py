"""Spelling words letter by letter, forwards and backwards, and looking at their letters.

Common words are often one token, whose letters cannot be seen. So many words are splices of two common ones, through
which the letters of a token are learned although the word itself is held out. (Names and cities are not spliced: a
held-out one that is a single token cannot be spelled.)
"""

from .source import Exchange, Source
from .words import CITIES, COMMON_WORDS, NAMES

_ONSETS = """b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr sc sh sk sl sm sn sp st sw th tr
    tw""".split()
_NUCLEI = "a e i o u a e i o u ai ea ee ie oa oo ou y".split()
_CODAS = ["", "", "", *"b ck d f g l ll m n nd ng nk nt p r rd rk rt s sh ss st t th x".split()]

_SPELL = (
    "Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Spell {w} for me.", "Please spell {w}.",
    "spell {w}", "Can you spell {w}?", "Spell out {w}.", "How is {w} spelled?", "What is the spelling of {w}?",
    "Spell: {w}", "Spell the word {w} letter by letter.", "How would you spell {w}?", "Could you spell {w} please?",
)  # fmt: skip
_BACKWARDS = (
    "Spell {w} backwards.", "Reverse the word {w}.", "Write {w} backwards.", "What is {w} backwards?",
    "Spell {w} in reverse.", "Reverse {w}", "Please reverse the word {w}.", "Can you spell {w} backwards?",
    "How do you spell {w} backwards?", "Reverse the letters of {w}.", "What is {w} spelled backwards?",
)  # fmt: skip


def word_key(word: str) -> str:
    """The word problem, whatever the letter case."""
    return f"word {word.lower()}"


def _syllables(s: Source) -> str:
    return "".join(s.pick(_ONSETS) + s.pick(_NUCLEI) + s.pick(_CODAS) for _ in range(s.pick((1, 2, 2, 3))))


def draw_word(s: Source) -> str:
    """A real word or a made-up one, on this source's side of the split."""

    def draw() -> str:
        kind = s.rng.random()
        if kind < 0.45:
            return s.pick(COMMON_WORDS)
        if kind < 0.55:
            return s.pick(s.pick((NAMES, CITIES)))
        if kind < 0.8:
            first, second = s.pick(COMMON_WORDS), s.pick(COMMON_WORDS)
            return first[: s.integer(2, len(first))] + second[s.integer(0, max(0, len(second) - 3)) :]
        return _syllables(s)

    return s.problem(draw, word_key)


def _real_word(s: Source) -> str:
    return s.problem(lambda: s.pick(COMMON_WORDS), word_key)


def _quoted(s: Source, word: str) -> str:
    return s.pick((word, word, word, f'"{word}"', f"'{word}'"))


def spelled(word: str) -> str:
    """The word's letters with hyphens between them."""
    return "-".join(word)


def _spelling_of(s: Source, word: str) -> Exchange:
    return s.casual(s.pick(_SPELL).format(w=_quoted(s, word))), spelled(word)


def _reverse_of(s: Source, word: str) -> Exchange:
    return s.casual(s.pick(_BACKWARDS).format(w=_quoted(s, word))), spelled(word[::-1])


def spelling(s: Source) -> Exchange:
    """A word, real or made up, letter by letter."""
    return _spelling_of(s, draw_word(s))


def spelling_real_word(s: Source) -> Exchange:
    """A real word, letter by letter."""
    return _spelling_of(s, _real_word(s))


def backwards(s: Source) -> Exchange:
    """A word, real or made up, letter by letter from its end."""
    return _reverse_of(s, draw_word(s))


def backwards_real_word(s: Source) -> Exchange:
    """A real word, letter by letter from its end."""
    return _reverse_of(s, _real_word(s))


def letters(s: Source) -> Exchange:
    """How many letters a word has, or its first or last one."""
    word = draw_word(s)
    while len(word) > 10:
        word = draw_word(s)
    shown = _quoted(s, word)
    kind = s.integer(0, 2)
    if kind == 0:
        frames: tuple[str, ...] = (
            "How many letters are in {w}?",
            "How many letters does {w} have?",
            "How long is the word {w}?",
            "Count the letters in {w}.",
        )
        return s.casual(s.pick(frames).format(w=shown)), f"{spelled(word)}: {len(word)} letter{'s' * (len(word) > 1)}."
    name, letter = ("first", word[0]) if kind == 1 else ("last", word[-1])
    frames = ("What is the {n} letter of {w}?", "Which letter does {w} {v} with?", "What letter does {w} {v} with?")
    verb = "start" if kind == 1 else "end"
    return s.casual(s.pick(frames).format(n=name, v=verb, w=shown)), f"The {name} letter of {word} is {letter}."


def capitals(s: Source) -> Exchange:
    """A word in capital letters."""
    word = draw_word(s)
    frames = (
        "Write {w} in capital letters.",
        "Write {w} in upper case.",
        "Uppercase {w}.",
        "Put {w} in all caps.",
        "Capitalize all letters of {w}.",
    )
    return s.casual(s.pick(frames).format(w=_quoted(s, word))), word.upper()


def spelled_together(s: Source) -> Exchange:
    """A word put together from its letters."""
    word = draw_word(s)
    frames = (
        "What word is {x}?",
        "What does {x} spell?",
        "Which word is spelled {x}?",
        "Put these letters together: {x}",
    )
    return s.casual(s.pick(frames).format(x=spelled(word) if s.chance(0.6) else " ".join(word))), word


def follow_ups(s: Source) -> list[Exchange]:
    """A word spelled, then looked at from other sides without being named again."""
    word = draw_word(s)
    while len(word) > 10:
        word = draw_word(s)
    options: list[Exchange] = [
        (
            s.pick(("Now backwards.", "And backwards?", "Now spell it backwards.", "Can you reverse it?")),
            spelled(word[::-1]),
        ),
        (
            s.pick(("How many letters is that?", "How many letters does it have?")),
            f"{spelled(word)}: {len(word)} letter{'s' * (len(word) > 1)}.",
        ),
        (s.pick(("What is its first letter?", "And the first letter?")), f"The first letter of {word} is {word[0]}."),
        (s.pick(("What is its last letter?", "And the last letter?")), f"The last letter of {word} is {word[-1]}."),
    ]
    return [_spelling_of(s, word), *((s.casual(q), a) for q, a in s.rng.sample(options, s.integer(1, 3)))]
