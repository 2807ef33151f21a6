"""Addition and subtraction with up to three digits, small multiplication, comparing and counting."""

from .source import Exchange, Source, held_out_by_prompt

LARGEST_OPERAND = 999


def sum_key(a: int, b: int) -> str:
    """The addition problem, whichever operand comes first."""
    return f"{min(a, b)}+{max(a, b)}"


def difference_key(a: int, b: int) -> str:
    """The subtraction problem."""
    return f"{a}-{b}"


def product_key(a: int, b: int) -> str:
    """The multiplication problem, whichever factor comes first."""
    return f"{min(a, b)}*{max(a, b)}"


_EXPRESSION_FRAMES = (
    "{}", "{}", "{}", "{}=", "{} =", "{} = ?", "{}?", "What is {}?", "What is {}?", "What is {}?", "what's {}?",
    "What's {}", "How much is {}?", "Calculate {}.", "Compute {}", "Work out {}.", "Solve {}.", "Solve: {}",
    "What does {} equal?", "Tell me {}.", "Can you calculate {}?", "Can you tell me what {} is?", "Evaluate {}.",
    "Please calculate {}.", "Could you work out {} for me?", "I need to know what {} is.", "What is the result of {}?",
    "Give me the result of {}.", "Do you know what {} is?", "What would {} be?", "Find {}.", "{} makes?",
    "What do you get for {}?",
)  # fmt: skip
_PLUS = ("{a} + {b}",) * 5 + ("{a}+{b}",) * 3 + ("{a} plus {b}",) * 3
_MINUS = ("{a} - {b}",) * 5 + ("{a}-{b}",) * 3 + ("{a} minus {b}",) * 3
_TIMES = (
    ("{a} * {b}",) * 4
    + ("{a}*{b}",) * 2
    + ("{a} x {b}", "{a} × {b}", "{a} times {b}", "{a} times {b}", "{a} multiplied by {b}")
)
_SUM_SENTENCES = (
    "Add {a} and {b}.", "Please add {a} and {b}.", "Add {a} to {b}.", "What is the sum of {a} and {b}?",
    "Sum {a} and {b}.", "If I add {a} and {b}, what do I get?", "Can you add {a} and {b}?",
    "Give me the sum of {a} and {b}.", "I have {a} apples and get {b} more. How many apples do I have?",
    "How much do {a} and {b} make together?", "There are {a} red balls and {b} blue balls. How many balls are there?",
    "add {a} {b}", "sum of {a} and {b}", "What do you get when you add {a} and {b}?", "What is {b} more than {a}?",
    "{a} and {b} together?", "Total of {a} and {b}?",
)  # fmt: skip
_DIFFERENCE_SENTENCES = (
    "Subtract {b} from {a}.", "Please subtract {b} from {a}.", "Take {b} away from {a}.", "What is {a} take away {b}?",
    "If I subtract {b} from {a}, what do I get?", "Can you subtract {b} from {a}?", "What is {b} less than {a}?",
    "I have {a} coins and give away {b}. How many coins are left?", "subtract {b} from {a}",
    "There are {a} birds and {b} fly away. How many birds are left?",
)  # fmt: skip
_PRODUCT_SENTENCES = (
    "Multiply {a} by {b}.", "Multiply {a} and {b}.", "Please multiply {a} by {b}.",
    "What is the product of {a} and {b}?", "There are {a} boxes with {b} pencils each. How many pencils are there?",
    "Can you multiply {a} and {b}?",
)  # fmt: skip
_BARE = (
    " Answer with just the number.",
    " Just the number.",
    " Only the number, please.",
    " Reply with only the number.",
)


def _ask(s: Source, a: int, b: int, expressions: tuple[str, ...], sentences: tuple[str, ...]) -> str:
    if s.chance(0.7):
        frame = s.pick(_EXPRESSION_FRAMES)
        return s.casual(frame.format(s.pick(expressions).format(a=a, b=b)))
    return s.casual(s.pick(sentences).format(a=a, b=b))


