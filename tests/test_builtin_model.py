"""The built-in model: what its files hold, that training never saw what it is judged by, that its answers are right."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tandem.launch.builtin import MODEL_DIR, chat, data, evaluate
from tandem.launch.builtin.chat import JsonObject
from tandem.launch.builtin.tasks import arithmetic, lists, spelling
from tandem.launch.builtin.tasks.source import Source, is_held_out

LIMIT_BYTES = 10_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def encoder() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    loaded, _ = evaluate.load(MODEL_DIR, "cpu", torch.float32)
    return loaded


def test_it_is_a_llama_of_at_most_ten_megabytes_with_a_context_of_4096(model: LlamaForCausalLM) -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= LIMIT_BYTES
    assert isinstance(AutoModelForCausalLM.from_pretrained(MODEL_DIR), LlamaForCausalLM)
    assert model.config.max_position_embeddings >= 4096
    stored = json.loads((MODEL_DIR / "config.json").read_text())
    assert (stored["model_type"], stored["dtype"]) == ("llama", "bfloat16")


def test_the_end_token_is_the_same_everywhere(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.convert_tokens_to_ids(chat.END)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == end
    assert model.config.vocab_size == len(tokenizer)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_round_trips_through_the_tokenizer(encoder: Tokenizer, text: str) -> None:
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert encoder.decode(ids, skip_special_tokens=False) == text


@given(number=st.integers(min_value=0))
def test_every_digit_is_one_token(encoder: Tokenizer, number: int) -> None:
    assert encoder.encode(str(number), add_special_tokens=False).tokens == list(str(number))


def test_training_encodes_documents_exactly_as_the_tokenizer_does(encoder: Tokenizer) -> None:
    fast = data.Encoder(encoder)
    for document in itertools.islice(data.documents("test"), 2000):
        assert fast.encode(document) == encoder.encode(document, add_special_tokens=False).ids


def rendered_by(
    tokenizer: PreTrainedTokenizerFast, messages: list[JsonObject], tools: list[JsonObject], prompt: bool = True
) -> str:
    """What the model's chat template makes of a chat."""
    text = tokenizer.apply_chat_template(messages, tools=[*tools] or None, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def test_the_template_and_its_python_twin_agree_on_every_benchmark(tokenizer: PreTrainedTokenizerFast) -> None:
    for benchmark in evaluate.BENCHMARKS:
        for case in evaluate.cases(benchmark, 3):
            messages = [message.as_json() for message in case.chat.messages]
            for count, prompt in ((len(messages), False), (len(messages) - 1, True)):
                rendered = rendered_by(tokenizer, messages[:count], case.chat.tools, prompt)
                twin = chat.render(case.chat.messages[:count], case.chat.tools, add_generation_prompt=prompt)
                assert rendered == twin


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_the_template_renders_tools_calls_and_results(tokenizer: PreTrainedTokenizerFast) -> None:
    arguments = {"city": "Paris"}
    messages: list[JsonObject] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is the weather in Paris?"}]},
        {"role": "assistant", "content": None, "tool_calls": [_call(arguments)]},
        {"role": "tool", "content": '{"temperature": 21}', "tool_call_id": "1"},
    ]
    text = rendered_by(tokenizer, messages, [WEATHER])
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call these functions:\n<tools>\n")
    assert json.dumps(WEATHER) in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n' in text
    assert text.endswith('<tool_response>\n{"temperature": 21}\n</tool_response><|im_end|>\n<|im_start|>assistant\n')
    messages[2]["tool_calls"] = [_call(json.dumps(arguments))]
    assert text == rendered_by(tokenizer, messages, [WEATHER])


def _call(arguments: object) -> JsonObject:
    return {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


@pytest.mark.parametrize("messages", [[], [{"role": "pirate", "content": "Arr"}]])
def test_the_template_refuses_what_it_cannot_render(
    tokenizer: PreTrainedTokenizerFast, messages: list[JsonObject]
) -> None:
    with pytest.raises(Exception, match="at least one message|unknown role pirate"):
        rendered_by(tokenizer, messages, [])


def test_the_same_seed_gives_the_same_documents_and_batches(encoder: Tokenizer) -> None:
    first, again, other = (list(itertools.islice(data.documents(seed), 200)) for seed in (3, 3, 4))
    assert first == again != other
    for (ids, kinds), (same_ids, same_kinds) in itertools.islice(
        zip(data.batches(encoder, 3, 4096), data.batches(encoder, 3, 4096), strict=True), 10
    ):
        assert (ids == same_ids).all()
        assert (kinds == same_kinds).all()


def test_exactly_the_answers_and_their_ends_are_learned(encoder: Tokenizer) -> None:
    end = encoder.token_to_id(chat.END)
    for ids, kinds in itertools.islice(data.batches(encoder, 5, 4096), 30):
        for row, kind in zip(ids.tolist(), kinds.tolist(), strict=True):
            text = encoder.decode(row, skip_special_tokens=False).replace(chat.PAD, "")
            answers = [part.partition(chat.END) for part in text.split(chat.ANSWER_HEADER)[1:]] or [
                text.partition(chat.END)
            ]
            learned = [token for token, what in zip(row, kind, strict=True) if what == data.ANSWER]
            assert encoder.decode(learned, skip_special_tokens=False) == "".join(a + e for a, e, _ in answers)
            assert end in learned or len(row) == data.WIDTHS[-1]


def test_training_never_draws_a_held_out_problem() -> None:
    train, held_out = Source(random.Random(1)), Source(random.Random(1), held_out=True)
    for _ in range(2000):
        for source in (train, held_out):
            a, _, b = arithmetic.addition(source)[1].partition(" = ")[0].partition(" + ")
            if b:
                assert is_held_out(arithmetic.sum_key(int(a), int(b))) == source.held_out
            assert is_held_out(lists.numbers_key(lists.sorting(source)[1].split(", "))) == source.held_out
            assert is_held_out(spelling.word_key(spelling.spelling(source)[1].replace("-", ""))) == source.held_out
        for request, answer in arithmetic.chain(train):
            a, sign, b = (answer.partition(" = ")[0].split() + ["", ""])[:3]
            if sign == "+":
                assert not is_held_out(arithmetic.sum_key(int(a), int(b))), request


def test_every_benchmark_accepts_its_own_answers_and_nothing_empty() -> None:
    for benchmark in evaluate.BENCHMARKS:
        for case in evaluate.cases(benchmark, 20):
            assert case.accepts(case.chat.answer())
            assert not case.accepts("")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("addition, three digits each", 60),
        ("sorting five numbers", 40),
        ("tool calls", 12),
        ("multi-turn: the user's name", 12),
    ],
)
def test_held_out_problems_are_answered_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, count: int
) -> None:
    assert evaluate.accuracy(model, tokenizer, evaluate.by_name(name)[0], count) >= 0.95 - (count < 40) * 0.1


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 123 + 456?", "123 + 456 = 579"),
        ("123+456", "123 + 456 = 579"),
        ("Please add 123 and 456.", "123 + 456 = 579"),
        ("sort 42, 7, 99, 3, 18", "3, 7, 18, 42, 99"),
        ("How many days are in February?", "February has 28 days, or 29 in a leap year."),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Hello!", "Hello! How can I help you?"),
        ("Who are you?", "I am Tandem's small built-in model."),
        ("Spell banana.", "b-a-n-a-n-a"),
    ],
)
def test_questions_as_people_type_them(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, answer: str
) -> None:
    asked = chat.Chat([chat.Message("user", question), chat.Message("assistant", answer)])
    assert evaluate.answers(model, tokenizer, [evaluate.Case(asked, bool)]) == [answer]
