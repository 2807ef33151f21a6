"""Sorting, reversing and searching short lists of numbers or words."""

from collections.abc import Sequence

from .source import Exchange, Source, held_out_by_prompt
from .words import ANIMALS, CITIES, COLORS, COMMON_WORDS, FOODS, NAMES, THINGS

_SORT = (
    "Sort {x}.", "Sort these numbers: {x}", "Sort the numbers {x}.", "Sort the list {x}", "Sort: {x}", "sort {x}",
    "Please sort {x}.", "Put these numbers in order: {x}", "Order these numbers: {x}", "Can you sort {x}?",
    "Arrange {x} in ascending order.", "Sort {x} in ascending order.", "Sort {x} from smallest to largest.",
    "Sort these numbers from low to high: {x}", "Sort the following numbers: {x}", "Put {x} in order.",
    "Please put these in increasing order: {x}", "Rank these from smallest to biggest: {x}", "Sort this list: {x}",
    "Sort these numbers in ascending order: {x}", "Could you sort these numbers for me: {x}", "Sort the list: {x}",
)  # fmt: skip
_SORT_DOWN = (
    "Sort {x} in descending order.", "Sort these numbers from largest to smallest: {x}", "Sort {x} from high to low.",
    "Put these numbers in descending order: {x}", "Arrange {x} from biggest to smallest.",
    "Sort {x} in reverse order.", "Sort {x}, largest first.", "Please sort these numbers in decreasing order: {x}",
    "Sort in descending order: {x}",
)  # fmt: skip
_REVERSE = (
    "Reverse the list {x}.", "Reverse this list: {x}", "Reverse {x}.", "Write this list backwards: {x}",
    "Reverse: {x}", "Please reverse the list {x}.", "Put this list in reverse: {x}", "Can you reverse {x}?",
    "What is {x} reversed?", "List these from last to first: {x}", "reverse the order of {x}",
    "Say this list backwards: {x}", "Reverse these: {x}",
)  # fmt: skip
_SORT_WORDS = (
    "Sort these words: {x}", "Sort these words alphabetically: {x}", "Put these words in alphabetical order: {x}",
    "Sort {x} alphabetically.", "Arrange in alphabetical order: {x}", "Sort {x} by alphabet.", "Alphabetize {x}.",
)  # fmt: skip


def join(s: Source, items: Sequence[object]) -> str:
    """The list as people write it."""
    style = s.rng.random()
    if style < 0.6:
        return ", ".join(map(str, items))
    if style < 0.72:
        return " ".join(map(str, items))
    if style < 0.82:
        return f"[{', '.join(map(str, items))}]"
    if style < 0.9:
        return ",".join(map(str, items))
    return f"{', '.join(map(str, items[:-1]))} and {items[-1]}"


def numbers(s: Source, length: int) -> list[int]:
    """Numbers of one magnitude, or of mixed ones."""
    digits = s.pick((1, 2, 2, 2, 3, 3))
    if s.chance(0.25):
        return [s.number() for _ in range(length)]
    return [s.integer(0, 10**digits - 1) for _ in range(length)]


def numbers_key(items: Sequence[object]) -> str:
    """The list problem, whatever the order of the items."""
    return "list " + " ".join(sorted(map(str, items)))


def _draw_numbers(s: Source, length: int) -> list[int]:
    # Short lists of small numbers are too few to be split by chance alone; `problem` draws until one fits.
    return s.problem(lambda: numbers(s, length), numbers_key)


