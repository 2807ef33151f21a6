"""The tools that chats offer: well-known ones, and invented ones whose names and parameters must be read."""

from collections.abc import Callable
from dataclasses import dataclass

from ..chat import JsonObject
from .source import Source
from .words import ADJECTIVES, CITIES, COLORS, COMMON_WORDS, FOODS, NAMES, NOUNS, THINGS

_WEATHER = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a tool: the request, the arguments, what the tool returns and what the assistant makes of it."""

    request: str
    arguments: JsonObject
    result: JsonObject
    answer: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the assistant may call; `properties` maps a parameter to its JSON type and description."""

    name: str
    description: str
    properties: dict[str, tuple[str, str]]
    use: Callable[[Source], Use]

    def schema(self, s: Source) -> JsonObject:
        """The tool in the OpenAI shape, in one of the spellings that clients send."""
        described = s.chance(0.4)
        properties = {
            key: {"type": kind, "description": text} if described and text else {"type": kind}
            for key, (kind, text) in self.properties.items()
        }
        parameters: JsonObject = {"type": "object", "properties": properties}
        if s.chance(0.7):
            parameters["required"] = list(properties)
        function: JsonObject = {"name": self.name}
        if s.chance(0.85):
            function["description"] = self.description
        function["parameters"] = parameters
        return {"type": "function", "function": function}


def _weather(s: Source) -> Use:
    city, degrees, sky = s.pick(CITIES), s.integer(-10, 38), s.pick(_WEATHER)
    frames = (
        "What is the weather in {c}?",
        "What's the weather like in {c}?",
        "How is the weather in {c}?",
        "Is it raining in {c}?",
        "Tell me the weather in {c}.",
        "weather in {c}",
        "How warm is it in {c}?",
        "Do I need an umbrella in {c}?",
        "What is the temperature in {c}?",
    )
    return Use(
        s.pick(frames).format(c=city),
        {"city": city},
        {"temperature": degrees, "condition": sky},
        f"It is {degrees} degrees and {sky} in {city}.",
    )


def _time(s: Source) -> Use:
    city, clock = s.pick(CITIES), f"{s.integer(0, 23):02}:{s.integer(0, 59):02}"
    frames = (
        "What time is it in {c}?",
        "Tell me the time in {c}.",
        "time in {c}?",
        "What is the local time in {c}?",
        "How late is it in {c}?",
    )
    return Use(s.pick(frames).format(c=city), {"city": city}, {"time": clock}, f"It is {clock} in {city}.")


def _calculator(s: Source) -> Use:
    a, b, sign = s.integer(1, 9999), s.integer(1, 9999), s.pick("+-*/")
    expression = f"{a} {sign} {b}"
    value = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2)}[sign]
    frames = ("What is {x}?", "Calculate {x}.", "How much is {x}?", "Use the calculator for {x}.", "Compute {x}")
    return Use(
        s.pick(frames).format(x=expression), {"expression": expression}, {"result": value}, f"{expression} = {value}"
    )


def _search(s: Source) -> Use:
    query = " ".join(s.pick((s.pick(ADJECTIVES), s.pick(COMMON_WORDS), s.pick(NOUNS))) for _ in range(s.integer(1, 4)))
    title = f"{s.pick(ADJECTIVES)} {s.pick(NOUNS)}".capitalize()
    frames = (
        "Search the web for {q}.",
        "Search for {q}.",
        "Look up {q}.",
        "Find information about {q}.",
        "Can you search for {q}?",
        "google {q}",
    )
    return Use(s.pick(frames).format(q=query), {"query": query}, {"title": title}, f"I found: {title}.")


def _email(s: Source) -> Use:
    name, subject = s.pick(NAMES), " ".join(s.pick(COMMON_WORDS) for _ in range(s.integer(1, 3)))
    frames = (
        "Send an email to {n} about {x}.",
        "Write an email to {n} with the subject {x}.",
        "Email {n} about {x}.",
        "Please send {n} an email about {x}.",
    )
    return Use(
        s.pick(frames).format(n=name, x=subject),
        {"to": name, "subject": subject},
        {"status": "sent"},
        f"The email to {name} was sent.",
    )


