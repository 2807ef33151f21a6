"""Grammars on a worker: compiled as they are meant, tried where they can do no harm, followed step by step."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from tandem.protocol.errors import ProtocolError
from tandem.protocol.messages import StepPlan
from tandem.protocol.structured import StructuredOutputsParams
from tandem.worker.grammars import masks as mask_module
from tandem.worker.grammars import sandbox
from tandem.worker.grammars.book import MOST, GrammarBook, Lexer
from tandem.worker.grammars.checker import GrammarChecker
from tandem.worker.grammars.compiler import GrammarError
from tandem.worker.grammars.growth import Growth
from tandem.worker.grammars.masks import MOVING_S, MaskThread, StepMasks
from tandem.worker.grammars.slots import GrammarSlots, GrammarStep, JoiningRow
from tandem.worker.sampler import AllowedTokens, allow

from support.deadlines import DEADLINE_S
from support.hostile_grammars import HOSTILE
from support.tiny_models import EOS, VOCAB, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BYTES = TOKENIZER.to_str().encode()
BOOK = GrammarBook(BYTES, VOCAB, (EOS,))
TOO_SLOW = "takes over"
"""On a slow machine a grammar may take too long before another limit is met."""
VISIBLE = st.characters(codec="ascii", min_codepoint=0x21, max_codepoint=0x7E)


def ids(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER.encode(text, add_special_tokens=False).ids]


def matcher_of(book: GrammarBook, wanted: StructuredOutputsParams) -> LLMatcher:
    """At the grammar's beginning, of no row."""
    lexer = book.lexer(wanted)
    book.release(lexer)
    return lexer.copy()


def lexers_of(book: GrammarBook, wanted: StructuredOutputsParams) -> int:
    return len(book._compiled[wanted].lexers) if wanted in book._compiled else 0


def accepts(wanted: StructuredOutputsParams, text: str) -> bool:
    """Whether the text is a whole answer."""
    matcher = matcher_of(BOOK, wanted)
    tokens = ids(text)
    return int(matcher.try_consume_tokens(tokens)) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        ({"json": '{"type": "integer"}'}, ["7", "-12"], ["x", "", "1.5"]),
        ({"json": "{}"}, ["7", '{"a": [null]}'], ["a"]),
        ({"json_object": True}, ["{}", '{ "a" : 1 }'], ["[]", "1"]),
        ({"json_object": True, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"json_object": True, "whitespace_pattern": "_?"}, ['{"a":_1}'], ['{"a": 1}']),
        ({"regex": "a+|b"}, ["aaa", "b"], ["ab", "", "c"]),
        ({"regex": "^a/b$"}, ["a/b"], ["a"]),
        ({"choice": ("a", "ab", "a.b|c", "a/b\\n")}, ["a", "ab", "a.b|c", "a/b\\n"], ["axb|c", "b", ""]),
        ({"grammar": 'start: "a" start | "b"'}, ["aab"], ["aa"]),
        ({"grammar": 'root ::= "a" root | "b"'}, ["aab"], ["aa"]),
    ],
)
def test_each_kind_means_what_it_says(wanted: dict[str, Any], good: list[str], bad: list[str]) -> None:
    params = StructuredOutputsParams(**wanted)
    assert [text for text in good if not accepts(params, text)] == []
    assert [text for text in bad if accepts(params, text)] == []


@settings(max_examples=100)
@given(st.lists(st.text(VISIBLE, min_size=1, max_size=8), min_size=1, max_size=5), st.data())
def test_a_choice_is_taken_literally(texts: list[str], data: st.DataObject) -> None:
    params = StructuredOutputsParams(choice=tuple(texts))
    assert all(accepts(params, text) for text in texts)
    text = data.draw(st.sampled_from(texts))
    at = data.draw(st.integers(0, len(text) - 1))
    other = text[:at] + data.draw(VISIBLE) + text[at + 1 :]
    assert accepts(params, other) == (other in texts)