def _answer(s: Source, request: str, operation: str, result: int) -> Exchange:
    if s.chance(0.06):
        return request.rstrip("., ") + ("" if request.endswith(("?", "!")) else ".") + s.pick(_BARE), str(result)
    return request, f"{operation} = {result}"


def addition(s: Source, digits: int | None = None) -> Exchange:
    """The sum of two numbers of up to three digits, or of exactly `digits` digits each."""

    def draw() -> tuple[int, int]:
        if digits is not None:
            return s.integer(10 ** (digits - 1), 10**digits - 1), s.integer(10 ** (digits - 1), 10**digits - 1)
        return s.number(), s.number()

    a, b = s.problem(draw, lambda pair: sum_key(*pair))
    return _answer(s, _ask(s, a, b, _PLUS, _SUM_SENTENCES), f"{a} + {b}", a + b)


def addition_of_three_digits(s: Source) -> Exchange:
    """The sum of two three-digit numbers."""
    return addition(s, 3)


def subtraction(s: Source) -> Exchange:
    """The difference of two numbers of up to three digits; one in six is negative or zero."""

    def draw() -> tuple[int, int]:
        a, b = s.number(), s.number()
        return (min(a, b), max(a, b)) if s.chance(1 / 6) else (max(a, b), min(a, b))

    a, b = s.problem(draw, lambda pair: difference_key(*pair))
    return _answer(s, _ask(s, a, b, _MINUS, _DIFFERENCE_SENTENCES), f"{a} - {b}", a - b)


def multiplication(s: Source) -> Exchange:
    """Two digits times one digit, or a product from the table up to 12 × 12."""

    def draw() -> tuple[int, int]:
        a, b = (s.integer(0, 99), s.integer(0, 9)) if s.chance(0.75) else (s.integer(0, 12), s.integer(0, 12))
        return (b, a) if s.chance(0.3) else (a, b)

    a, b = s.problem(draw, lambda pair: product_key(*pair))
    return _answer(s, _ask(s, a, b, _TIMES, _PRODUCT_SENTENCES), f"{a} * {b}", a * b)


def comparison(s: Source) -> Exchange:
    """Which of two different numbers is larger or smaller."""

    def draw() -> tuple[int, int]:
        a = s.number()
        b = s.number() if s.chance(0.6) else abs(a + s.integer(-20, 20))
        return a, (b if b != a else a + 1)

    a, b = s.problem(draw, lambda pair: f"compare {min(pair)} {max(pair)}")
    larger = s.chance(0.6)
    if larger and s.chance(0.3):
        request = f"Is {a} {s.pick(('larger', 'bigger', 'greater', 'more'))} than {b}?"
        return s.casual(request), f"{'Yes' if a > b else 'No'}, {max(a, b)} is larger than {min(a, b)}."
    word = s.pick(("larger", "bigger", "greater", "higher")) if larger else s.pick(("smaller", "less", "lower"))
    frames = (
        "Which is {w}, {a} or {b}?",
        "Which number is {w}: {a} or {b}?",
        "What is {w}, {a} or {b}?",
        "{a} or {b}: which is {w}?",
    )
    request = s.pick(frames).format(w=word, a=a, b=b)
    return s.casual(request), f"{max(a, b) if larger else min(a, b)} is {'larger' if larger else 'smaller'}."


def parity(s: Source) -> Exchange:
    """Whether a number is even or odd."""
    n = s.problem(s.number, lambda drawn: f"parity {drawn}")
    frames = ("Is {n} even or odd?", "Is {n} odd or even?", "Even or odd: {n}?", "Is the number {n} even or odd?")
    return s.casual(s.pick(frames).format(n=n)), f"{n} is {'odd' if n % 2 else 'even'}."


def neighbor(s: Source) -> Exchange:
    """The number after or before another."""
    after = s.chance(0.6)
    n = s.problem(lambda: max(1, s.number()), lambda drawn: f"neighbor {drawn} {after}")
    frames = (
        (
            "What number comes after {n}?",
            "What comes after {n}?",
            "Which number follows {n}?",
            "What is the next number after {n}?",
        )
        if after
        else ("What number comes before {n}?", "What comes before {n}?", "Which number comes right before {n}?")
    )
    return s.casual(
        s.pick(frames).format(n=n)
    ), f"{n + 1 if after else n - 1} comes {'after' if after else 'before'} {n}."