def _timer(s: Source) -> Use:
    minutes = s.integer(1, 90)
    frames = (
        "Set a timer for {m} minutes.",
        "Start a {m} minute timer.",
        "Timer for {m} minutes please.",
        "Remind me in {m} minutes.",
        "Wake me up in {m} minutes.",
    )
    return Use(
        s.pick(frames).format(m=minutes),
        {"minutes": minutes},
        {"status": "started"},
        f"The timer is set for {minutes} minutes.",
    )


def _song(s: Source) -> Use:
    title = f"{s.pick(ADJECTIVES)} {s.pick(NOUNS)}".title()
    frames = ("Play the song {t}.", "Play {t}.", "I want to hear {t}.", "Please play {t}.", "Put on {t}.")
    return Use(s.pick(frames).format(t=title), {"title": title}, {"status": "playing"}, f"Now playing {title}.")


def _convert(s: Source) -> Use:
    amount, (source, target) = s.number(), s.rng.sample(("EUR", "USD", "GBP", "JPY", "CHF"), 2)
    value = s.integer(1, 999)
    frames = ("Convert {a} {f} to {t}.", "How much is {a} {f} in {t}?", "What are {a} {f} in {t}?", "{a} {f} to {t}")
    arguments: JsonObject = {"amount": amount, "from": source, "to": target}
    return Use(
        s.pick(frames).format(a=amount, f=source, t=target),
        arguments,
        {"result": value},
        f"{amount} {source} is {value} {target}.",
    )


def _order(s: Source) -> Use:
    count, food = s.integer(1, 12), s.pick(FOODS)
    number = s.integer(1, 999)
    frames = ("Order {n} {f}.", "I would like {n} {f}.", "Please order {n} {f} for me.", "Get me {n} {f}.")
    return Use(
        s.pick(frames).format(n=count, f=food),
        {"item": food, "quantity": count},
        {"order": number},
        f"Your order number is {number}.",
    )


def _light(s: Source) -> Use:
    room, on = s.pick(("kitchen", "bedroom", "living room", "garage", "office", "bathroom", "garden")), s.chance(0.5)
    frames = (
        "Turn {o} the light in the {r}.",
        "Switch {o} the {r} light.",
        "Turn the {r} light {o}.",
        "Lights {o} in the {r}.",
    )
    word = "on" if on else "off"
    return Use(
        s.pick(frames).format(o=word, r=room),
        {"room": room, "on": on},
        {"ok": True},
        f"The light in the {room} is {word}.",
    )


def _stock(s: Source) -> Use:
    thing, count = s.pick(THINGS), s.integer(0, 500)
    frames = (
        "How many {t}s are in stock?",
        "Check the stock of {t}.",
        "Do we have any {t}s left?",
        "Look up the stock for {t}.",
    )
    return Use(
        s.pick(frames).format(t=thing), {"product": thing}, {"stock": count}, f"There are {count} in stock for {thing}."
    )


def _person(s: Source) -> Use:
    name, age, city = s.pick(NAMES), s.integer(1, 99), s.pick(CITIES)
    frames = (
        "Look up the user {n}.",
        "Find the user {n}.",
        "Who is the user {n}?",
        "Get the profile of {n}.",
        "Where does {n} live?",
        "How old is {n}?",
    )
    return Use(
        s.pick(frames).format(n=name),
        {"name": name},
        {"age": age, "city": city},
        f"{name} is {age} years old and lives in {city}.",
    )


