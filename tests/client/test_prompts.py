"""What may be passed as prompt and as sampling parameters."""

from typing import Any

import numpy as np
import pytest

from tandem import ChatOptions, ConfigurationError, InvalidRequest, SamplingParams
from tandem.client.prompts import (
    is_batch,
    is_chat,
    require_chat_options,
    require_length,
    resolve_sampling,
    to_token_ids,
)

from support.scripted_scheduler import MODEL, TOKENIZER

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("text", "one"),
        ([1, 2], "one"),
        ([np.int64(1)], "one"),
        (np.array([1, 2]), "one"),
        ((1, 2), "one"),
        (CHAT, "chat"),
        ({"prompt_token_ids": [1]}, "one"),
        (["text"], "batch"),
        ([[1], [2]], "batch"),
        ([CHAT, CHAT], "batch"),
        ([{"prompt_token_ids": [1]}], "batch"),
        (["text", [1], CHAT], "batch"),
        ([np.array([1])], "batch"),
        ([[]], "batch"),
        ([], "one"),
    ],
)
def test_one_or_many(prompt: Any, kind: str) -> None:
    assert (is_chat(prompt), is_batch(prompt)) == (kind == "chat", kind == "batch")


def test_every_form_of_one_prompt() -> None:
    ids = TOKENIZER.encode("Hello")
    for prompt in ("Hello", ids, tuple(ids), np.array(ids), np.array(ids, np.uint16), {"prompt_token_ids": ids}):
        column = to_token_ids(prompt, TOKENIZER)  # type: ignore[arg-type]
        assert column.dtype == np.int32
        assert column.tolist() == ids


