"""Little stories, from parts that fit together: a hero, a wish, a trouble, a helper, an ending."""

from collections.abc import Callable

from .source import Exchange, Source
from .words import ADJECTIVES, ANIMALS, COLORS, PLACES, THINGS, a

_GIRLS = frozenset(
    """Ada Alba Alice Amy Ana Anna Bella Clara Dana Ella Emma Eva Freya Fatima Grace Hana Ida Ines Iris Jane Julia
    Kate Lara Lea Lena Lily Lina Lucy Maja Maria Mary Maya Mei Mia Mila Mina Nadia Nia Nina Nora Olga Pia Priya Rana
    Rosa Ruth Sara Sofia Tara Uma Vera Yara Yuki Zara Zoe""".split()
)
_HEROES = tuple(sorted(_GIRLS)) + tuple(
    """Adam Amir Arun Ben Bob Carlos Dan David Emil Felix Finn Frank Hugo Igor Ivan Jack James Jonas Kai Karim Kenji
    Leo Liam Lucas Luis Marco Mark Max Noah Oliver Omar Oscar Otto Paul Pedro Peter Ravi Sam Sven Theo Tim Tom
    Victor Wei""".split()
)
_FOODS = tuple("bread cake cheese chocolate honey jam milk pasta pie popcorn rice salad soup tea yogurt".split())

_OPENINGS = (
    "Once upon a time there was {j_kind} named {n}.", "Once upon a time, {j_kind} named {n} lived near a {p}.",
    "One day, {n} the {k} woke up early.", "In a small house by the {p} lived {j_kind} called {n}.",
    "Long ago, in a quiet {p}, there lived {j_kind} named {n}.", "There was once {j_kind} whose name was {n}.",
)  # fmt: skip
_HOMES = (
    "{N} loved to {play} all day long.", "Every morning {n} went to the {p} to {play}.",
    "{N} had {a_thing} that {he} loved very much.", "{N} was always {j}, but sometimes {he} felt lonely.",
    "All the animals in the {p} knew {n}.", "{N} liked {food} more than anything else.",
)  # fmt: skip
_TROUBLES = (
    "One day {n} lost {his} {t} in the {p2}.", "One day a strong wind blew the {t} away.",
    "One morning the {t} was gone.", "Then it began to rain, and {n} could not find the way home.",
    "One evening {n} heard a strange sound in the {p2}.",
    "One day {n} found {a_thing2} under a tree and did not know whose it was.",
    "But one day there was no {food} left, and {n} was very hungry.",
)  # fmt: skip
_SEARCHES = (
    "{N} looked everywhere, but {he} found nothing.", "{N} sat down and began to cry.",
    '"What should I do now?" said {n}.', "{N} was sad, but {he} did not give up.", "{N} walked for a long time.",
    "{N} asked the river and the trees, but nobody knew.",
)  # fmt: skip
_HELPERS = (
    "Then {a_helper} named {m} came along.", "Just then, {a_helper} called {m} looked out from behind a stone.",
    "Soon {he} met {a_helper} whose name was {m}.", "Suddenly {a_helper} appeared. The name of the {h} was {m}.",
)  # fmt: skip
_DIALOGUES = (
    '"Do not worry," said {m}. "I will help you."', '"Come with me," said {m}. "I know what to do."',
    '"Why are you sad?" asked {m}. {N} told the whole story.', '"Let us look together," said {m}.',
)  # fmt: skip
_RESOLUTIONS = (
    "Together they looked behind every tree, and at last they found the {t}.",
    "{M} showed {n} a {c} light in the {p2}, and there was the {t}.",
    "They worked together until the evening, and then everything was good again.",
    "{M} gave {n} {a_thing2} and some {food}, and {n} smiled.",
    "They climbed up to the {p2}, and from there they could see the way home.",
)  # fmt: skip
_ENDINGS = (
    "From that day on, {n} and {m} were best friends.", "{N} thanked {m}, and they shared {food} under the stars.",
    "{N} went home happy, and {m} went with {him}.", "And if you go to the {p} today, you can still see them {play}.",
    "{N} learned that a friend is the best thing of all.", "They laughed and danced until the moon came up.",
)  # fmt: skip
_CLOSINGS = (
    "The end.",
    "They lived happily ever after.",
    "And that is the end of the story.",
    "Then they all went to sleep.",
)
_PLAYS = (
    "sing",
    "dance",
    "run",
    "swim",
    "play",
    "paint",
    "read books",
    "climb trees",
    "look at the clouds",
    "count the stars",
    "collect stones",
    "build houses of sand",
)
_REQUESTS = (
    "Tell me a story.", "Tell me a short story.", "Write a story.", "Write a short story.", "Can you tell me a story?",
    "I would like to hear a story.", "Please tell me a little story.", "Tell a story", "story please",
    "Make up a story.", "Once more, a story please.", "Tell me a bedtime story.", "Write a little story.",
)  # fmt: skip
_ABOUT = (
    "Tell me a story about {x}.", "Tell me a story about {x}.", "Write a story about {x}.",
    "Tell me a short story about {x}.", "Write a short story about {x}.", "Can you tell me a story about {x}?",
    "I want to hear a story about {x}.", "Please write a little story about {x}.", "Make up a story about {x}.",
    "story about {x}", "Tell me a bedtime story about {x}.",
)  # fmt: skip


