"""A handful of facts about the world: capitals, opposites, colors, animals."""

from .source import Exchange, Source, held_out_by_prompt

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw", "Greece": "Athens", "Hungary": "Budapest",
    "Belgium": "Brussels", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "South Korea": "Seoul",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Peru": "Lima",
    "Chile": "Santiago", "Cuba": "Havana", "Russia": "Moscow", "Turkey": "Ankara", "Australia": "Canberra",
    "the United States": "Washington", "Switzerland": "Bern", "the Netherlands": "Amsterdam",
    "Argentina": "Buenos Aires", "Brazil": "Brasilia", "Thailand": "Bangkok",
}  # fmt: skip
OPPOSITES = (
    "hot cold", "big small", "fast slow", "day night", "up down", "left right", "happy sad", "light dark",
    "open closed", "rich poor", "young old", "hard soft", "wet dry", "full empty", "early late", "good bad",
    "high low", "long short", "strong weak", "loud quiet", "true false", "black white", "sweet sour", "clean dirty",
    "near far", "begin end", "win lose", "buy sell", "push pull", "yes no", "always never", "inside outside",
    "thick thin", "tall short",
)  # fmt: skip
_THING_COLORS = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "coal": "black", "a lemon": "yellow",
    "a ripe tomato": "red", "milk": "white", "a carrot": "orange", "the sun": "yellow", "blood": "red",
    "chocolate": "brown",
}  # fmt: skip
_SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "sheep": "bleats", "lion": "roars",
    "frog": "croaks", "pig": "oinks", "horse": "neighs", "wolf": "howls", "owl": "hoots", "bee": "buzzes",
    "snake": "hisses", "mouse": "squeaks",
}  # fmt: skip
_LEGS = {
    "dog": 4,
    "cat": 4,
    "bird": 2,
    "spider": 8,
    "ant": 6,
    "horse": 4,
    "snake": 0,
    "bee": 6,
    "chicken": 2,
    "cow": 4,
    "fish": 0,
}


@held_out_by_prompt
def facts(s: Source) -> Exchange:
    """One fact."""
    kind = s.integer(0, 9)
    if kind <= 4:
        country, city = s.pick(tuple(CAPITALS.items()))
        if s.chance(0.15):
            return s.careless(f"Which country is {city} the capital of?"), f"{city} is the capital of {country}."
        frames: tuple[str, ...] = (
            "What is the capital of {c}?",
            "Capital of {c}?",
            "Which city is the capital of {c}?",
            "Tell me the capital of {c}.",
            "Name the capital of {c}.",
            "What's the capital of {c}?",
            "Do you know the capital of {c}?",
            "the capital of {c} is",
        )
        return s.careless(s.pick(frames).format(c=country)), f"The capital of {country} is {city}."
    if kind <= 6:
        word, other = s.pick(OPPOSITES).split()
        if s.chance(0.5) and word != "tall":
            word, other = other, word
        if word == "short":
            other = "long"
        frames = (
            "What is the opposite of {w}?",
            "Opposite of {w}?",
            "Give me the opposite of {w}.",
            'What is the opposite of "{w}"?',
        )
        return s.careless(s.pick(frames).format(w=word)), f"The opposite of {word} is {other}."
    if kind == 7:
        thing, color = s.pick(tuple(_THING_COLORS.items()))
        return s.careless(
            s.pick((f"What color is {thing}?", f"Which color is {thing}?"))
        ), f"{thing[0].upper()}{thing[1:]} is {color}."
    if kind == 8:
        animal, sound = s.pick(tuple(_SOUNDS.items()))
        return s.careless(
            s.pick((f"What does a {animal} say?", f"What sound does a {animal} make?"))
        ), f"A {animal} {sound}."
    animal, legs = s.pick(tuple(_LEGS.items()))
    article = "An" if animal == "ant" else "A"
    return s.careless(
        f"How many legs does {article.lower()} {animal} have?"
    ), f"{article} {animal} has {legs or 'no'} legs."
