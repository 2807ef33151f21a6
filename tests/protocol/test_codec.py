"""Messages survive the wire unchanged, and nothing else does."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.protocol import messages
from tandem.protocol.codec import MAX_MESSAGE_BYTES, decode, encode
from tandem.protocol.errors import MessageTooLarge, ProtocolError, VersionMismatch
from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    Ended,
    FileChunk,
    FileInfo,
    ModelDescription,
    StepPlan,
    StepResult,
    Submit,
    Tokens,
    Welcome,
    WorkerHello,
)
from tandem.protocol.sampling import SamplingParams

INT32 = st.integers(-(2**31), 2**31 - 1)


def same(left: Any, right: Any) -> bool:
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left)
        )
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def column(values: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


@given(
    prompt=st.lists(INT32, max_size=50),
    generated=st.lists(INT32, max_size=5),
    temperature=st.floats(0, 100),
    top_k=st.integers(-1, 2**31 - 1),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stops=st.lists(st.integers(0, 2**40), max_size=128),
    bias=st.none() | st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=5),
    allowed=st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
    bad=st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=32), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
)
def test_a_submission_survives_the_wire(
    prompt: list[int],
    generated: list[int],
    temperature: float,
    top_k: int,
    seed: int | None,
    stops: list[int],
    bias: dict[int, float] | None,
    allowed: list[int] | None,
    bad: list[list[int]],
    logprobs: int | None,
) -> None:
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_token_ids=tuple(stops),
        logit_bias=bias,
        allowed_token_ids=None if allowed is None else tuple(allowed),
        bad_words_token_ids=tuple(map(tuple, bad)),
        logprobs=logprobs,
    )
    sent = Submit(ticket=1, prompt=column(prompt), generated=column(generated), sampling=sampling)
    assert same(decode(encode(sent), Submit), sent)


@given(rows=st.lists(st.tuples(st.integers(0, 2**63 - 1), INT32, INT32), max_size=40), reason=st.text(max_size=20))
def test_tokens_survive_the_wire(rows: list[tuple[int, int, int]], reason: str) -> None:
    sent = Tokens(
        epoch=2**62,
        ticket=np.array([row[0] for row in rows], np.int64),
        offset=column([row[1] for row in rows]),
        count=column([1] * len(rows)),
        token=column([row[2] for row in rows]),
        ended=(Ended(ticket=1, reason=reason), Ended(ticket=2, reason="stop", total_s=0.25)),
    )
    assert same(decode(encode(sent), Tokens), sent)


def test_nested_messages_survive_the_wire() -> None:
    model = ModelDescription(
        name="m", architecture="a", dtype="float32", vocab_size=9, max_model_len=8, eos_token_ids=(1, 2),
        default_sampling={"temperature": 0.6, "top_k": 20},
    )  # fmt: skip
    files = (FileInfo(name="tokenizer.json", size=3, sha256="00"),)
    for sent in (
        Welcome(version=PROTOCOL_VERSION, epoch=1, lease_s=2.5, model=model, files=files),
        Welcome(version=PROTOCOL_VERSION, epoch=1, lease_s=2.5),
        WorkerHello(
            version=PROTOCOL_VERSION,
            name="w",
            pid=1,
            instance=5,
            model=model,
            files=files,
            num_blocks=1,
            block_size=16,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            lookahead=1,
        ),
        FileChunk(name="f", offset=7, data=bytes(range(256))),
    ):
        assert same(decode(encode(sent), type(sent)), sent)


def test_fields_at_their_default_do_not_travel() -> None:
    plan = StepPlan(epoch=1, registration=2, step=3)
    assert msgpack.unpackb(encode(plan)) == ["StepPlan", {"epoch": 1, "registration": 2, "step": 3}]


def test_columns_are_packed_little_endian() -> None:
    data = msgpack.unpackb(encode(StepResult(epoch=0, registration=0, step=0, token=column([1, -2]))))
    assert data[1]["token"] == b"\x01\0\0\0\xfe\xff\xff\xff"


def test_large_columns_survive_the_wire() -> None:
    """Over 64 KiB, where a transport may stop copying."""
    tokens = np.arange(100_000, dtype=np.int32)
    got = decode(encode(StepResult(epoch=0, registration=0, step=0, token=tokens)), StepResult)
    assert np.array_equal(got.token, tokens)


@given(data=st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data, Submit, ClientHello)


VALID = encode(Submit(ticket=1, prompt=column([1, 2, 3]), sampling=SamplingParams(seed=4)))


@given(position=st.integers(0, len(VALID) - 1), value=st.integers(0, 255), cut=st.integers(0, len(VALID)))
def test_damaged_messages_are_refused_or_still_typed(position: int, value: int, cut: int) -> None:
    damaged = VALID[:position] + bytes([value]) + VALID[position + 1 :]
    for data in (damaged, VALID[:cut], damaged[cut:]):
        try:
            message = decode(data, Submit)
        except ProtocolError:
            continue
        assert isinstance(message.ticket, int)
        assert message.prompt.dtype == np.int32
        assert isinstance(message.sampling, SamplingParams)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ticket": -1},
        {"ticket": 2**63},
        {"ticket": True},
        {"ticket": "1"},
        {"ticket": 1.0},
        {"prompt": b"123"},
        {"prompt": [1, 2, 3]},
        {"sampling": None},
        {"sampling": {"temperature": float("nan")}},
        {"sampling": {"temperature": float("inf")}},
        {"sampling": {"top_p": 0}},
        {"sampling": {"top_k": 2**31}},
        {"sampling": {"seed": -1}},
        {"sampling": {"max_tokens": 0}},
        {"sampling": {"stop_token_ids": list(range(129))}},
        {"sampling": {"unheard_of": 1}},
        {"unheard_of": 1},
    ],
)
def test_fields_of_another_type_or_range_are_refused_by_name(fields: dict[str, Any]) -> None:
    good = {"ticket": 1, "prompt": b"\x01\0\0\0", "sampling": {}}
    data = msgpack.packb(["Submit", {**good, **fields} if fields else {}])
    with pytest.raises(ProtocolError, match=r"Submit\." + next(iter(fields), "ticket")):
        decode(data, Submit)


def test_an_unexpected_message_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="StepPlan"):
        decode(encode(StepPlan(epoch=1, registration=1, step=1)), Submit, ClientHello)


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 1, 0, "2", None])
def test_another_version_is_told_from_garbage_even_with_unknown_fields(version: Any) -> None:
    data = msgpack.packb(["ClientHello", {"version": version, "a_field_of_the_future": [1]}])
    with pytest.raises(VersionMismatch, match="same version"):
        decode(data, ClientHello)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdc\xff\xff" + b"\x90" * 65_535,
        msgpack.packb([[[]] * 60_000] * 100),
        msgpack.packb([{i: {} for i in range(3_000)}] * 3),
        b"\x91" * 2_000_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=["arrays", "nested", "maps", "deep", "huge array", "huge map", "huge bin", "huge ext"],
)
def test_a_message_does_not_grow_when_it_is_unpacked(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(bomb, Submit)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024 + len(bomb)
    finally:
        tracemalloc.stop()


def test_oversized_messages_are_refused_before_sending_and_before_unpacking() -> None:
    big = bytes(MAX_MESSAGE_BYTES)
    with pytest.raises(MessageTooLarge):
        encode(FileChunk(name="f", offset=0, data=big))
    with pytest.raises(ProtocolError, match="over the limit"):
        decode(big + b"1", FileChunk)


def test_every_message_class_is_described_by_the_module() -> None:
    """The conversations at the top of messages.py name every message that is not part of another."""
    parts = {"FileInfo", "ModelDescription", "Ended", "Histogram", "WorkerStats"}
    named = messages.__doc__ or ""
    for name, cls in vars(messages).items():
        if dataclasses.is_dataclass(cls) and cls.__module__ == messages.__name__ and name not in parts:
            assert name in named, name
