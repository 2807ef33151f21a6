"""Measures the built-in model on held-out problems, task by task, and writes the table into its card.

    python -m tandem.launch.builtin.evaluate --model DIR [--count 500] [--write]

Every prompt goes through the chat template, every answer is greedy and has to end by itself. An answer counts when it
is exactly the expected one, unless the benchmark says otherwise.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import MODEL_DIR
from .chat import END, Chat, render
from .tasks import (
    arithmetic,
    conversation,
    dates,
    facts,
    json_objects,
    lists,
    repeating,
    smalltalk,
    spelling,
    stories,
    tools,
)
from .tasks.source import Exchange, Source

TABLE_START, TABLE_END = "<!-- measured -->", "<!-- /measured -->"
_SPARE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """A chat whose last message is the expected answer; `accepts` judges an answer, given without the end token."""

    chat: Chat
    accepts: Callable[[str], bool]
    max_tokens: int | None = None
    """The longest answer that is waited for; None: as long as the expected one."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row of the card: what is asked, and where cases come from."""

    name: str
    make: Callable[[Source], Case]
    note: str = ""


def _exact(chat: Chat) -> Case:
    expected = chat.answer()
    return Case(chat, lambda answer: answer == expected)


def _single(task: Callable[[Source], Exchange]) -> Callable[[Source], Case]:
    return lambda s: _exact(conversation.chat_of(s, [task(s)]))


def _turns(task: Callable[[Source], list[Exchange]]) -> Callable[[Source], Case]:
    return lambda s: _exact(conversation.chat_of(s, task(s)))


def _same_json(task: Callable[[Source], Exchange]) -> Callable[[Source], Case]:
    def make(s: Source) -> Case:
        chat = conversation.chat_of(s, [task(s)])
        expected = json.loads(chat.answer())
        return Case(chat, lambda answer: _parsed(answer) == expected)

    return make


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _tool_call(s: Source) -> Case:
    chat = tools.tool_call(s)
    call = chat.messages[-1].tool_calls[0]
    expected = {"name": call.name, "arguments": call.arguments}

    def accepts(answer: str) -> bool:
        inner = answer.removeprefix("<tool_call>").removesuffix("</tool_call>")
        return len(answer) - len(inner) == len("<tool_call></tool_call>") and _parsed(inner) == expected

    return Case(chat, accepts)


def _story(s: Source) -> Case:
    exchange, words = stories.story_about(s)
    return Case(
        conversation.chat_of(s, [exchange]),
        lambda answer: len(answer) > 150 and all(word in answer for word in words),
        400,
    )


def _far_in(s: Source) -> Case:
    before = conversation.talk(Source(s.rng), 7_500)
    return _exact(conversation.chat_of(s, [*before, arithmetic.addition_of_three_digits(s)]))


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("addition, three digits each", _single(arithmetic.addition_of_three_digits)),
    Benchmark("addition, up to three digits", _single(arithmetic.addition)),
    Benchmark("subtraction, up to three digits", _single(arithmetic.subtraction)),
    Benchmark("multiplication, two digits by one", _single(arithmetic.multiplication), "and the table up to 12 × 12"),
    Benchmark(
        "comparing, even or odd, the number before or after",
        _single(lambda s: s.pick((arithmetic.comparison, arithmetic.parity, arithmetic.neighbor))(s)),
    ),
    Benchmark("counting", _single(arithmetic.counting), "wording held out"),
    Benchmark("sorting five numbers", _single(lists.sorting_five)),
    Benchmark("sorting two to eight numbers", _single(lists.sorting)),
    Benchmark("sorting words", _single(lists.sorting_words)),
    Benchmark("reversing lists", _single(lists.reversing)),
    Benchmark("largest or smallest of a list", _single(lists.extreme)),
    Benchmark("spelling, real words", _single(spelling.spelling_real_word)),
    Benchmark("spelling, made-up words too", _single(spelling.spelling)),
    Benchmark("spelling backwards, real words", _single(spelling.backwards_real_word)),
    Benchmark("counting letters, first and last letter", _single(spelling.letters)),
    Benchmark("date after, date before", _single(dates.next_date)),
    Benchmark("leap years", _single(dates.leap_year)),
    Benchmark(
        "days, months, units of time",
        _single(lambda s: s.pick((dates.day_order, dates.month_order, dates.month_length, dates.calendar_facts))(s)),
        "wording held out",
    ),
    Benchmark("facts of the world", _single(facts.facts), "wording held out"),
    Benchmark("who are you, greetings", _single(smalltalk.greeting), "wording held out"),
    Benchmark(
        "requests out of reach are declined",
        _single(lambda s: s.pick((smalltalk.out_of_reach, smalltalk.too_large))(s)),
        "wording held out",
    ),
    Benchmark("repeating what was said", _single(repeating.repeating)),
    Benchmark("JSON with given fields", _same_json(json_objects.json_fields), "parsed and equal"),
    Benchmark("JSON from a description", _same_json(json_objects.json_described), "parsed and equal"),
    Benchmark(
        "JSON lists and nested objects", _same_json(json_objects.json_nested), "parsed and equal; wording held out"
    ),
    Benchmark("tool calls", _tool_call, "parsed and equal; up to four tools, invented ones too"),
    Benchmark("answers from a tool's result", lambda s: _exact(tools.tool_answer(s))),
    Benchmark("stories", _story, "holds the asked-for animal and name, and ends"),
    Benchmark("multi-turn: follow-up calculations", _turns(arithmetic.chain)),
    Benchmark("multi-turn: follow-ups on a list", _turns(lists.follow_ups)),
    Benchmark("multi-turn: follow-ups on a word", _turns(spelling.follow_ups)),
    Benchmark("multi-turn: changing a JSON object", _turns(json_objects.follow_ups)),
    Benchmark("multi-turn: the user's name", _turns(conversation.remembered_name)),
    Benchmark("multi-turn: the first question", _turns(conversation.first_question)),
    Benchmark("three-digit addition after about 3,000 tokens of chat", _far_in),
)


