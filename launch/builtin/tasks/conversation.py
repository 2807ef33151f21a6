"""Whole chats: one question, or many turns that follow up on each other and remember what was said."""

from collections.abc import Callable, Sequence

from ..chat import Chat, Message
from . import arithmetic, dates, facts, json_objects, lists, repeating, smalltalk, spelling, stories
from .source import Exchange, Source
from .words import ANIMALS, CITIES, COLORS, FOODS, NAMES

SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a friendly assistant.",
    "You are Tandem's small built-in model.", "Answer briefly.", "You are a helpful assistant. Answer briefly.",
    "Be concise.", "Be polite and helpful.", "You are a chatbot.", "Answer the user's questions.",
)  # fmt: skip

Single = Callable[[Source], Exchange]

WEIGHTED_SINGLES: tuple[tuple[Single, float], ...] = (
    (arithmetic.addition, 9), (arithmetic.addition_of_three_digits, 6), (arithmetic.subtraction, 9),
    (arithmetic.multiplication, 7), (arithmetic.comparison, 2), (arithmetic.parity, 1), (arithmetic.neighbor, 2),
    (arithmetic.counting, 2), (lists.sorting, 8), (lists.sorting_five, 7), (lists.reversing, 5),
    (lists.sorting_words, 4), (lists.extreme, 3), (lists.element, 2), (spelling.spelling, 6), (spelling.backwards, 5),
    (spelling.letters, 5), (spelling.capitals, 1.5), (spelling.spelled_together, 1.5), (dates.day_order, 2),
    (dates.month_order, 2), (dates.month_length, 2), (dates.leap_year, 2), (dates.next_date, 2.5),
    (dates.calendar_facts, 2), (facts.facts, 2.5), (smalltalk.greeting, 3), (smalltalk.out_of_reach, 5),
    (smalltalk.too_large, 1.5), (repeating.repeating, 5), (json_objects.json_fields, 5),
    (json_objects.json_described, 3), (json_objects.json_nested, 3), (stories.story, 2.5),
)  # fmt: skip
_SINGLES = tuple(task for task, _ in WEIGHTED_SINGLES)
_WEIGHTS = tuple(weight for _, weight in WEIGHTED_SINGLES)
_TOPICS = (
    (arithmetic.chain, 5), (lists.follow_ups, 3), (spelling.follow_ups, 3), (dates.follow_ups, 2),
    (json_objects.follow_ups, 3), (stories.follow_ups, 1),
)  # fmt: skip
TOPIC_TASKS = tuple(task for task, _ in _TOPICS)
TOPIC_WEIGHTS = tuple(weight for _, weight in _TOPICS)


def single(s: Source) -> Exchange:
    """One exchange on any subject."""
    return s.rng.choices(_SINGLES, _WEIGHTS)[0](s)


def chat_of(s: Source, exchanges: Sequence[Exchange]) -> Chat:
    """The exchanges as a chat, under a system message two times in five."""
    messages = [Message("system", s.pick(SYSTEMS))] if s.chance(0.4) else []
    for request, answer in exchanges:
        messages += [Message("user", request), Message("assistant", answer)]
    return Chat(messages)


_NAME = (
    "My name is {x}.",
    "I am {x}.",
    "Hi, I am {x}.",
    "Hello, my name is {x}.",
    "My name's {x}",
    "Please call me {x}.",
    "Hi! My name is {x}.",
    "i'm {x}",
    "You can call me {x}.",
)
_LIKES = {
    "color": (COLORS, ("My favorite color is {x}.", "I like the color {x}.")),
    "animal": (ANIMALS, ("My favorite animal is the {x}.", "My favorite animal is {x}.")),
    "food": (FOODS, ("My favorite food is {x}.", "I like to eat {x}. It is my favorite food.")),
    "city": (CITIES, ("My favorite city is {x}.", "My favorite city is {x}, you know.")),
    "number": (tuple(map(str, range(1000))), ("My favorite number is {x}.", "My lucky number is {x}.")),
}  # fmt: skip
_FIRST = (
    "What did I ask first?",
    "What was my first question?",
    "What did I ask you first?",
    "What was the first thing I said?",
    "What was my first message?",
    "What did I say first?",
)
_LAST = (
    "What did I just ask?",
    "What was my last question?",
    "What did I just say?",
    "What was my last message?",
    "Repeat my last question.",
)
_AGAIN = (
    "Say that again.",
    "Repeat that.",
    "Repeat your last answer.",
    "Can you repeat that?",
    "What did you just say?",
    "Again please",
    "Once more",
    "Pardon?",
)