def test_a_chat_is_rendered_with_a_generation_prompt() -> None:
    rendered = "<|im_start|>user\nHi<|im_end|>\n"
    asked = to_token_ids(CHAT, TOKENIZER).tolist()
    assert TOKENIZER.decode(asked, skip_special_tokens=False) == rendered + "<|im_start|>assistant\n"
    plain = to_token_ids(CHAT, TOKENIZER, ChatOptions(add_generation_prompt=False)).tolist()
    assert TOKENIZER.decode(plain, skip_special_tokens=False) == rendered
    continued = to_token_ids(CHAT, TOKENIZER, ChatOptions(continue_final_message=True)).tolist()
    assert TOKENIZER.decode(continued, skip_special_tokens=False) == "<|im_start|>user\nHi"
    own = ChatOptions(chat_template="{{ tools[0].x }}{{ mood }}", tools=[{"x": 1}], template_variables={"mood": "good"})
    assert TOKENIZER.decode(to_token_ids(CHAT, TOKENIZER, own).tolist()) == "1good"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ("", "empty"),
        (np.array([], np.int32), "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt": "x"}, "prompt_token_ids"),
        ({"prompt_token_ids": [1], "more": 1}, "nothing else"),
        ([-1], "-1 is no token id"),
        ([1, 2**31], "2147483648 is no token id"),
        ([2**70], "prompt"),
        ([[1, 2]], "2 dimensions"),
        (np.array([1.0]), "float64"),
        ({"prompt_token_ids": "text"}, "expected text, token ids or chat"),
        (None, "NoneType"),
        (7, "int"),
        (b"bytes", "bytes"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as info:
        to_token_ids(prompt, TOKENIZER)
    assert info.value.field == "prompt"


def test_text_needs_a_tokenizer() -> None:
    for prompt in ("text", CHAT):
        with pytest.raises(ConfigurationError, match="token ids"):
            to_token_ids(prompt, None)
    assert to_token_ids([1], None).tolist() == [1]


# --- sampling parameters ---------------------------------------------------------------------------------------------


def test_defaults_are_the_models_unless_params_are_given() -> None:
    default = resolve_sampling(MODEL, None, {})
    assert (default.temperature, default.top_k, default.top_p) == (0.5, 7, 1.0)
    changed = resolve_sampling(MODEL, None, {"temperature": 0.0, "max_tokens": 3})
    assert (changed.temperature, changed.top_k, changed.max_tokens) == (0.0, 7, 3)
    given = resolve_sampling(MODEL, SamplingParams(top_p=0.9, seed=4), {"max_tokens": 3})
    assert (given.temperature, given.top_k, given.top_p, given.seed, given.max_tokens) == (1.0, 0, 0.9, 4, 3)


def test_a_missing_seed_is_drawn_and_a_given_one_kept() -> None:
    drawn = {resolve_sampling(MODEL, None, {}).seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(seed is not None and 0 <= seed < 2**63 for seed in drawn)
    assert resolve_sampling(MODEL, None, {"seed": 0}).seed == 0


@pytest.mark.parametrize(
    ("overrides", "field", "limit"),
    [
        ({"temperature": -0.1}, "temperature", 0.0),
        ({"temperature": float("nan")}, "temperature", None),
        ({"top_p": 0.0}, "top_p", 0.0),
        ({"top_p": 1.01}, "top_p", 1.0),
        ({"top_k": -2}, "top_k", -1),
        ({"top_k": 1.5}, "top_k", None),
        ({"max_tokens": 0}, "max_tokens", 1),
        ({"max_tokens": "7"}, "max_tokens", None),
        ({"seed": -1}, "seed", 0),
        ({"ignore_eos": 1}, "ignore_eos", None),
        ({"stop_token_ids": [0] * 129}, "stop_token_ids", None),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", 0),
        ({"stop_token_ids": 7}, "stop_token_ids", None),
        ({"beam_width": 4}, "beam_width", None),
    ],
)
def test_bad_parameters_are_named(overrides: dict[str, Any], field: str, limit: object) -> None:
    with pytest.raises(InvalidRequest, match=field.split(".")[0]) as info:
        resolve_sampling(MODEL, None, overrides)
    assert info.value.field == field
    if limit is not None:
        assert info.value.limit == limit


def test_lists_are_taken_for_tuples() -> None:
    assert resolve_sampling(MODEL, None, {"stop_token_ids": [1, 2]}).stop_token_ids == (1, 2)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", ["0.5", True])
def test_text_and_booleans_are_no_numbers(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: expected a number, got {value!r}") as refused:
        resolve_sampling(MODEL, None, {name: value})
    assert (refused.value.field, refused.value.value) == (name, value)


def test_numpy_numbers_are_numbers() -> None:
    given = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(5),
        "seed": np.uint8(7),
        "stop_token_ids": np.array([3, 4]),
        "ignore_eos": np.bool_(True),
    }
    assert resolve_sampling(MODEL, None, given) == SamplingParams(
        temperature=0.5, top_k=5, seed=7, stop_token_ids=(3, 4), ignore_eos=True
    )
    assert resolve_sampling(MODEL, SamplingParams(stop_token_ids=(np.int32(3),), seed=1), {}).stop_token_ids == (3,)  # type: ignore[arg-type]


def test_options_of_a_chat_need_a_chat() -> None:
    require_chat_options("text", None)
    require_chat_options([{"role": "user", "content": "x"}], ChatOptions(tools=[]))
    for prompt in ("text", [1, 2], {"prompt_token_ids": [1]}):
        with pytest.raises(InvalidRequest, match="chat: these options are for a list of messages"):
            require_chat_options(prompt, ChatOptions(tools=[]))
    with pytest.raises(InvalidRequest, match="chat: expected a ChatOptions, got dict"):
        require_chat_options([{"role": "user", "content": "x"}], {"tools": []})


def test_token_ids_over_the_context_are_refused_before_they_are_converted() -> None:
    longest = MODEL.max_model_len - 1
    for prompt in ([1] * longest, np.ones(longest, np.int64), "x" * 10_000_000, [{"role": "user"}] * (longest + 1)):
        require_length(prompt, MODEL.max_model_len)
    for over in ([None] * (longest + 1), np.ones(longest + 1, np.int64)):
        with pytest.raises(InvalidRequest, match=f"leaves room for {longest}") as refused:
            require_length(over, MODEL.max_model_len)
        assert (refused.value.field, refused.value.limit, refused.value.value) == ("prompt", longest, longest + 1)