@held_out_by_prompt
def counting(s: Source, longest: int = 24) -> Exchange:
    """Counting up or down over a range of at most `longest` numbers."""
    start = 1 if s.chance(0.5) else s.number(2)
    stop = start + s.integer(2, longest - 1)
    if s.chance(0.25):
        start, stop = stop, start
    numbers = range(start, stop + 1) if start < stop else range(start, stop - 1, -1)
    verb = "Count" if start < stop else s.pick(("Count down", "Count backwards", "Count"))
    frames = [
        "{v} from {a} to {b}.",
        "{v} from {a} to {b}.",
        "Please {lv} from {a} to {b}.",
        "Can you {lv} from {a} to {b}?",
    ]
    if start < stop:
        frames += ["List the numbers from {a} to {b}.", "Write the numbers {a} to {b}."] + ["Count to {b}."] * 3 * (
            start == 1
        )
    request = s.pick(frames).format(v=verb, lv=verb.lower(), a=start, b=stop)
    return s.casual(request), ", ".join(map(str, numbers))


def long_counting(s: Source) -> Exchange:
    """Counting over up to 150 numbers: an answer of several hundred tokens."""
    return counting(s, 150)


def chain(s: Source) -> list[Exchange]:
    """A calculation and follow-ups that work on the last result."""
    exchanges = [addition(s) if s.chance(0.6) else subtraction(s)]
    result = int(exchanges[0][1].rpartition(" ")[2])
    for _ in range(s.integer(1, 4)):
        step = _follow_up(s, result)
        if step is None:
            break
        exchanges.append(step)
        result = int(step[1].rpartition(" ")[2])
    return exchanges


_ADD_TO = (
    "Add {n} to that.", "Now add {n}.", "Plus {n}?", "And plus {n}?", "Add {n} more.", "Add {n} to the result.",
    "add {n}", "Now add {n} to it.", "What if you add {n} to that?", "And if I add {n}?", "Add {n} to your answer.",
    "+ {n}", "plus {n}",
)  # fmt: skip
_TAKE_FROM = (
    "Subtract {n} from that.", "Now subtract {n}.", "Minus {n}?", "And minus {n}?", "Take away {n}.", "minus {n}",
    "- {n}", "Subtract {n} from the result.", "Now take {n} away from it.", "And if I subtract {n}?",
    "Subtract {n} from your answer.",
)  # fmt: skip
_TIMES_THAT = ("Multiply that by {n}.", "Now times {n}.", "Times {n}?", "Multiply the result by {n}.", "And times {n}?")


def _follow_up(s: Source, result: int) -> Exchange | None:
    """One more operation on `result`, or None where it is out of the model's range."""
    if not 0 <= result <= LARGEST_OPERAND:
        return None
    if result <= 99 and s.chance(0.2):
        factors = [n for n in range(2, 10) if s.admits(product_key(result, n))]
        if factors:
            n = s.pick(factors)
            return s.casual(s.pick(_TIMES_THAT).format(n=n)), f"{result} * {n} = {result * n}"
    if s.chance(0.08) and s.admits(sum_key(result, result)):
        return s.casual(
            s.pick(("Double it.", "Now double that.", "Double the result."))
        ), f"{result} + {result} = {2 * result}"
    if s.chance(0.6):
        n = s.problem(lambda: s.number(s.integer(1, 3)), lambda drawn: sum_key(result, drawn))
        return s.casual(s.pick(_ADD_TO).format(n=n)), f"{result} + {n} = {result + n}"
    taken = s.find(lambda: s.integer(0, max(result, 9)), lambda drawn: difference_key(result, drawn))
    if taken is None:
        return None
    return s.casual(s.pick(_TAKE_FROM).format(n=taken)), f"{result} - {taken} = {result - taken}"
