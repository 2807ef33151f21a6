"""Greetings, questions about the model itself, and saying politely what is out of reach."""

from .source import Exchange, Source, held_out_by_prompt
from .words import ADJECTIVES, CITIES, COMMON_WORDS, FOODS, NAMES, NOUNS, VERBS, a

IDENTITY = "I am Tandem's small built-in model."
ABILITIES = (
    "I can add, subtract and multiply small numbers, sort and reverse lists, spell words, answer questions about the "
    "calendar, tell short stories, write JSON and call tools."
)
REFUSAL = (
    "Sorry, I can only do simple things: small numbers, lists, spelling, the calendar, short stories, JSON and "
    "tool calls."
)
TOO_LARGE = "Sorry, I can only calculate with numbers of up to three digits."
NO_DIVISION = "Sorry, I can only add, subtract and multiply."

_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello",
            "Hi",
            "Hey",
            "Hello!",
            "Hi!",
            "Hey there",
            "Hi there!",
            "Greetings",
            "Hello there.",
            "Howdy",
            "hiya",
            "yo",
            "Hello, model!",
        ),
        ("Hello! How can I help you?",),
    ),
    (("Good morning", "Good morning!", "Morning!"), ("Good morning! How can I help you?",)),
    (("Good evening", "Good evening!"), ("Good evening! How can I help you?",)),
    (("Good afternoon", "Good afternoon!"), ("Good afternoon! How can I help you?",)),
    (("Good night", "Good night!"), ("Good night!",)),
    (
        ("How are you?", "How are you doing?", "How is it going?", "Are you ok?", "What's up?", "How do you feel?"),
        ("I am fine, thank you. How can I help you?",),
    ),
    (
        (
            "Thanks",
            "Thank you",
            "Thank you!",
            "Thanks a lot!",
            "Thank you very much.",
            "Thx",
            "Great, thanks!",
            "Perfect, thank you.",
        ),
        ("You are welcome!",),
    ),
    (
        ("Bye", "Goodbye", "Bye!", "See you later.", "See you!", "Bye bye", "Goodbye for now.", "I have to go."),
        ("Goodbye!",),
    ),
    (
        (
            "Great",
            "Nice",
            "Good job!",
            "Well done!",
            "Cool",
            "Very good.",
            "That is right.",
            "Correct!",
            "ok",
            "Okay.",
            "Awesome!",
        ),
        ("I am glad to help.",),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "Introduce yourself.",
            "Tell me about yourself.",
            "What is this?",
            "Which model are you?",
            "What model are you?",
            "What is your name?",
            "What's your name?",
            "Do you have a name?",
            "Who am I talking to?",
            "What should I call you?",
            "Are you ChatGPT?",
            "Are you a robot?",
            "Are you human?",
            "Are you an AI?",
            "Are you a language model?",
            "Describe yourself.",
        ),
        (IDENTITY,),
    ),
    (
        (
            "What can you do?",
            "Help",
            "Help me",
            "help!",
            "How can you help me?",
            "What are you good at?",
            "What do you know?",
            "What can I ask you?",
            "What are your abilities?",
            "What should I ask?",
            "Can you help me?",
            "What kind of things can you do?",
            "I need help.",
        ),
        (ABILITIES,),
    ),
    (
        ("What is Tandem?", "Tell me about Tandem.", "What does Tandem do?", "Who is Tandem?"),
        ("Tandem is a serving engine for large language models. I am the small model that comes with it.",),
    ),
    (
        ("Who made you?", "Who built you?", "Who trained you?", "Where do you come from?", "Who created you?"),
        ("I was trained from scratch by Tandem's own training script.",),
    ),
    (
        ("How big are you?", "How many parameters do you have?", "How large are you?"),
        ("I have fewer than five million parameters.",),
    ),
    (("Are you smart?", "Are you intelligent?", "Are you good at math?"), ("I am very small, but I try my best.",)),
    (
        (
            "Do you speak German?",
            "Do you speak French?",
            "What languages do you speak?",
            "Which languages do you know?",
        ),
        ("I only speak English.",),
    ),
)


@held_out_by_prompt
def greeting(s: Source) -> Exchange:
    """A greeting, thanks, or a question about the model."""
    # Questions about the model are asked more often than their share of the table.
    questions, answers = s.pick(_TALK if s.chance(0.6) else _TALK[9:11])
    return s.casual(s.pick(questions)), s.pick(answers)


