"""Submissions that cannot be, and their neighbours that can: each field, at its bounds and beyond them.

What is sent is msgpack, not a message of ours, which would not let most of it be said.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest

from tandem.protocol.messages import Accepted, Goodbye, Refused

from support.peers import ScriptedClient
from support.siege import Siege

REFUSED, BROKEN, SERVED = "refused", "broken", "served"
INT_MAX, LONG_MAX = 2**31 - 1, 2**63 - 1
GREEDY = {"temperature": 0.0, "max_tokens": 2}


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def submission(fields: dict[str, Any], sampling: dict[str, Any] | None = None) -> dict[str, Any]:
    values: dict[str, Any] = {"ticket": 1, "prompt": ints(5, 6), "sampling": {**GREEDY, **(sampling or {})}}
    values |= fields
    return {name: value for name, value in values.items() if value is not MISSING}


MISSING = object()


def each(field: str, outcome: str, *values: Any) -> list[tuple[str, Any, str]]:
    return [(field, value, outcome) for value in values]


SAMPLING: list[tuple[str, Any, str]] = [
    *each("temperature", BROKEN, -0.001, 100.001, float("nan"), float("inf"), 1e308, "hot", None, []),
    *each("temperature", SERVED, 0.0, 0),
    ("temperature", 100.0, REFUSED),  # without a seed
    *each("top_p", BROKEN, 0.0, -1.0, 1.000001, float("nan"), b"x"),
    ("top_p", 1.0, SERVED),
    *each("top_k", BROKEN, -2, INT_MAX + 1, 1.5, True, "3"),
    *each("top_k", SERVED, -1, 0, INT_MAX),
    *each("min_p", BROKEN, -0.001, 1.001, float("nan")),
    *each("seed", BROKEN, -1, LONG_MAX + 1, 2**64 - 1, 1.0, "1"),
    *each("seed", SERVED, 0, LONG_MAX),
    *each("max_tokens", BROKEN, 0, -1, INT_MAX + 1, 1.0, False),
    *each("max_tokens", SERVED, 1, INT_MAX),
    *each("min_tokens", BROKEN, -1, INT_MAX + 1),
    ("min_tokens", 3, REFUSED),
    *each("stop_token_ids", BROKEN, [-1], [0] * 129, "ab", [1.5], [[1]], [None]),
    *each("stop_token_ids", REFUSED, [50], [LONG_MAX]),
    ("stop_token_ids", [49] * 128, SERVED),
    ("ignore_eos", 1, BROKEN),
    ("ignore_eos", "yes", BROKEN),
    *each("presence_penalty", BROKEN, -2.001, 2.001, float("nan")),
    *each("frequency_penalty", BROKEN, -2.001, 2.001),
    *each("repetition_penalty", BROKEN, 0.0, -1.0, float("inf")),
    *each("logit_bias", BROKEN, {"-1": 1.0}, {"x": 1.0}, {"1": 101.0}, {"1": None}, [1], {"9" * 5_000: 1.0}),
    ("logit_bias", {str(i): 0.0 for i in range(1_025)}, BROKEN),
    ("logit_bias", {"50": 1.0}, REFUSED),
    *each("allowed_token_ids", BROKEN, [], [-1], ["x"]),
    ("allowed_token_ids", [50], REFUSED),
    *each("bad_words_token_ids", BROKEN, [[]], [[1] * 33], [[1]] * 257, [1]),
    ("bad_words_token_ids", [[50]], REFUSED),
    *each("logprobs", BROKEN, -1, 21, True),
    *each("prompt_logprobs", BROKEN, -1, 21),
    ("stop", ["x"], REFUSED),
    *each("stop", BROKEN, ["x"] * 33, ["x" * 257], [""], [1]),
    ("unheard_of", 1, BROKEN),
]  # fmt: skip

FIELDS: list[tuple[str, Any, str]] = [
    *each("ticket", BROKEN, -1, LONG_MAX + 1, 1.0, "1", None, MISSING),
    ("ticket", LONG_MAX, REFUSED),
    ("ticket", LONG_MAX - 1, SERVED),
    *each("prompt", BROKEN, b"123", [1, 2], "abcd", None, MISSING, {}),
    ("prompt", b"", REFUSED),
    ("prompt", ints(*[1] * 64), REFUSED),
    ("prompt", ints(*[1] * 63), SERVED),
    ("prompt", ints(50), REFUSED),
    ("prompt", ints(49), SERVED),
    ("prompt", ints(-1), REFUSED),
    ("prompt", ints(INT_MAX), REFUSED),
    ("prompt", ints(*[1] * 1_000_000), REFUSED),
    *each("generated", REFUSED, ints(1, 2, 3), ints(50), ints(-1)),
    ("generated", ints(1, 2), SERVED),
    *each("n", BROKEN, 0, -1, 65_537, True, 1.0),
    ("n", 129, REFUSED),
    *each("sample", BROKEN, -1, 65_536),
    ("sample", 65_535, SERVED),
    *each("priority", BROKEN, -1_001, 1_001, 0.5),
    *each("priority", SERVED, -1_000, 1_000),
    *each("timeout_s", BROKEN, 0.0, -1.0, float("nan"), float("inf"), 1.1e9),
    ("timeout_s", 1e9, SERVED),
    *each("cache_salt", BROKEN, "s" * 257, b"salt", 1),
    ("cache_salt", "s" * 256, SERVED),
    *each("sampling", BROKEN, None, [], 1, "x", MISSING, {"temperature": {}}),
    ("a_field_of_the_future", 1, BROKEN),
]


def _name(case: tuple[str, Any, str]) -> str:
    field, value, outcome = case
    return f"{field}={'missing' if value is MISSING else repr(value)[:24]}-{outcome}"


async def outcome_of(client: ScriptedClient, data: bytes) -> tuple[str, str]:
    """What becomes of a submission of ticket 1, and what was said."""
    await client.hello()
    await client.send(data)

    def answered() -> Refused | Goodbye | Accepted | None:
        return next((one for one in client.got if isinstance(one, Refused | Goodbye | Accepted)), None)

    answer = await client.wait(answered)
    assert answer is not None
    if isinstance(answer, Refused):
        return REFUSED, f"{answer.field} {answer.message} {answer.limit} {answer.value}"
    if isinstance(answer, Goodbye):
        return BROKEN, answer.reason
    assert isinstance(answer, Accepted)
    ticket = answer.ticket
    end = await client.wait(lambda: client.ended(ticket))
    assert end.reason in ("length", "stop")
    return SERVED, ""


@pytest.mark.parametrize(("field", "value", "expected"), SAMPLING, ids=map(_name, SAMPLING))
def test_sampling_parameters(siege: Siege, field: str, value: Any, expected: str) -> None:
    check(siege, submission({}, {field: value}), field, expected)


@pytest.mark.parametrize(("field", "value", "expected"), FIELDS, ids=map(_name, FIELDS))
def test_fields(siege: Siege, field: str, value: Any, expected: str) -> None:
    check(siege, submission({field: value}), field, expected)


def check(siege: Siege, fields: dict[str, Any], field: str, expected: str) -> None:
    async def attack(siege: Siege) -> None:
        outcome, said = await outcome_of(siege.client(), msgpack.packb(["Submit", fields]))
        assert outcome == expected, said
        if outcome != SERVED:
            assert field in said or (field == "temperature" and "seed" in said), said
            assert len(said) < 1_500

    siege.run(siege.endure(attack))