def test_a_model_without_what_grammars_need_says_so() -> None:
    for book, story in (
        (GrammarBook(None, VOCAB, (EOS,)), "without a tokenizer"),
        (GrammarBook(BYTES, VOCAB, ()), "no end-of-sequence token"),
        (GrammarBook(b"{", VOCAB, (EOS,)), "tokenizer cannot be used"),
        (GrammarBook(b"[1]", VOCAB, (EOS,)), "tokenizer cannot be used"),
        (GrammarBook(b'{"added_tokens": [{}], "decoder": 1}', VOCAB, (EOS,)), "tokenizer cannot be used"),
        (GrammarBook(BYTES, 10, (EOS,)), "tokenizer cannot be used"),
    ):
        assert story in book.problem
        with pytest.raises(GrammarError, match=story):
            matcher_of(book, StructuredOutputsParams(regex="a"))


def test_added_tokens_that_the_model_has_no_logits_for_are_left_out() -> None:
    """As a fine-tune's tokenizer has them that was given special tokens while the embedding was not widened."""
    widened = tiny_tokenizer()
    widened.add_special_tokens(["<extra>", "<more>"])
    assert widened.get_vocab_size() == VOCAB + 2
    book = GrammarBook(widened.to_str().encode(), VOCAB, (EOS,))
    assert book.problem == ""
    matcher = matcher_of(book, StructuredOutputsParams(regex="ab"))
    assert int(matcher.try_consume_tokens(ids("ab"))) == 2
    assert matcher.is_accepting()


def test_the_book_keeps_so_many_grammars_and_forgets_what_it_is_told_to() -> None:
    book = GrammarBook(BYTES, VOCAB, (EOS,))
    grammars = [StructuredOutputsParams(regex=f"a{{{count}}}") for count in range(1, MOST + 2)]
    for wanted in grammars:
        matcher_of(book, wanted)
    assert [book.holds(wanted) for wanted in grammars] == [False] + [True] * MOST
    book.discard(grammars[-1])
    assert not book.holds(grammars[-1])


def test_each_row_of_a_grammar_gets_a_lexer_of_its_own_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.worker.grammars.book.MOST_LEXERS", 4)
    book, wanted = GrammarBook(BYTES, VOCAB, (EOS,)), StructuredOutputsParams(regex="(ab)*")
    first = book.lexer(wanted)
    assert not book.crowded(wanted)
    others = [book.lexer(wanted) for _ in range(5)]
    assert all(other is first for other in others)
    assert book.crowded(wanted)
    assert not book.crowded(wanted)  # one who lets it grow is enough
    book.grow(wanted)
    assert (lexers_of(book, wanted), book.grown) == (4, 3)
    moved = []
    while (other := book.better(wanted, first)) is not None:
        book.release(first)
        moved.append(other)
    assert sorted([first.users, *{id(lexer): lexer.users for lexer in moved}.values()]) == [1, 1, 2, 2]
    assert not book.crowded(wanted)


def test_lexers_of_all_grammars_are_bounded_and_those_that_nobody_uses_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tandem.worker.grammars.book.MOST_MORE", 2)
    book = GrammarBook(BYTES, VOCAB, (EOS,))
    one, two = StructuredOutputsParams(regex="a*"), StructuredOutputsParams(regex="b*")
    rows = [book.lexer(one) for _ in range(9)]
    assert book.crowded(one)
    book.grow(one)
    assert lexers_of(book, one) == 3
    rows += [lexer for lexer in (book.better(one, rows[0]), book.better(one, rows[0])) if lexer is not None]
    two_rows = [book.lexer(two) for _ in range(2)]
    assert not book.crowded(two)
    for lexer in rows:
        book.release(lexer)
    assert book.crowded(two)
    book.grow(two)
    assert (lexers_of(book, one), lexers_of(book, two)) == (1, 2)
    assert book.better(two, two_rows[0]) is not None


def test_a_grammar_that_is_dear_to_compile_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.worker.grammars.book.CHEAP_S", -1.0)
    book, wanted = GrammarBook(BYTES, VOCAB, (EOS,)), StructuredOutputsParams(regex="a*")
    for _ in range(3):
        book.lexer(wanted)
    assert not book.crowded(wanted)


def crowd(book: GrammarBook, wanted: StructuredOutputsParams, rows: int = 9) -> list[Lexer]:
    """So many rows, of which each has one lexer; the grammar is to grow."""
    lexers = [book.lexer(wanted) for _ in range(rows)]
    assert book.crowded(wanted)
    return lexers