_UNKNOWN = (
    "Write a poem about {n}.", "Write me a song about {n}.", "Write an essay about {n}.",
    "Write code that finds {n}s.", "Write a Python program.", "What is the weather in {c}?",
    "What is the weather like today?", "Will it rain tomorrow?", "Who is the president of {k}?", "Who is {p}?",
    "What is the meaning of life?", "How do I cook {f}?", "How do you make {f} soup?", "Give me a recipe for {f}.",
    "Translate {w} into French.", "How do you say {w} in German?", "Why is the sky blue?", "Why do {n}s {v}?",
    "How does {an} work?", "Explain quantum physics.", "What is {w}?", "Explain how {an} works.",
    "What does {w} mean?", "Define {w}.", "Who invented the {n}?", "When was the {n} invented?",
    "What is the news today?", "What time is it?", "What is the date today?", "Where can I buy {an}?",
    "How much does {an} cost?", "Recommend a book about {n}s.", "Who won the game?", "Should I {v} the {n}?",
    "What should I eat for dinner?", "Plan a trip to {c}.", "How far is it from {c} to {d}?", "Draw {an}.",
    "Tell me a joke.", "Do you like {f}?", "Do you like {n}s?", "What is your favorite {n}?",
    "How tall is the tallest {n}?", "Summarize this article about {n}s.", "What is the population of {c}?",
    "What is the capital of {k}?", "What language do they speak in {k}?", "Fix my code.", "How old are you?",
    "What is the best way to {v}?", "Can you {v}?", "Can you {v} {an}?", "I want to {v} {an}.", "My {n} is {j}.",
    "I feel {j} today.", "Is {f} healthy?", "How many {n}s are there in {c}?", "What happened in {y}?",
    "Who was born in {y}?", "Tell me about {c}.", "Tell me about the history of {k}.", "Tell me something about {n}s.",
    "What do {n}s eat?", "Where do {n}s live?", "Compare {an} and {am}.", "Which is better, {an} or {am}?", "Why?",
    "How?", "What?", "Really?", "Are you sure?", "I do not understand.", "Tell me more.", "Explain.",
    "Why is {p} so {j}?", "The {n} is {j}.", "Give me five names for {an}.", "List ten {n}s.", "What rhymes with {w}?",
    "Use {w} in a sentence.", "Give me a synonym for {w}.", "Solve x + 2 = 5.", "What is the square root of {m}?",
    "What is the derivative of x squared?", "Convert {m} miles to kilometers.", "What is {m} percent of {o}?",
    "Is it safe to {v} with {an}?", "Write an email to {p}.", "Call {p}.", "Send a message to {p}.",
    "Play some music.", "Open the {n}.", "Book a flight to {c}.", "Turn on the lights.", "Remind me to {v} tomorrow.",
    "Search the web for {n}s.", "What is on the {n}?", "Where is my {n}?", "I lost my {n}.", "Sing a song.",
    "Who wrote the book about the {j} {n}?", "What is the fastest animal?",
    "What is the largest country in the world?", "How many people live in {k}?",
)  # fmt: skip
_OTHER_COUNTRIES = (
    "Iceland",
    "Mongolia",
    "Nigeria",
    "Ghana",
    "Bolivia",
    "Nepal",
    "Iran",
    "Iraq",
    "Vietnam",
    "Ukraine",
    "Romania",
    "Croatia",
    "Algeria",
    "Morocco",
    "Ethiopia",
    "Colombia",
    "Ecuador",
    "Jamaica",
    "Pakistan",
    "Indonesia",
    "New Zealand",
    "Scotland",
    "Latvia",
    "Estonia",
    "Serbia",
    "Malta",
    "Cyprus",
    "Fiji",
)


@held_out_by_prompt
def out_of_reach(s: Source) -> Exchange:
    """A request that the model cannot serve, answered by saying what it can do."""
    if s.chance(0.12):
        words = [s.pick(COMMON_WORDS) for _ in range(s.integer(1, 7))]
        return s.casual(" ".join(words) + s.pick(("", "?", "."))), REFUSAL
    if s.chance(0.05):
        letters = "".join(chr(s.integer(97, 122)) if s.chance(0.85) else " " for _ in range(s.integer(3, 20))).strip()
        return letters or "?", REFUSAL
    request = s.pick(_UNKNOWN).format(
        n=s.pick(NOUNS),
        an=a(s.pick(NOUNS)),
        am=a(s.pick(NOUNS)),
        w=s.pick(COMMON_WORDS),
        v=s.pick(VERBS),
        j=s.pick(ADJECTIVES),
        p=s.pick(NAMES),
        c=s.pick(CITIES),
        d=s.pick(CITIES),
        k=s.pick(_OTHER_COUNTRIES),
        f=s.pick(FOODS),
        y=s.integer(1000, 2030),
        m=s.number(),
        o=s.number(),
    )
    return s.casual(request), REFUSAL


@held_out_by_prompt
def too_large(s: Source) -> Exchange:
    """A calculation beyond what the model has learned."""
    big, other = s.integer(1000, 10 ** s.integer(4, 7) - 1), s.number() if s.chance(0.5) else s.integer(1000, 99999)
    pair = (big, other) if s.chance(0.5) else (other, big)
    if s.chance(0.3):
        frames: tuple[str, ...] = (
            "What is {a} / {b}?",
            "Divide {a} by {b}.",
            "{a} divided by {b}",
            "{a}/{b}",
            "How much is {a} divided by {b}?",
        )
        small = (s.number(), s.integer(1, 20))
        return s.casual(s.pick(frames).format(a=small[0], b=small[1])), NO_DIVISION
    frames = (
        "What is {a} {o} {b}?",
        "{a} {o} {b}",
        "{a}{o}{b}",
        "Calculate {a} {o} {b}.",
        "How much is {a} {o} {b}?",
        "Compute {a} {o} {b}",
    )
    if s.chance(0.2):
        return s.casual(
            s.pick(("Add {a} and {b}.", "What is the sum of {a} and {b}?")).format(a=pair[0], b=pair[1])
        ), TOO_LARGE
    return s.casual(s.pick(frames).format(a=pair[0], b=pair[1], o=s.pick("+-*"))), TOO_LARGE
