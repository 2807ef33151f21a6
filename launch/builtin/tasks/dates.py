"""Simple facts of the calendar: days, months, leap years."""

from .source import Exchange, Source, held_out_by_prompt, prompt_key

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth",
)  # fmt: skip
_COUNTS = (
    ("days are in a week", "A week has 7 days."),
    ("months are in a year", "A year has 12 months."),
    ("days are in a year", "A year has 365 days, or 366 in a leap year."),
    ("days are in a leap year", "A leap year has 366 days."),
    ("weeks are in a year", "A year has 52 weeks and one or two days."),
    ("hours are in a day", "A day has 24 hours."),
    ("minutes are in an hour", "An hour has 60 minutes."),
    ("seconds are in a minute", "A minute has 60 seconds."),
    ("days are in a weekend", "A weekend has 2 days: Saturday and Sunday."),
    ("years are in a century", "A century has 100 years."),
    ("years are in a decade", "A decade has 10 years."),
)


def is_leap(year: int) -> bool:
    """The Gregorian rule."""
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def _year(s: Source) -> int:
    return (
        s.integer(1900, 2100) if s.chance(0.7) else s.integer(16, 24) * 100 + (0 if s.chance(0.5) else s.integer(0, 99))
    )


@held_out_by_prompt
def day_order(s: Source) -> Exchange:
    """The day after, before, or some days from a day."""
    kind, today, steps = s.integer(0, 3), s.integer(0, 6), s.integer(2, 7)
    name = DAYS[today]
    if kind <= 1:
        frames: tuple[str, ...] = (
            "What day comes after {d}?",
            "Which day comes after {d}?",
            "What day follows {d}?",
            "What comes after {d}?",
            "If today is {d}, what day is tomorrow?",
            "What is the day after {d}?",
            "Today is {d}. What day is it tomorrow?",
        )
        return s.careless(s.pick(frames).format(d=name)), f"{DAYS[(today + 1) % 7]} comes after {name}."
    if kind == 2:
        frames = (
            "What day comes before {d}?",
            "Which day comes before {d}?",
            "What comes before {d}?",
            "What is the day before {d}?",
            "If today is {d}, what day was yesterday?",
            "Today is {d}. What day was yesterday?",
        )
        return s.careless(s.pick(frames).format(d=name)), f"{DAYS[today - 1]} comes before {name}."
    frames = (
        "If today is {d}, what day is it in {n} days?",
        "Today is {d}. What day is it in {n} days?",
        "What day is {n} days after {d}?",
    )
    return s.careless(
        s.pick(frames).format(d=name, n=steps)
    ), f"{steps} days after {name} is {DAYS[(today + steps) % 7]}."


@held_out_by_prompt
def month_order(s: Source) -> Exchange:
    """The month after or before a month, or its number."""
    month = s.integer(0, 11)
    name, kind = MONTHS[month], s.integer(0, 3)
    if kind == 0:
        frames: tuple[str, ...] = (
            "What month comes after {m}?",
            "Which month comes after {m}?",
            "What month follows {m}?",
            "What comes after {m}?",
            "What is the month after {m}?",
        )
        return s.careless(s.pick(frames).format(m=name)), f"{MONTHS[(month + 1) % 12]} comes after {name}."
    if kind == 1:
        frames = (
            "What month comes before {m}?",
            "Which month comes before {m}?",
            "What comes before {m}?",
            "What is the month before {m}?",
        )
        return s.careless(s.pick(frames).format(m=name)), f"{MONTHS[month - 1]} comes before {name}."
    if kind == 2:
        frames = (
            "What is the {o} month of the year?",
            "Which month is the {o} month?",
            "What month is number {n}?",
            "Which month is month {n}?",
        )
        return s.careless(
            s.pick(frames).format(o=_ORDINALS[month], n=month + 1)
        ), f"{name} is the {_ORDINALS[month]} month of the year."
    frames = (
        "Which number is the month {m}?",
        "What number month is {m}?",
        "Is {m} the first month of the year?",
        "Which month of the year is {m}?",
    )
    return s.careless(
        s.pick(frames[:2] + frames[3:]).format(m=name)
    ), f"{name} is the {_ORDINALS[month]} month of the year."


@held_out_by_prompt
def month_length(s: Source) -> Exchange:
    """How many days a month has."""
    month = s.integer(0, 11)
    name = MONTHS[month]
    if month == 1 and s.chance(0.6):
        year = s.problem(lambda: _year(s), lambda drawn: f"year {drawn}")
        frames: tuple[str, ...] = (
            "How many days does February have in {y}?",
            "How many days did February {y} have?",
            "How many days are in February {y}?",
        )
        return s.careless(s.pick(frames).format(y=year)), f"February has {29 if is_leap(year) else 28} days in {year}."
    frames = (
        "How many days are in {m}?",
        "How many days does {m} have?",
        "How long is {m}?",
        "How many days are there in {m}?",
        "days in {m}",
        "Number of days in {m}?",
        "How many days has {m}?",
        "What is the number of days in {m}?",
    )
    days = "28 days, or 29 in a leap year" if month == 1 else f"{MONTH_LENGTHS[month]} days"
    return s.careless(s.pick(frames).format(m=name)), f"{name} has {days}."