class Memory:
    """What the user has told so far, and questions about it."""

    def __init__(self, s: Source) -> None:
        self.source = s
        self.name: str | None = None
        self.likes: dict[str, str] = {}

    def tell(self) -> Exchange:
        """The user says a name or something they like."""
        s = self.source
        if s.chance(0.5):
            self.name = s.problem(lambda: s.pick(NAMES), lambda drawn: f"name {drawn}")
            return s.pick(_NAME).format(x=self.name), f"Nice to meet you, {self.name}!"
        kind = s.pick(tuple(_LIKES))
        values, frames = _LIKES[kind]
        self.likes[kind] = s.pick(values)
        return s.casual(
            s.pick(frames).format(x=self.likes[kind])
        ), f"I will remember that your favorite {kind} is {self.likes[kind]}."

    def ask_name(self) -> Exchange:
        """The user asks for the name."""
        request = self.source.pick(
            (
                "What is my name?",
                "What's my name?",
                "Do you know my name?",
                "Do you remember my name?",
                "Who am I?",
                "Tell me my name.",
            )
        )
        return self.source.casual(
            request
        ), f"Your name is {self.name}." if self.name else "You have not told me your name."

    def ask(self) -> Exchange:
        """The user asks for something that they may have told."""
        s = self.source
        if s.chance(0.5 if self.name or not self.likes else 0.15):
            return self.ask_name()
        kind = s.pick(tuple(self.likes) if self.likes and s.chance(0.8) else tuple(_LIKES))
        request = s.pick(
            (f"What is my favorite {kind}?", f"Which {kind} do I like?", f"Do you remember my favorite {kind}?")
        )
        known = kind in self.likes
        return s.casual(
            request
        ), f"Your favorite {kind} is {self.likes[kind]}." if known else f"You have not told me your favorite {kind}."


def _look_back(s: Source, exchanges: Sequence[Exchange]) -> Exchange | None:
    """A question about an earlier message, if that message is short enough to be said again."""
    kind = s.rng.random()
    said = exchanges[0][0] if kind < 0.45 else exchanges[-1][0] if kind < 0.75 else exchanges[-1][1]
    if len(said) > 120:
        return None
    request = s.casual(s.pick(_FIRST if kind < 0.45 else _LAST if kind < 0.75 else _AGAIN))
    return request, said if kind >= 0.75 else f"You said: {said}"


def talk(s: Source, characters: int) -> list[Exchange]:
    """Turns on changing subjects until about `characters` characters are said."""
    memory, exchanges, said = Memory(s), list[Exchange](), 0
    while said < characters:
        kind = s.rng.random()
        new: list[Exchange]
        if kind < 0.5:
            new = [single(s)]
        elif kind < 0.72:
            new = s.rng.choices(TOPIC_TASKS, TOPIC_WEIGHTS)[0](s)
        elif kind < 0.8:
            new = [memory.tell()]
        elif kind < 0.88:
            new = [memory.ask()]
        else:
            back = _look_back(s, exchanges) if exchanges else None
            new = [back] if back else [single(s)]
        exchanges += new
        said += sum(len(request) + len(answer) + 20 for request, answer in new)
    return exchanges


def remembered_name(s: Source) -> list[Exchange]:
    """A name told at the start, asked for after other subjects."""
    memory = Memory(s)
    memory.name = s.problem(lambda: s.pick(NAMES), lambda drawn: f"name {drawn}")
    told = (s.pick(_NAME).format(x=memory.name), f"Nice to meet you, {memory.name}!")
    return [told, *(single(s) for _ in range(s.integer(0, 3))), memory.ask_name()]


def first_question(s: Source) -> list[Exchange]:
    """Some exchanges, then the question what was asked first."""
    exchanges = [single(s) for _ in range(s.integer(1, 4))]
    while len(exchanges[0][0]) > 120:
        exchanges[0] = single(s)
    return [*exchanges, (s.casual(s.pick(_FIRST)), f"You said: {exchanges[0][0]}")]
