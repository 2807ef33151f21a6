"""Sampling parameters at the door: what is just possible is taken, what is just beyond is refused naming field, limit
and value, and the SDK refuses the same before it is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tandem.client.prompts import resolve_sampling
from tandem.protocol.codec import decode, encode
from tandem.protocol.errors import InvalidRequest, ProtocolError
from tandem.protocol.messages import ModelDescription, Submit
from tandem.protocol.sampling import SAMPLING_FIELDS, SamplingParams
from tandem.protocol.structured import StructuredOutputsParams
from tandem.scheduler.door import find_fault, is_plain
from tandem.scheduler.events import Submitted

VOCAB = 1_000
EOS = 3
MODEL = ModelDescription(
    name="m", architecture="a", dtype="d", vocab_size=VOCAB, max_model_len=300_000, eos_token_ids=(EOS,)
)


def fault(prompt_length: int = 4, **sampling: Any) -> tuple[str, str, str] | None:
    event = Submitted(
        client=1,
        ticket=1,
        prompt=np.zeros(prompt_length, np.int32),
        generated=np.empty(0, np.int32),
        sampling=SamplingParams(seed=1, **sampling),
    )
    found = find_fault(event, MODEL, 128, is_plain(event.sampling), None)
    if found is None:
        return None
    assert found.field in found.message
    return found.field, found.limit, found.value


IN_EVERY_ROW: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "seed": 7,
    "max_tokens": 9,
    "ignore_eos": True,
}
PARTICULAR: dict[str, Any] = {
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {},
    "allowed_token_ids": (1,),
    "bad_words_token_ids": ((1,),),
    "min_tokens": 1,
    "stop_token_ids": (0,),
    "structured_outputs": StructuredOutputsParams(regex="a"),
    "logprobs": 0,
    "prompt_logprobs": 0,
    "bad_words": ("a",),
    "stop": ("a",),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_parameters_are_plain_unless_one_is_set_that_not_every_row_has_a_column_for(name: str) -> None:
    """What is plain is looked at no further, so a parameter that is new must be in one of these lists."""
    both = IN_EVERY_ROW | PARTICULAR
    assert is_plain(SamplingParams())
    assert is_plain(SamplingParams(**{name: both[name]})) == (name in IN_EVERY_ROW)


@pytest.mark.parametrize(
    ("possible", "beyond", "named"),
    [
        ({"stop_token_ids": (999,)}, {"stop_token_ids": (1000,)}, ("stop_token_ids", "0 to 999", "1000")),
        ({"logit_bias": {999: 1.0}}, {"logit_bias": {5: 1.0, 1000: 1.0}}, ("logit_bias", "0 to 999", "1000")),
        ({"allowed_token_ids": (999,)}, {"allowed_token_ids": (1, 1000)}, ("allowed_token_ids", "0 to 999", "1000")),
        (
            {"bad_words_token_ids": ((1, 999),)},
            {"bad_words_token_ids": ((1,), (2, 1000))},
            ("bad_words_token_ids", "0 to 999", "1000"),
        ),
        ({"min_tokens": 5, "max_tokens": 5}, {"min_tokens": 6, "max_tokens": 5}, ("min_tokens", "5", "6")),
        (
            {"allowed_token_ids": (EOS, 7), "min_tokens": 1},
            {"allowed_token_ids": (EOS, 7), "min_tokens": 1, "stop_token_ids": (7,)},
            ("allowed_token_ids", "at least 1 token", "0 tokens"),
        ),
        (
            {"allowed_token_ids": (6, 7), "bad_words_token_ids": ((6,), (7, 7))},
            {"allowed_token_ids": (6, 7), "bad_words_token_ids": ((6,), (7,))},
            ("allowed_token_ids", "at least 1 token", "0 tokens"),
        ),
        (
            {"prompt_logprobs": 1, "prompt_length": 262_144},
            {"prompt_logprobs": 1, "prompt_length": 262_145},
            ("prompt_logprobs", "524288", "524290"),
        ),
        ({}, {"bad_words": ("text",)}, ("bad_words", "not sent", "sent")),
    ],
)
def test_what_only_the_model_decides(
    possible: dict[str, Any], beyond: dict[str, Any], named: tuple[str, str, str]
) -> None:
    assert fault(**possible) is None
    assert fault(**beyond) == named


BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("min_p", [0, 0.0, 1.0], [-1e-9, 1.0001, float("nan"), True]),
    ("repetition_penalty", [0.01, 1, 100.0], [0.0, -1, 0.0099, 100.1, float("inf"), "1.5"]),
    ("presence_penalty", [-2.0, 2], [-2.001, 2.001, float("nan"), True]),
    ("frequency_penalty", [-2, 2.0], [-2.001, 2.001, float("inf")]),
    (
        "logit_bias",
        [None, {}, {"7": 1.5}, {7: -100.0, 8: 100}, dict.fromkeys(range(1024), 1.0)],
        [{-1: 1.0}, {7: -100.1}, {7: 100.1}, {7: float("nan")}, {"x": 1.0}, {1.5: 1.0}, {"-1": 1.0},
         dict.fromkeys(range(1025), 1.0), [7], {2**31: 1.0}],
    ),
    ("allowed_token_ids", [None, [7], [0] * 65_536], [[], [-1], [0] * 65_537, ["7"], [True], 7, [2**31]]),
    (
        "bad_words_token_ids",
        [[], [[7]], [[7] * 32], [[7]] * 256],
        [[[]], [[7] * 33], [[7]] * 257, [7], [[-1]], [["x"]]],
    ),
    ("bad_words", [[], None, ["x"], ["x" * 256], ["x"] * 128], [[""], ["x" * 257], ["x"] * 129, [7], "word", [["x"]]]),
    ("min_tokens", [0, 7], [-1, 1.5, True, 2**31]),
    ("logprobs", [None, 0, 20], [-1, 21, True, 1.5]),
    ("prompt_logprobs", [None, 0, 20], [-1, 21, False]),
]  # fmt: skip


def short(value: Any) -> str:
    return f"{value!r:.40}"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, good, _ in BOUNDS for value in good], ids=short)
def test_just_possible(name: str, value: Any) -> None:
    checked = resolve_sampling(MODEL, None, {name: value})
    on_the_wire = replace(checked, bad_words=())
    sent = Submit(ticket=1, prompt=np.ones(2, np.int32), sampling=on_the_wire)
    assert decode(encode(sent), Submit).sampling == on_the_wire


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, _, bad in BOUNDS for value in bad], ids=short)
def test_just_beyond(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}") as caught:
        resolve_sampling(MODEL, None, {name: value})
    assert caught.value.field.split(".")[0] == name
    if name == "bad_words" or isinstance(value, str | bool):
        return
    sent = Submit(ticket=1, prompt=np.ones(2, np.int32), sampling=SamplingParams(**{name: value}))
    with pytest.raises((ProtocolError, TypeError)):
        decode(encode(sent), Submit)