def leap_year(s: Source) -> Exchange:
    """Whether a year is a leap year."""
    year = s.problem(lambda: _year(s), lambda drawn: f"year {drawn}")
    frames = (
        "Is {y} a leap year?",
        "Was {y} a leap year?",
        "Is the year {y} a leap year?",
        "Leap year or not: {y}?",
        "Will {y} be a leap year?",
    )
    answer = f"Yes, {year} is a leap year." if is_leap(year) else f"No, {year} is not a leap year."
    return s.careless(s.pick(frames).format(y=year)), answer


def next_date(s: Source) -> Exchange:
    """The date after or before a date (of a year that is not a leap year)."""

    def draw() -> tuple[int, int, bool]:
        month = s.integer(0, 11)
        edge = s.chance(0.3)
        return month, (s.pick((1, MONTH_LENGTHS[month])) if edge else s.integer(1, MONTH_LENGTHS[month])), s.chance(0.6)

    month, day, after = s.problem(draw, lambda p: f"date {p[0]} {p[1]} {p[2]}")
    date = f"{MONTHS[month]} {day}"
    if after:
        last = day == MONTH_LENGTHS[month]
        other = f"{MONTHS[(month + 1) % 12]} 1" if last else f"{MONTHS[month]} {day + 1}"
        frames: tuple[str, ...] = (
            "What date comes after {d}?",
            "What is the day after {d}?",
            "Which date follows {d}?",
            "If today is {d}, what date is tomorrow?",
        )
    else:
        other = f"{MONTHS[month - 1]} {MONTH_LENGTHS[month - 1]}" if day == 1 else f"{MONTHS[month]} {day - 1}"
        frames = (
            "What date comes before {d}?",
            "What is the day before {d}?",
            "If today is {d}, what date was yesterday?",
        )
    return s.careless(s.pick(frames).format(d=date)), f"{other} comes {'after' if after else 'before'} {date}."


@held_out_by_prompt
def calendar_facts(s: Source) -> Exchange:
    """How many of one unit make another, and the lists of days and months."""
    kind = s.rng.random()
    if kind < 0.65:
        question, answer = s.pick(_COUNTS)
        short = question.replace(" are in ", " in ")
        what, _, unit = question.partition(" are in ")
        return s.careless(
            s.pick((f"How many {question}?", f"How many {short}?", f"How many {what} does {unit} have?"))
        ), answer
    if kind < 0.75:
        frames: tuple[str, ...] = (
            "List the days of the week.",
            "What are the days of the week?",
            "Name the days of the week.",
            "Name all weekdays in order.",
        )
        return s.careless(s.pick(frames)), ", ".join(DAYS)
    if kind < 0.85:
        frames = (
            "List the months of the year.",
            "What are the months of the year?",
            "Name the twelve months.",
            "List all months in order.",
        )
        return s.careless(s.pick(frames)), ", ".join(MONTHS)
    if kind < 0.92:
        return s.careless(
            s.pick(("Which months have 30 days?", "What months have 30 days?"))
        ), "April, June, September and November have 30 days."
    day = s.pick(DAYS)
    weekend = day in DAYS[5:]
    if s.chance(0.5):
        return s.careless(
            f"Is {day} a weekday?"
        ), f"{'No' if weekend else 'Yes'}, {day} is {'in the weekend' if weekend else 'a weekday'}."
    return s.careless(
        f"Is {day} in the weekend?"
    ), f"{'Yes' if weekend else 'No'}, {day} is {'in the weekend' if weekend else 'a weekday'}."


def follow_ups(s: Source) -> list[Exchange]:
    """Walking forward or backward through days or months."""
    names, noun = (DAYS, "day") if s.chance(0.5) else (MONTHS, "month")
    index, after = s.integer(0, len(names) - 1), s.chance(0.6)
    word, step = ("after", 1) if after else ("before", -1)
    exchanges: list[Exchange] = []
    for turn in range(s.integer(2, 4)):
        name, other = names[index], names[(index + step) % len(names)]
        again = (f"And {word} that?", f"And the {noun} {word} that?", f"What comes {word} that?")
        request = s.careless(f"What {noun} comes {word} {name}?" if turn == 0 else s.pick(again))
        exchanges.append((request, f"{other} comes {word} {name}."))
        index = (index + step) % len(names)
    return exchanges if s.admits(prompt_key(exchanges[0])) else follow_ups(s)