def cases(benchmark: Benchmark, count: int, seed: int = 0) -> list[Case]:
    """The first `count` held-out cases of a benchmark; the same for the same seed."""
    source = Source(random.Random(f"evaluation {seed} {benchmark.name}"), held_out=True)
    return [benchmark.make(source) for _ in range(count)]


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chosen: Sequence[Case], batch_tokens: int = 65_536
) -> list[str | None]:
    """The model's greedy answer to each case, without the end token; None where it did not end in time."""
    prompts = [_ids(tokenizer, render(c.chat.messages[:-1], c.chat.tools, add_generation_prompt=True)) for c in chosen]
    limits = [c.max_tokens or len(_ids(tokenizer, c.chat.answer())) + _SPARE_TOKENS for c in chosen]
    order = sorted(range(len(chosen)), key=lambda index: (limits[index] > 200, len(prompts[index])))
    found: list[str | None] = [None] * len(chosen)
    while order:
        longest = len(prompts[order[-1]])
        batch, order = order[-max(1, batch_tokens // longest) :], order[: -max(1, batch_tokens // longest)]
        longest = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), longest), int(tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        # Any, because the annotations of `generate` contradict each other.
        written = cast(Any, model).generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(limits[index] for index in batch),
            do_sample=False,
        )[:, longest:]
        for row, index in enumerate(batch):
            text = str(tokenizer.decode(written[row].tolist(), skip_special_tokens=False))
            found[index] = text.partition(END)[0] if END in text else None
    return found


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, benchmark: Benchmark, count: int, show: int = 0
) -> float:
    """The share of `count` held-out cases that are answered right; prints the first `show` wrong answers."""
    chosen = cases(benchmark, count)
    right = 0
    for case, answer in zip(chosen, answers(model, tokenizer, chosen), strict=True):
        if answer is not None and case.accepts(answer):
            right += 1
        elif show:
            show -= 1
            print(
                f"    {case.chat.messages[-2].content[-160:]!r}\n"
                f"      -> {answer!r}, expected {case.chat.answer()[:160]!r}"
            )
    return right / count


def by_name(*names: str) -> list[Benchmark]:
    """The benchmarks with these names.

    Raises:
        ValueError: if there is none of a name.
    """
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in names:
        if name not in known:
            raise ValueError(f"no benchmark {name!r}; there are: {', '.join(known)}")
    return [known[name] for name in names]


def load(folder: Path, device: str, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model and tokenizer of a folder, ready for `answers`."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.nn.Module.to(model, device)
    model.eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def write_card(card: Path, table: str) -> None:
    """Replaces the part of the card between the two markers.

    Raises:
        ValueError: if the card has no such part.
    """
    head, start, rest = card.read_text(encoding="utf-8").partition(TABLE_START)
    _, end, tail = rest.partition(TABLE_END)
    if not (start and end):
        raise ValueError(f"{card} has no part between {TABLE_START} and {TABLE_END}")
    card.write_text(f"{head}{TABLE_START}\n{table}{TABLE_END}{tail}", encoding="utf-8")


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--count", type=int, default=500, help="held-out cases per benchmark")
    parser.add_argument("--only", nargs="*", default=[], help="names of benchmarks, instead of all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--show", type=int, default=0, help="how many wrong answers to print per benchmark")
    parser.add_argument("--write", action="store_true", help="write the table into README.md in the model's folder")
    options = parser.parse_args()
    model, tokenizer = load(options.model, options.device, getattr(torch, options.dtype))
    rows = []
    for benchmark in by_name(*options.only) if options.only else BENCHMARKS:
        share = accuracy(model, tokenizer, benchmark, options.count, options.show)
        print(f"{share:7.1%}  {benchmark.name}", flush=True)
        rows.append(f"| {benchmark.name} | {share:.1%} | {benchmark.note} |\n")
    if options.write:
        hardware = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
        head = f"{options.count} held-out prompts per task, greedy, {options.dtype}, {hardware}.\n\n"
        write_card(options.model / "README.md", f"{head}| task | right | |\n|---|---|---|\n{''.join(rows)}")


if __name__ == "__main__":
    main()
