"""Strict tools that the model may call: whatever it writes is text, or calls that follow their schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tandem.client.tokenizer import TOKENIZER_FILE, Tokenizer
from tandem.gateway.strict_tools import strict_grammar
from tandem.launch.builtin import MODEL_DIR
from tandem.protocol.structured import StructuredOutputsParams
from tandem.worker.grammars.compiler import compile_grammar, open_tokenizer

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/Place"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"Place": {"type": "string", "enum": ["Paris", "Rome"]}},
        },
    },
}
TREE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "plant",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"Place": {"type": "integer"}, "child": {"$ref": "#"}},
            "additionalProperties": False,
            "$defs": {"Place": {"type": "integer"}},
        },
    },
}
LOOSE: dict[str, Any] = {"type": "function", "function": {"name": "log", "parameters": {"required": ["x"]}}}
TOOLS = [WEATHER, TREE, LOOSE]


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def llama(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "parameters": arguments})


PARIS, BAD = call("get_weather", city="Paris"), call("get_weather", city="Oslo")
GOOD_HERMES = [
    "",
    "Hello!\n\nNo <tool, a < b, {1} and </tool_call>.",
    PARIS,
    f"I see.\n{PARIS}\n{call('plant', Place=3, child={'child': {'Place': 4}})} Done.",
    call("log", anything=[1, "</tool>"]),
    "<think>\nFirst…\n</think>\n" + PARIS,
    "<tools>some</tools>",
]
BAD_HERMES = [
    BAD,
    f"I see. {BAD}",
    f"{PARIS}{BAD}",
    call("get_weather"),
    call("other", city="Paris"),
    call("plant", child={"child": {"Place": "here"}}),
    "<think>no</think><tool_call>no</tool_call>",
    "<tool_call>",
]
GOOD_LLAMA = [
    "",
    " \n",
    "Hello! {}",
    llama("get_weather", city="Rome"),
    f" {llama('get_weather', city='Rome')}; {llama('log', x=1)}",
    "<|python_tag|>" + llama("get_weather", city="Rome"),
    "<think>x</think> no",
]
BAD_LLAMA = [
    llama("get_weather", city="Oslo"),
    '\n{"answer": 1}',
    "<|python_tag|>print(1)",
    "<|im_start|>" + llama("get_weather", city="Oslo"),
]


class Model:
    """The built-in model's tokenizer with other added tokens."""

    def __init__(self, tags: str) -> None:
        backend = json.loads((MODEL_DIR / TOKENIZER_FILE).read_bytes())
        if tags == "spelled":
            for token in backend["added_tokens"]:
                token["content"] = token["content"].replace("tool_call>", "unused>")
            vocabulary = backend["model"]["vocab"]
            backend["model"]["vocab"] = {key.replace("tool_call>", "unused>"): id_ for key, id_ in vocabulary.items()}
        for token in backend["added_tokens"]:
            if token["content"].endswith("tool_call>"):
                token["special"] = tags == "special"
        made = Backend.from_str(json.dumps(backend))
        if tags != "spelled":
            made.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
            made.add_special_tokens([AddedToken("<|python_tag|>", special=True)])
        files = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir() if path.suffix in (".json", ".jinja")}
        files[TOKENIZER_FILE] = made.to_str().encode()
        self.tokenizer = Tokenizer.from_files(files)
        self._size = self.tokenizer.vocab_size
        self._for_grammars = open_tokenizer(files[TOKENIZER_FILE], self._size, self.tokenizer.eos_token_ids)

    def can_write(self, grammar: str, text: str) -> bool:
        matcher = compile_grammar(StructuredOutputsParams(grammar=grammar), self._for_grammars)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), *self.tokenizer.eos_token_ids]
        return all(matcher.consume_token(id_) for id_ in ids)


@pytest.fixture(scope="module", params=["added", "special", "spelled"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


def test_text_is_free_and_calls_are_not(model: Model) -> None:
    grammar = strict_grammar(TOOLS, "hermes", model.tokenizer)
    assert [text for text in GOOD_HERMES if not model.can_write(grammar, text)] == []
    assert [text for text in BAD_HERMES if model.can_write(grammar, text)] == []


def test_one_call_at_most(model: Model) -> None:
    grammar = strict_grammar(TOOLS, "hermes", model.tokenizer, several=False)
    assert model.can_write(grammar, f"I see <tools> there {PARIS}\n")
    assert model.can_write(grammar, "I see <tools> there.")
    assert not model.can_write(grammar, PARIS + PARIS)
    assert not model.can_write(grammar, BAD)
    grammar = strict_grammar([WEATHER], "llama3_json", model.tokenizer, several=False)
    paris = llama("get_weather", city="Paris")
    assert model.can_write(grammar, paris)
    assert not model.can_write(grammar, f"{paris}; {paris}")


def test_beside_calls_an_answer_can_be_json(model: Model) -> None:
    answer = {"type": "object", "properties": {"age": {"type": "integer"}}, "additionalProperties": False}
    grammar = strict_grammar(TOOLS, "hermes", model.tokenizer, answer=answer)
    for text in (PARIS, f"{PARIS}\n{PARIS}", '{"age": 3}'):
        assert model.can_write(grammar, text)
    for text in ("Hello", BAD, '{"age": "x"}', f'{{"age": 3}}{PARIS}'):
        assert not model.can_write(grammar, text)
    grammar = strict_grammar(TOOLS, "llama3_json", model.tokenizer, answer=answer)
    for text in (llama("get_weather", city="Paris"), '{"age": 3}'):
        assert model.can_write(grammar, text)
    for text in ("Hello", llama("get_weather", city="Oslo"), '{"age": "x"}'):
        assert not model.can_write(grammar, text)


def test_llamas_format(model: Model) -> None:
    grammar = strict_grammar(TOOLS, "llama3_json", model.tokenizer)
    assert [text for text in GOOD_LLAMA if not model.can_write(grammar, text)] == []
    assert [text for text in BAD_LLAMA if model.can_write(grammar, text)] == []