def test_a_grammar_whose_rows_have_left_before_its_turn_does_not_grow() -> None:
    book, wanted = GrammarBook(BYTES, VOCAB, (EOS,)), StructuredOutputsParams(regex="a*")
    for lexer in crowd(book, wanted):
        book.release(lexer)
    book.grow(wanted)
    assert (lexers_of(book, wanted), book.grown) == (1, 0)
    crowd(book, wanted)  # may grow another time


def test_a_grammar_that_is_compiled_anew_while_the_former_waits_to_grow_gets_no_more_than_its_rows() -> None:
    book, wanted = GrammarBook(BYTES, VOCAB, (EOS,)), StructuredOutputsParams(regex="a*")
    crowd(book, wanted)
    book.discard(wanted)
    crowd(book, wanted, 2)
    book.grow(wanted)
    book.grow(wanted)
    assert (lexers_of(book, wanted), book.grown) == (2, 1)


def test_a_grammar_that_is_forgotten_while_it_grows_does_so_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled then is of the former, and the new one has a row of its own only."""
    book, wanted = GrammarBook(BYTES, VOCAB, (EOS,)), StructuredOutputsParams(regex="a*")
    crowd(book, wanted)
    compiled = book._compile

    def forget(source: str) -> LLMatcher:
        monkeypatch.setattr(book, "_compile", compiled)
        book.discard(wanted)
        book.lexer(wanted)
        return compiled(source)

    monkeypatch.setattr(book, "_compile", forget)
    book.grow(wanted)
    assert (lexers_of(book, wanted), book.grown) == (1, 0)


def test_a_grammar_grows_without_being_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of choices are written in Python, for which the threads of a step would wait each time."""
    book, wanted = GrammarBook(BYTES, VOCAB, (EOS,)), StructuredOutputsParams(choice=("a", "b"))
    crowd(book, wanted)
    monkeypatch.setattr("tandem.worker.grammars.compiler._escape", None)
    book.grow(wanted)
    assert lexers_of(book, wanted) == 9
    with pytest.raises(TypeError):
        book.lexer(StructuredOutputsParams(choice=("c",)))


def test_who_closes_waits_for_one_lexer_and_not_for_all_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    book, grammars = GrammarBook(BYTES, VOCAB, (EOS,)), [StructuredOutputsParams(regex=f"{char}*") for char in "ab"]
    for wanted in grammars:
        crowd(book, wanted)
    growth, compiling, compiled = Growth(book), threading.Event(), book._compile

    def slowly(source: str) -> LLMatcher:
        compiling.set()
        assert growth._closing.wait(DEADLINE_S)
        return compiled(source)

    monkeypatch.setattr(book, "_compile", slowly)
    for wanted in grammars:
        growth.want(wanted)
    assert compiling.wait(DEADLINE_S)
    growth.close()
    assert not growth._thread.is_alive()
    assert [lexers_of(book, wanted) for wanted in grammars] == [2, 1]


# --- checking --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(GrammarBook(BYTES, VOCAB, (EOS,)))
    yield made
    made.close()


def verdict(checker: GrammarChecker, wanted: StructuredOutputsParams) -> str:
    answered = threading.Event()
    answers: list[str] = []

    def answer(error: str) -> None:
        answers.append(error)
        answered.set()

    checker.check(wanted, answer)
    assert answered.wait(DEADLINE_S)
    return answers[0]