KNOWN = (
    Tool("get_weather", "Get the current weather in a city.", {"city": ("string", "The name of the city.")}, _weather),
    Tool("get_time", "Get the current time in a city.", {"city": ("string", "The name of the city.")}, _time),
    Tool(
        "calculator", "Evaluate an arithmetic expression.", {"expression": ("string", "The expression.")}, _calculator
    ),
    Tool("search_web", "Search the web.", {"query": ("string", "What to search for.")}, _search),
    Tool(
        "send_email",
        "Send an email.",
        {"to": ("string", "The recipient."), "subject": ("string", "The subject.")},
        _email,
    ),
    Tool("set_timer", "Set a timer.", {"minutes": ("integer", "The number of minutes.")}, _timer),
    Tool("play_song", "Play a song.", {"title": ("string", "The title of the song.")}, _song),
    Tool(
        "convert_currency",
        "Convert an amount of money.",
        {
            "amount": ("number", "The amount."),
            "from": ("string", "The currency to convert from."),
            "to": ("string", "The currency to convert to."),
        },
        _convert,
    ),
    Tool(
        "order_food",
        "Order food.",
        {"item": ("string", "What to order."), "quantity": ("integer", "How many.")},
        _order,
    ),
    Tool(
        "set_light",
        "Turn a light on or off.",
        {"room": ("string", "The room."), "on": ("boolean", "Whether the light is on.")},
        _light,
    ),
    Tool("check_stock", "Check how many of a product are in stock.", {"product": ("string", "The product.")}, _stock),
    Tool("find_user", "Find a user by name.", {"name": ("string", "The name of the user.")}, _person),
)

_INVENTED_VERBS = (
    "get",
    "find",
    "lookup",
    "create",
    "update",
    "delete",
    "show",
    "open",
    "add",
    "read",
    "check",
    "start",
    "list",
    "save",
    "load",
    "book",
)
_INVENTED_VALUES: dict[str, tuple[str, Callable[[Source], object]]] = {
    "name": ("string", lambda s: s.pick(NAMES)), "city": ("string", lambda s: s.pick(CITIES)),
    "color": ("string", lambda s: s.pick(COLORS)), "word": ("string", lambda s: s.pick(COMMON_WORDS)),
    "title": ("string", lambda s: s.pick(COMMON_WORDS)), "id": ("integer", lambda s: s.number()),
    "count": ("integer", lambda s: s.number()), "number": ("integer", lambda s: s.number()),
    "size": ("integer", lambda s: s.number()), "limit": ("integer", lambda s: s.number()),
    "topic": ("string", lambda s: s.pick(COMMON_WORDS)), "user": ("string", lambda s: s.pick(NAMES)),
    "text": ("string", lambda s: s.pick(COMMON_WORDS)), "key": ("string", lambda s: s.pick(COMMON_WORDS)),
    "year": ("integer", lambda s: s.integer(1900, 2030)), "a": ("integer", lambda s: s.number()),
    "b": ("integer", lambda s: s.number()), "x": ("integer", lambda s: s.number()),
}  # fmt: skip


def invented(s: Source) -> Tool:
    """A tool that no client has, so that names and parameters must be read, not known."""
    verb, noun = s.pick(_INVENTED_VERBS), s.pick(NOUNS)
    keys = s.rng.sample(tuple(_INVENTED_VALUES), s.pick((1, 1, 2, 2, 3)))

    def use(source: Source) -> Use:
        arguments = {key: _INVENTED_VALUES[key][1](source) for key in keys}
        shown = " and ".join(f"{key} {value}" for key, value in arguments.items())
        frames = (
            "{V} the {n} with {x}.",
            "{V} {n}: {x}",
            "Please {v} the {n} with {x}.",
            "Call {f} with {x}.",
            "Use {f} with {x}.",
            "Can you {v} the {n} with {x}?",
        )
        request = source.pick(frames).format(V=verb.capitalize(), v=verb, n=noun, f=f"{verb}_{noun}", x=shown)
        value = source.pick((source.number(), source.pick(COMMON_WORDS)))
        return Use(request, arguments, {"result": value}, f"The result is {value}.")

    return Tool(
        f"{verb}_{noun}", f"{verb.capitalize()} {noun}.", {key: (_INVENTED_VALUES[key][0], "") for key in keys}, use
    )