class Plot:
    """The cast and props of one story; `fill` writes a sentence template with them."""

    def __init__(self, s: Source, *, kind: str | None = None, name: str | None = None) -> None:
        self.source = s
        self.name = name or s.pick(_HEROES)
        girl = self.name in _GIRLS
        self.kind = kind or (s.pick(ANIMALS) if s.chance(0.75) else ("girl" if girl else "boy"))
        self.helper = s.pick([animal for animal in s.rng.sample(ANIMALS, 2) if animal != self.kind])
        self.friend = s.pick([hero for hero in s.rng.sample(_HEROES, 2) if hero != self.name])
        self.place, self.other_place = s.rng.sample(PLACES, 2)
        self.thing, other_thing = s.rng.sample(THINGS, 2)
        self.adjective = s.pick(ADJECTIVES)
        color = s.pick(COLORS)
        self.words = {
            "n": self.name,
            "N": self.name,
            "k": self.kind,
            "j": self.adjective,
            "j_kind": a(f"{self.adjective} {self.kind}"),
            "he": "she" if girl else "he",
            "his": "her" if girl else "his",
            "him": "her" if girl else "him",
            "m": self.friend,
            "M": self.friend,
            "h": self.helper,
            "a_helper": a(f"{s.pick(ADJECTIVES)} {self.helper}"),
            "p": self.place,
            "p2": self.other_place,
            "t": self.thing,
            "a_thing": a(f"{color} {self.thing}"),
            "a_thing2": a(other_thing),
            "food": s.pick(_FOODS),
            "c": color,
            "play": s.pick(_PLAYS),
        }

    def fill(self, *parts: tuple[str, ...]) -> str:
        """One sentence of each part."""
        return " ".join(self.source.pick(part).format_map(self.words) for part in parts)

    def story(self, adventures: int = 1) -> str:
        """The whole story, in one paragraph per adventure."""
        s = self.source
        paragraphs = []
        for index in range(adventures):
            if index:
                self.thing, self.words["food"] = s.pick(THINGS), s.pick(_FOODS)
                self.other_place = s.pick([place for place in PLACES if place != self.place])
                self.words |= {"t": self.thing, "p2": self.other_place, "a_thing2": a(s.pick(THINGS))}
            opening = (_OPENINGS, _HOMES) if index == 0 else (_HOMES,) if s.chance(0.5) else ()
            helpers = (_HELPERS, _DIALOGUES) if index == 0 else (_DIALOGUES,)
            middle = (_TROUBLES, _SEARCHES) if s.chance(0.8) else (_TROUBLES,)
            paragraphs.append(
                self.fill(*opening, *middle, *helpers, _RESOLUTIONS, *((_ENDINGS,) if index == adventures - 1 else ()))
            )
        return "\n\n".join(paragraphs) + " " + s.pick(_CLOSINGS)


def _told(s: Source) -> tuple[Exchange, Plot]:
    if s.chance(0.3):
        plot = Plot(s)
        return (s.casual(s.pick(_REQUESTS)), plot.story()), plot
    style = s.rng.random()
    kind, name = s.problem(lambda: (s.pick(ANIMALS), s.pick(_HEROES)), lambda pair: f"story {pair[0]} {pair[1]}")
    if style < 0.5:
        subject, plot = a(kind), Plot(s, kind=kind)
    elif style < 0.8:
        subject, plot = f"{a(kind)} {s.pick(('named', 'called'))} {name}", Plot(s, kind=kind, name=name)
    else:
        subject, plot = name, Plot(s, name=name)
    return (s.casual(s.pick(_ABOUT).format(x=subject)), plot.story()), plot


def story(s: Source) -> Exchange:
    """A story of one paragraph."""
    return _told(s)[0]


def story_about(s: Source) -> tuple[Exchange, tuple[str, str]]:
    """A story about a named animal, and the two words that it has to hold."""
    kind, name = s.problem(lambda: (s.pick(ANIMALS), s.pick(_HEROES)), lambda pair: f"story {pair[0]} {pair[1]}")
    request = s.casual(s.pick(_ABOUT).format(x=f"{a(kind)} {s.pick(('named', 'called'))} {name}"))
    return (request, Plot(s, kind=kind, name=name).story()), (kind, name)


def long_story(s: Source) -> Exchange:
    """A story of two to four paragraphs."""
    kind = s.pick(ANIMALS)
    frames = (
        "Tell me a long story.",
        "Write a long story.",
        "Tell me a long story about {x}.",
        "Write a long story about {x}.",
        "I want a long story about {x}.",
    )
    return s.casual(s.pick(frames).format(x=a(kind))), Plot(s, kind=kind).story(s.integer(2, 4))


def plain_text(s: Source) -> str:
    """A story as running text, outside any chat."""
    return Plot(s).story(1 if s.chance(0.7) else s.integer(2, 3))


def follow_ups(s: Source) -> list[Exchange]:
    """A story and questions about it."""
    exchange, plot = _told(s)
    questions: list[Callable[[], Exchange]] = [
        lambda: (
            s.pick(("Who was the story about?", "What was the name of the hero?", "Who is the main character?")),
            f"The story was about {plot.name}.",
        ),
        lambda: (
            s.pick(("Who helped?", "Who helped {n}?", "What was the friend called?")).format(n=plot.name),
            f"{plot.friend} the {plot.helper} helped {plot.name}.",
        ),
        lambda: (
            s.pick(("Another one, please.", "Tell me another story.", "Another story please", "One more?")),
            Plot(s).story(),
        ),
    ]
    picked = [make() for make in s.rng.sample(questions[:2], s.integer(1, 2))]
    if s.chance(0.3):
        picked.append(questions[2]())
    return [exchange, *((s.casual(question), answer) for question, answer in picked)]