def test_a_good_grammar_is_compiled_once_it_has_passed(checker: GrammarChecker) -> None:
    wanted = StructuredOutputsParams(regex="good+")
    assert verdict(checker, wanted) == ""
    assert checker._book.holds(wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_followed_within_bounds(checker: GrammarChecker, name: str) -> None:
    """Nothing that is tried takes this process's memory, or its sandbox away; what passes can be followed."""
    wanted, story = HOSTILE[name]
    process = checker._sandbox._process
    assert process is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = verdict(checker, wanted)
    assert (story in error or TOO_SLOW in error) if story else error == "", error
    assert len(error) <= 1_100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert checker._sandbox._process is process
    assert process.poll() is None


def test_a_sandbox_that_is_killed_is_replaced() -> None:
    checker = GrammarChecker(BOOK)
    try:
        process = checker._sandbox.start()
        process.kill()
        process.wait()
        assert verdict(checker, StructuredOutputsParams(regex="after")) == ""
        assert checker._sandbox._process is not process
    finally:
        checker.close()


def test_a_trial_refuses_a_grammar_whose_tokens_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = LLTokenizer(BOOK_TEXT, n_vocab=VOCAB, eos_token=[EOS])
    monkeypatch.setattr(sandbox, "TOKEN_CPU_S", -1.0)
    with pytest.raises(GrammarError, match="choosing a token takes"):
        sandbox.try_grammar(StructuredOutputsParams(regex="a{5}"), tokenizer)


BOOK_TEXT = json.dumps(
    {
        **json.loads(BYTES),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }
)


# --- steps -----------------------------------------------------------------------------------------------------------


def columns(**changes: Any) -> StepPlan:
    values: dict[str, Any] = {
        name: np.array(value, np.int32) if isinstance(value, list) else value for name, value in changes.items()
    }
    return StepPlan(epoch=1, registration=1, step=0, **values)


def test_slots_follow_plans() -> None:
    slots = GrammarSlots(8)
    wanted = StructuredOutputsParams(regex="a")
    sampled = np.array([2, 5, 1], np.int32)
    assert slots.apply(columns(leave=[3]), sampled, 3) is None
    step = slots.apply(
        columns(
            join_slot=[1, 5, 6],
            join_grammar=[0, -1, 0],
            join_length=[3, 1, 2],
            join_prompt_length=[1, 1, 2],
            join_token=[10, 11, 12, 20, 30, 31],
            grammars=(wanted,),
        ),
        sampled,
        2,
    )
    assert step is not None
    assert step.join == [JoiningRow(1, wanted, [11, 12]), JoiningRow(6, wanted, [])]
    assert (step.slots, step.at.tolist(), step.decodes) == ([1], [2], [False])
    step = slots.apply(columns(leave=[1, 5]), np.array([6, 2], np.int32), 2)
    assert step is not None
    assert (step.leave, step.slots, step.decodes) == ([1], [6], [True])
    assert slots.apply(columns(leave=[6]), sampled, 3) is not None
    assert slots.apply(columns(), sampled, 3) is None


@pytest.mark.parametrize("which", [[1], [-2], [0, 0]])
def test_grammar_columns_that_do_not_fit_are_refused(which: list[int]) -> None:
    plan = columns(join_slot=[1], join_grammar=which, grammars=(StructuredOutputsParams(regex="a"),))
    with pytest.raises(ProtocolError, match="join_grammar"):
        GrammarSlots(8).apply(plan, np.array([1], np.int32), 0)


class Masks:
    """A mask thread, and steps handed to it one by one."""

    def __init__(self, book: GrammarBook = BOOK) -> None:
        self.thread = MaskThread(book)
        self.last: StepMasks | None = None

    def step(self, slots: list[int], decodes: list[bool], **rows: Any) -> StepMasks:
        target = np.zeros((len(slots), BOOK.mask_words), np.int32)
        at = np.arange(len(slots), dtype=np.int32)
        made = StepMasks(GrammarStep(rows.get("leave", []), rows.get("join", []), slots, at, decodes), target)
        self.thread.put(made)
        self.last = made
        return made

    def done(self, step: StepMasks) -> list[set[str]]:
        self.thread.wait(step)
        bits = np.unpackbits(step.target.view(np.uint8), axis=1, bitorder="little")
        return [
            {"EOS" if t == EOS else str(TOKENIZER.id_to_token(t)) for t in np.flatnonzero(row).tolist()} for row in bits
        ]


@pytest.fixture
def masks() -> Iterator[Masks]:
    made = Masks()
    yield made
    made.thread.close(DEADLINE_S)


def regex(slot: int, pattern: str, generated: str = "") -> JoiningRow:
    return JoiningRow(slot, StructuredOutputsParams(regex=pattern), ids(generated))


@pytest.mark.parametrize("rows", [1, 9])
def test_masks_follow_the_tokens_of_the_step_before(masks: Masks, rows: int) -> None:
    """Alone, and so many that they are filled by several threads."""
    slots = list(range(rows))
    first = masks.step(slots, [False] * rows, join=[regex(slot, "ab|ac|x") for slot in slots])
    assert masks.done(first) == [{"a", "x"}] * rows
    second = masks.step(slots, [True] * rows)  # before the tokens are there
    masks.thread.sampled(first, np.array(ids("a") * rows, np.int32))
    assert masks.done(second) == [{"b", "c"}] * rows
    third = masks.step(slots, [True] * rows)
    masks.thread.sampled(second, np.array(ids("b") * rows, np.int32))
    assert masks.done(third) == [{"EOS"}] * rows
    over = masks.step(slots, [True] * rows)
    masks.thread.sampled(third, np.array([EOS] * rows, np.int32))
    assert [len(allowed) >= VOCAB for allowed in masks.done(over)] == [True] * rows
    assert over.failed == []
    assert {row.lexer for row in masks.thread._rows.values()} == {None}  # others may have it


def test_rows_move_to_lexers_of_their_own_and_follow_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the text each of them stands; one that has come too far stays."""
    monkeypatch.setattr("tandem.worker.grammars.masks.MOST_REPLAYED", 7)
    monkeypatch.setattr("tandem.worker.grammars.masks.REPLAYED_AT_ONCE", 2)
    book, text, starts = GrammarBook(BYTES, VOCAB, (EOS,)), "abcdefghij" * 2, [0, 8, 1, 5, 9]
    grown, grow = threading.Event(), book.grow

    def tell(wanted: StructuredOutputsParams, stopped: Callable[[], bool]) -> None:
        grow(wanted, stopped)
        grown.set()

    monkeypatch.setattr(book, "grow", tell)
    masks, slots = Masks(book), list(range(len(starts)))
    try:
        step = masks.step(
            slots, [False] * 5, join=[regex(slot, text, text[:start]) for slot, start in enumerate(starts)]
        )
        for more in range(len(text) - max(starts)):
            now = [text[start + more] for start in starts]
            assert masks.done(step) == [{char} for char in now]
            assert grown.wait(DEADLINE_S)
            masks.thread.sampled(step, np.array(ids("".join(now)), np.int32))
            step = masks.step(slots, [True] * 5)
        masks.done(step)
        assert step.failed == []
        of_rows = [masks.thread._rows[slot].lexer for slot in slots]
        assert [of_rows.count(lexer) for lexer in of_rows] == [1, 2, 1, 1, 2]
        masks.done(masks.step([], [], leave=slots))
        assert book.lexer(StructuredOutputsParams(regex=text)).users == 1
        assert {lexer.users for lexer in of_rows if lexer is not None} <= {0, 1}
    finally:
        masks.thread.close(DEADLINE_S)


def grown(masks: Masks, book: GrammarBook, monkeypatch: pytest.MonkeyPatch, join: list[JoiningRow]) -> StepMasks:
    """A step with rows of one grammar that join, after which there is a lexer for each."""
    wanted: list[StructuredOutputsParams] = []
    monkeypatch.setattr(masks.thread._growth, "want", wanted.append)
    slots = [row.slot for row in join]
    step = masks.step(slots, [False] * len(slots), join=join)
    masks.done(step)
    for grammar in wanted:
        book.grow(grammar)
    assert lexers_of(book, join[0].wanted) == len(join)
    return step


def test_a_row_that_joins_far_in_its_text_stays_with_its_lexer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it has decoded."""
    monkeypatch.setattr("tandem.worker.grammars.masks.MOST_REPLAYED", 3)
    book = GrammarBook(BYTES, VOCAB, (EOS,))
    masks = Masks(book)
    try:
        grown(masks, book, monkeypatch, [regex(slot, "a*", text) for slot, text in enumerate(["aaaa", "aaaa", "aaa"])])
        masks.done(masks.step([], []))
        lexers = [masks.thread._rows[slot].lexer for slot in range(3)]
        assert lexers[0] is lexers[1]
        assert lexers[2] is not lexers[0]
    finally:
        masks.thread.close(DEADLINE_S)


def test_a_row_whose_tokens_take_long_stays_with_its_lexer(monkeypatch: pytest.MonkeyPatch) -> None:
    """These can be read in so many ways that they take a hundred times MOVING_S."""
    book, wanted = GrammarBook(BYTES, VOCAB, (EOS,)), StructuredOutputsParams(grammar='start: e\ne: e e | "a"')
    masks, text = Masks(book), ids("a" * 250)
    try:
        first = grown(masks, book, monkeypatch, [JoiningRow(slot, wanted, text) for slot in range(2)])
        second = masks.step([0, 1], [True, True])
        masks.thread.sampled(first, np.array(ids("aa"), np.int32))
        assert masks.done(second) == [{"a", "EOS"}] * 2
        third = masks.step([0, 1], [True, True])  # for the other row
        masks.thread.sampled(second, np.array(ids("aa"), np.int32))
        assert masks.done(third) == [{"a", "EOS"}] * 2
        lexers = [masks.thread._rows[slot].lexer for slot in range(2)]
        assert lexers[0] is lexers[1]
        assert book.lexer(wanted).users == 1  # the other one
        assert [masks.thread._rows[slot].taken for slot in range(2)] == [None, None]  # it is not tried again
    finally:
        masks.thread.close(DEADLINE_S)


def test_rows_that_a_step_has_no_time_to_move_are_moved_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    book, rows = GrammarBook(BYTES, VOCAB, (EOS,)), 8
    masks, now = Masks(book), 0.0

    def clock() -> float:
        nonlocal now
        now += MOVING_S / 4
        return now

    try:
        step = grown(masks, book, monkeypatch, [regex(slot, "(ab)*", "ab") for slot in range(rows)])
        monkeypatch.setattr(
            "tandem.worker.grammars.masks.time", SimpleNamespace(thread_time=clock, monotonic=time.monotonic)
        )
        lexers, text = [1], "ab"
        for char in text * rows:
            allowed = masks.done(step)
            assert all(char in found for found in allowed)
            masks.thread.sampled(step, np.array(ids(char) * rows, np.int32))
            step = masks.step(list(range(rows)), [True] * rows)
            masks.done(step)
            lexers.append(len({id(masks.thread._rows[slot].lexer) for slot in range(rows)}))
        assert 1 < lexers[1] < rows
        assert lexers[-1] == rows
    finally:
        masks.thread.close(DEADLINE_S)


def test_a_row_joins_where_its_tokens_have_led(masks: Masks) -> None:
    assert masks.done(masks.step([3], [False], join=[regex(3, "ab+c", "abb")])) == [{"b", "c"}]


def test_a_slot_that_is_given_away_follows_its_new_grammar(masks: Masks) -> None:
    first = masks.step([2], [False], join=[regex(2, "ab")])
    masks.thread.sampled(first, np.array(ids("a"), np.int32))
    assert masks.done(masks.step([2], [False], leave=[2], join=[regex(2, "xyz")])) == [{"x"}]


def test_a_grammar_that_cannot_be_followed_fails_its_own_row_once(masks: Masks) -> None:
    """Whatever comes of its tokens afterwards."""
    first = masks.step([1, 2], [False, False], join=[regex(1, "ab", "q"), regex(2, "cd")])
    allowed = masks.done(first)
    assert len(allowed[0]) >= VOCAB
    assert allowed[1] == {"c"}
    assert [position for position, _ in first.failed] == [0]
    masks.thread.sampled(first, np.array(ids("zc"), np.int32))
    second = masks.step([1, 2], [True, True])
    assert masks.done(second)[1] == {"d"}
    assert second.failed == []


def test_tokens_that_do_not_follow_a_grammar_cost_the_others_nothing(masks: Masks) -> None:
    """A forged resumption must not make everybody's grammar be compiled anew."""
    masks.done(masks.step([1], [False], join=[regex(1, "popular", "q")]))
    assert BOOK.holds(StructuredOutputsParams(regex="popular"))


def test_a_row_whose_masks_become_slow_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars are tried for some tokens only, before their requests are admitted."""
    masks = Masks(GrammarBook(BYTES, VOCAB, (EOS,)))
    slow = 2

    def dawdle() -> None:
        end = time.thread_time() + 2 * sandbox.TOKEN_CPU_S
        while time.thread_time() < end:
            pass

    def filled(matcher: Any, target: Any, index: int) -> None:
        if matcher is masks.thread._rows[slow].matcher:
            dawdle()
        fill_next_token_bitmask(matcher, target, index)

    def filled_side_by_side(_: Any, rows: list[tuple[Any, int]], target: Any) -> None:
        for matcher, index in rows:
            filled(matcher, target, index)

    monkeypatch.setattr(mask_module, "SLOW_S", sandbox.TOKEN_CPU_S)
    monkeypatch.setattr(mask_module, "fill_next_token_bitmask", filled)
    monkeypatch.setattr(mask_module, "fill_next_token_bitmask_par", filled_side_by_side)
    try:
        slots = [1, slow, 3]
        step = masks.step(slots, [False] * 3, join=[regex(slot, "abcd" + "e" * slot) for slot in slots])
        assert masks.done(step) == [{"a"}] * 3  # slow once may be anything
        assert step.failed == []
        for number, char in enumerate("abc"):
            masks.thread.sampled(step, np.array(ids(char * 3), np.int32))
            step = masks.step(slots, [True] * 3)
            allowed = masks.done(step)
            assert (allowed[0], allowed[2]) == ({"bcd"[number]}, {"bcd"[number]})
            assert [at for at, _ in step.failed] == ([1] if not number else [])
            if step.failed:
                assert "choosing a token takes 0.2" in step.failed[0][1]
    finally:
        masks.thread.close(DEADLINE_S)


def test_a_row_that_takes_too_long_to_join_fails_and_the_others_go_on(masks: Masks) -> None:
    """Each of its tokens can be read in more ways than the one before: a few hundred take seconds, thousands hours."""
    wanted = StructuredOutputsParams(grammar='start: e\ne: e e | "a"')
    rows = [JoiningRow(1, wanted, ids("a") * 5_000), regex(2, "[ab]+c", "ab" * 2_000)]
    step = masks.step([1, 2], [False] * 2, join=rows)
    assert masks.done(step)[1] == {"a", "b", "c"}
    (failed,) = step.failed
    assert failed[0] == 0
    assert "taking in its 5,000 tokens takes over 1 s" in failed[1]


def test_many_that_take_long_to_join_have_little_time_each(masks: Masks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_module, "ALL_JOINING_S", 0.1)
    wanted, slots = StructuredOutputsParams(grammar='start: e\ne: e e | "a"'), list(range(12))
    rows = [JoiningRow(slot, wanted, ids("a") * 5_000) for slot in slots[:-1]]
    step = masks.step(slots, [False] * 12, join=[*rows, regex(11, "[ab]+c", "ab" * 400)])
    assert masks.done(step)[-1] == {"a", "b", "c"}
    assert [position for position, _ in step.failed] == slots[:-1]
    assert "takes over 0.02 s" in step.failed[-1][1]


def test_a_failure_is_told_with_the_rows_first_token(masks: Masks) -> None:
    """A long prompt's row joins steps before it samples."""
    masks.step([], [], join=[regex(1, "ab", "q")])
    step = masks.step([1], [False])
    masks.done(step)
    assert [position for position, _ in step.failed] == [0]


def test_who_waits_for_masks_is_woken_when_no_tokens_will_come(masks: Masks) -> None:
    first = masks.step([1], [False], join=[regex(1, "ab")])
    masks.done(first)
    second = masks.step([1], [True])
    threading.Timer(0.05, masks.thread.fail, [OSError("the device is on fire")]).start()
    with pytest.raises(OSError, match="on fire"):
        masks.thread.wait(second)


# --- on the device ---------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.data())
def test_allowed_tokens_keep_their_logits_and_no_others(data: st.DataObject) -> None:
    rows, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 100))
    chosen = data.draw(st.lists(st.integers(0, rows - 1), unique=True, min_size=1, max_size=rows))
    bits = np.array(
        [[data.draw(st.booleans()) for _ in range(-(-vocab // 32) * 32)] for _ in chosen], np.bool_
    ).reshape(len(chosen), -(-vocab // 32) * 32)
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    logits = torch.randn(rows, vocab)
    got = allow(logits, AllowedTokens(torch.tensor(chosen, dtype=torch.int64), torch.from_numpy(packed.copy())))
    expected = logits.clone()
    for row, allowed in zip(chosen, bits, strict=True):
        expected[row, torch.from_numpy(~allowed[:vocab])] = float("-inf")
    assert torch.equal(got, expected)


def test_nothing_is_left_of_a_trial(checker: GrammarChecker) -> None:
    """The processes in which grammars were tried are gone."""
    process = checker._sandbox.start()
    assert verdict(checker, StructuredOutputsParams(regex="one last")) == ""
    end = time.monotonic() + DEADLINE_S
    while psutil.Process(process.pid).children():
        assert time.monotonic() < end
