"""Tool calls in what models write: found however the text is cut, and no text lost that is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.client.tokenizer import TOKENIZER_FILE, Tokenizer
from tandem.gateway import tool_use
from tandem.gateway.config import GatewayConfig
from tandem.gateway.errors import ApiError
from tandem.gateway.tools import (
    CLOSE,
    OPEN,
    PYTHON_TAG,
    Call,
    ForcedCallParser,
    Found,
    HermesParser,
    LlamaJsonParser,
    Parser,
    as_call,
    longer_than,
)
from tandem.launch.builtin import MODEL_DIR
from tandem.protocol.structured import MAX_GRAMMAR_BYTES

ADD = '{"name": "add", "arguments": {"a": 1, "b": 22}}'
ADDED = Call("add", '{"a": 1, "b": 22}')


def read(parser: Parser, pieces: list[str]) -> list[Found]:
    """What is found, with texts that follow one another joined."""

    def steps() -> Iterator[Found]:
        for piece in pieces:
            yield from parser.push(piece)
        yield from parser.finish()

    found: list[Found] = []
    for one in steps():
        assert one != ""
        if isinstance(one, str) and found and isinstance(found[-1], str):
            found[-1] += one
        else:
            found.append(one)
    return found


def by_character(parser: Parser, text: str) -> list[Found]:
    return read(parser, list(text))


def call(name: str, **arguments: Any) -> Call:
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def tagged(text: str) -> str:
    return OPEN + text + CLOSE


HERMES = {
    "one": (tagged(ADD), [ADDED]),
    "on lines of its own": (f"{OPEN}\n{ADD}\n{CLOSE}\n", [ADDED]),
    "several": (f"{tagged(ADD)}\n{tagged(ADD)}{tagged(ADD)}", [ADDED, ADDED, ADDED]),
    "text around": (f"Let me see.\n\n{tagged(ADD)}\n\nDone. \n", ["Let me see.", ADDED, "Done. \n"]),
    "nothing": ("", []),
    "white space alone": (" \n ", [" \n "]),
    "text alone": ("  a < b <tool> </tool_call> \n", ["  a < b <tool> </tool_call> \n"]),
    "braces in strings": (tagged('{"name": "f", "arguments": {"s": "}{ \\" }} {"}}'), [call("f", s='}{ " }} {')]),
    "tags in strings": (
        tagged('{"name": "f", "arguments": {"s": "\\\\\\"</tool_call><tool_call>", "t": "</tool_call>"}}') + " end",
        [call("f", s='\\"</tool_call><tool_call>', t="</tool_call>"), "end"],
    ),
    "an odd quote does not take the next call along": (
        f"a {tagged('{bad: ' + chr(34))} b {tagged(ADD)} c",
        [f'a {OPEN}{{bad: "{CLOSE} b', ADDED, "c"],
    ),
    "an odd quote, and an answer that ends": (f'{OPEN}"{CLOSE} b <tool', [f'{OPEN}"{CLOSE} b <tool']),
    "not JSON": (f"x  {tagged('{name: add}')}  y", [f"x  {tagged('{name: add}')}  y"]),
    "not a call": (tagged('["name"]') + tagged("{}"), [tagged('["name"]') + tagged("{}")]),
    "a bad one before a good one": (f"{tagged('{')} {tagged(ADD)}", [tagged("{"), ADDED]),
    "unicode": (tagged('{"name": "天气", "arguments": {"Ort": "Zürich 😀\\u00e9"}}'), [call("天气", Ort="Zürich 😀é")]),
    "cut short": (OPEN + ADD[:-1], [OPEN + ADD[:-1]]),
    "cut short after the JSON": (f"{OPEN}{ADD}\n</tool_", [ADDED]),
    "arguments as text": (tagged('{"name": "f", "arguments": "{\\"a\\": 1}"}'), [call("f", a=1)]),
    "no arguments": (tagged('{"name": "now"}'), [call("now")]),
    "arguments that are no object": (
        tagged('{"name": "f", "arguments": [1]}'),
        [tagged('{"name": "f", "arguments": [1]}')],
    ),
}

LLAMA_ADD = '{"name": "add", "parameters": {"a": 1, "b": 22}}'
LLAMA = {
    "one": (LLAMA_ADD, [ADDED]),
    "with a type": ('{"type": "function", "name": "add", "parameters": {"a": 1, "b": 22}}', [ADDED]),
    "python tag": (f"\n{PYTHON_TAG} {LLAMA_ADD}\n", [ADDED]),
    "several": (f"{LLAMA_ADD}; {LLAMA_ADD};\n{LLAMA_ADD}", [ADDED, ADDED, ADDED]),
    "called arguments": (ADD, [ADDED]),
    "text before": (f"Sure: {LLAMA_ADD}", [f"Sure: {LLAMA_ADD}"]),
    "text after": (f"{LLAMA_ADD} is it", [f"{LLAMA_ADD} is it"]),
    "another object": ('{"name": "Ada", "born": 1815}\n', ['{"name": "Ada", "born": 1815}\n']),
    "cut short": (LLAMA_ADD[:-1], [LLAMA_ADD[:-1]]),
    "a tag alone": (PYTHON_TAG + "print(1)", [PYTHON_TAG + "print(1)"]),
    "half a tag": (" <|py", [" <|py"]),
    "a tag that is none": ("<|pythonic", ["<|pythonic"]),
    "braces in strings": ('{"name": "f", "parameters": {"s": "}; {\\""}}', [call("f", s='}; {"')]),
    "white space alone": (" \n", [" \n"]),
    "nothing": ("", []),
}


@pytest.mark.parametrize("case", HERMES)
def test_hermes(case: str) -> None:
    text, expected = HERMES[case]
    assert read(HermesParser(), [text]) == expected
    assert by_character(HermesParser(), text) == expected


@pytest.mark.parametrize("case", LLAMA)
def test_llama(case: str) -> None:
    text, expected = LLAMA[case]
    assert read(LlamaJsonParser(), [text]) == expected
    assert by_character(LlamaJsonParser(), text) == expected


def test_a_forced_call_and_what_was_cut_short() -> None:
    assert by_character(ForcedCallParser(), ADD) == [ADDED]
    assert by_character(ForcedCallParser(), ADD[:-1]) == [ADD[:-1]]
    assert by_character(ForcedCallParser(), "") == []


@pytest.mark.parametrize(
    "arguments",
    ['{"x": NaN}', '{"x": -Infinity}', '{"x": 1e999}', '"{\\"x\\": NaN}"', '{"x": ' + "[" * 100_000, "null", '"x"'],
    ids=lambda text: text[:20],
)
def test_arguments_that_are_not_json_make_no_call(arguments: str) -> None:
    text = tagged(f'{{"name": "f", "arguments": {arguments}}}')
    assert read(HermesParser(), [text]) == [text]


@pytest.mark.parametrize("depth", [10, 500, 990, 2_000, 100_000])
def test_depth_harms_nothing(depth: int) -> None:
    text = f'{{"name": "f", "arguments": {{"x": {"[" * depth}{"]" * depth}}}}}'
    found = as_call(text, "arguments")
    assert found is None or json.loads(found.arguments)["x"] is not None
    assert found is not None or depth > 100


def test_lone_surrogates_can_be_sent() -> None:
    found = as_call('{"name": "f", "arguments": {"s": "\\ud83d é"}}', "arguments")
    assert found is not None
    assert json.loads(found.arguments.encode()) == {"s": "\ud83d é"}
    assert as_call('{"name": "\\ud83d", "arguments": {}}', "arguments") is None


FRAGMENTS = st.sampled_from(
    [
        OPEN,
        CLOSE,
        PYTHON_TAG,
        ADD,
        LLAMA_ADD,
        tagged(ADD),
        '{"name": "f", "arguments": {"s": "',
        '"}}',
        '"',
        "\\",
        "{",
        "}",
    ]
    + [" ", "\n", "<", "<tool", "</tool_", "a", "é😀", ";", "tool_call>", '{"name": "f"}']
)
TEXTS = st.lists(FRAGMENTS, max_size=14).map("".join)


@st.composite
def cut(draw: st.DrawFn) -> list[str]:
    text = draw(TEXTS)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("make", [HermesParser, LlamaJsonParser, ForcedCallParser])
def test_cuts_make_no_difference_and_no_text_is_lost(make: type[Parser]) -> None:
    @given(cut())
    def check(pieces: list[str]) -> None:
        text = "".join(pieces)
        found = read(make(), pieces)
        assert found == read(make(), [text])
        assert found == by_character(make(), text)
        for one in found:
            assert isinstance(one, str) or isinstance(json.loads(one.arguments.encode()), dict)
        texts = [one for one in found if isinstance(one, str)]
        if texts == found:
            assert "".join(texts) == text
        place = 0
        for one in texts:  # in its order, as it was
            place = text.index(one, place) + len(one)

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text() | st.sampled_from([OPEN, CLOSE, f'"{CLOSE}']), JSON, max_size=3)


@given(st.lists(st.tuples(st.text(min_size=1), ARGUMENTS), min_size=1, max_size=3), st.booleans(), st.integers(1, 9))
def test_what_was_written_is_what_is_called(calls: list[tuple[str, dict[str, Any]]], ascii: bool, step: int) -> None:
    def check(parser: Parser, text: str) -> None:
        found = read(parser, [text[i : i + step] for i in range(0, len(text), step)])
        assert [(one.name, json.loads(one.arguments)) for one in found if isinstance(one, Call)] == calls
        assert len(found) == len(calls)

    def written(key: str) -> list[str]:
        return [json.dumps({"name": name, key: arguments}, ensure_ascii=ascii) for name, arguments in calls]

    check(HermesParser(), "\n".join(tagged(f"\n{one}\n") for one in written("arguments")))
    check(LlamaJsonParser(), "; ".join(written("parameters")))


@given(JSON)
def test_a_length_is_never_taken_for_more_than_it_is(value: object) -> None:
    length = len(json.dumps(value))
    assert not longer_than(value, length)
    texts = {"a": [["xyz" * length], {"key" * length: None}]}
    assert longer_than(texts, len(json.dumps(texts, separators=(",", ":"))) - 9)


@pytest.mark.parametrize("strict", [False, True])
def test_schemas_that_are_refused_in_the_end_are_so_at_once(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made of them."""

    def made(*_: Any, **__: Any) -> Any:
        raise AssertionError("too late")

    monkeypatch.setattr(tool_use, "forced_schema", made)
    monkeypatch.setattr(tool_use, "strict_grammar", made)
    function = {"name": "f", "strict": strict, "parameters": {"enum": ["x" * 99] * 700}}
    wanted = tool_use.Wanted(
        [{"type": "function", "function": function}],
        choice="auto" if strict else "required",
        function=None,
        several=True,
        structure={},
        structure_field="response_format",
        function_field="tool_choice.function.name",
    )
    config, tokenizer = (
        GatewayConfig(scheduler="ipc:///nowhere"),
        Tokenizer.from_files({TOKENIZER_FILE: (MODEL_DIR / TOKENIZER_FILE).read_bytes()}),
    )
    with pytest.raises(ApiError, match=f"^tools: .* over the limit of {MAX_GRAMMAR_BYTES} bytes"):
        tool_use.tool_use(wanted, OPEN, tokenizer, config)


@pytest.mark.parametrize("make", [HermesParser, LlamaJsonParser, ForcedCallParser])
def test_text_is_shown_as_soon_as_it_cannot_be_a_call(make: type[Parser]) -> None:
    parser = make()
    shown = [list(parser.push(piece)) for piece in ("So ", "a", " <", "b")]
    if make is not ForcedCallParser:
        assert "".join(one for found in shown for one in found if isinstance(one, str)).rstrip() == "So a <b"