def _shown(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def sorting(s: Source, length: int | None = None) -> Exchange:
    """Two to eight numbers (or exactly `length`) in ascending or, less often, descending order."""
    items = _draw_numbers(s, length or s.pick((2, 3, 3, 4, 4, 5, 5, 5, 5, 5, 6, 7, 8)))
    down = s.chance(0.2)
    return s.casual(s.pick(_SORT_DOWN if down else _SORT).format(x=join(s, items))), _shown(sorted(items, reverse=down))


def sorting_five(s: Source) -> Exchange:
    """Five numbers in order."""
    return sorting(s, 5)


def _some_words(s: Source, length: int) -> list[str]:
    kind = s.pick((ANIMALS, FOODS, THINGS, COLORS, COMMON_WORDS, NAMES, CITIES))
    return s.rng.sample(kind, length)


def reversing(s: Source) -> Exchange:
    """A list of numbers or words from last to first."""
    length = s.integer(2, 7)
    words = s.chance(0.5)
    items: list[object] = list(
        s.problem(lambda: _some_words(s, length), numbers_key) if words else _draw_numbers(s, length)
    )
    return s.casual(s.pick(_REVERSE).format(x=join(s, items))), _shown(items[::-1])


def sorting_words(s: Source) -> Exchange:
    """Two to five words in alphabetical order."""
    words = s.problem(lambda: _some_words(s, s.integer(2, 5)), numbers_key)
    in_order = sorted(words, key=str.lower)
    return s.casual(s.pick(_SORT_WORDS).format(x=join(s, words))), _shown(in_order)


_EXTREMES = (
    ("largest", ("largest", "biggest", "highest", "maximum", "greatest")),
    ("smallest", ("smallest", "lowest", "minimum", "least")),
)


def extreme(s: Source) -> Exchange:
    """The largest or smallest number of a list."""
    items = _draw_numbers(s, s.integer(3, 7))
    name, words = s.pick(_EXTREMES)
    frames = (
        "What is the {w} of {x}?",
        "Which is the {w}: {x}",
        "Find the {w} number: {x}",
        "What is the {w} number in {x}?",
    )
    result = max(items) if name == "largest" else min(items)
    return s.casual(s.pick(frames).format(w=s.pick(words), x=join(s, items))), f"The {name} is {result}."


_ORDINALS = ("first", "second", "third", "fourth", "fifth")


@held_out_by_prompt
def element(s: Source) -> Exchange:
    """The item at a position, or how many items there are."""
    length = s.integer(2, 6)
    items: list[object] = list(_some_words(s, length) if s.chance(0.5) else _draw_numbers(s, length))
    if s.chance(0.35):
        frames: tuple[str, ...] = (
            "How many items are in the list {x}?",
            "How many items are there: {x}",
            "What is the length of the list {x}?",
        )
        return s.casual(s.pick(frames).format(x=_shown(items))), f"The list has {length} items."
    last = s.chance(0.3)
    index = length - 1 if last else s.integer(0, min(length, 5) - 1)
    word = "last" if last else _ORDINALS[index]
    frames = ("What is the {w} item of {x}?", "What is the {w} item in the list {x}?", "Give me the {w} item: {x}")
    return s.casual(s.pick(frames).format(w=word, x=join(s, items))), f"The {word} item is {items[index]}."


def follow_ups(s: Source) -> list[Exchange]:
    """A list that is sorted first, then looked at from other sides."""
    items = _draw_numbers(s, s.integer(3, 6))
    exchanges = [(s.casual(s.pick(_SORT).format(x=join(s, items))), _shown(sorted(items)))]
    down = ("Now in descending order.", "And from largest to smallest?", "Now the other way around.", "Now reverse it.")
    options: list[Exchange] = [
        (s.pick(down), _shown(sorted(items, reverse=True))),
        (
            s.pick(("Which one is the largest?", "What is the largest of them?", "And the biggest?")),
            f"The largest is {max(items)}.",
        ),
        (
            s.pick(("Which one is the smallest?", "What is the smallest?", "And the smallest?")),
            f"The smallest is {min(items)}.",
        ),
        (s.pick(("How many numbers are there?", "How many items is that?")), f"The list has {len(items)} items."),
    ]
    exchanges += [(s.casual(request), answer) for request, answer in s.rng.sample(options, s.integer(1, 3))]
    return exchanges
