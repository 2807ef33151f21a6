"""Whatever bytes come: a ProtocolError, or a message that is all that its types say."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import strategies as st

from tandem.protocol.codec import decode, encode
from tandem.protocol.errors import ProtocolError, VersionMismatch
from tandem.protocol.messages import PROTOCOL_VERSION, StepPlan, Submit, Tokens, Welcome, WorkerHello
from tandem.protocol.sampling import SamplingParams

from support.fuzzing import SECONDS, damaged, fuzz, integers, values
from support.peers import EVERYTHING, MODEL

CLASSES = {cls.__name__: cls for cls in EVERYTHING if dataclasses.is_dataclass(cls)}
ROW = np.array([1, 2, 3], np.int32)
VALID = [
    encode(message)
    for message in (
        Submit(ticket=1, prompt=ROW, sampling=SamplingParams(seed=4, stop_token_ids=(1, 2), logit_bias={5: 1.0})),
        Tokens(epoch=1, ticket=np.array([1], np.int64), offset=ROW[:1], count=ROW[:1], token=ROW[:1]),
        StepPlan(epoch=1, registration=1, step=0, leave=ROW, join_slot=ROW, join_token=ROW),
        Welcome(version=PROTOCOL_VERSION, epoch=1, lease_s=1.0, model=MODEL),
        WorkerHello(
            version=PROTOCOL_VERSION, name="w", pid=1, instance=1, model=MODEL, num_blocks=1, block_size=1,
            max_num_seqs=1, max_num_batched_tokens=1, lookahead=1,
        ),
    )
]  # fmt: skip


@st.composite
def near_messages(draw: st.DrawFn) -> bytes:
    """A message of some class, with fields that are there or not and hold anything."""
    name = draw(st.sampled_from(sorted(CLASSES)))
    names = [field.name for field in dataclasses.fields(CLASSES[name])]
    fields: dict[Any, Any] = {field: draw(st.one_of(integers, values)) for field in names if draw(st.integers(0, 3))}
    if "version" in names and draw(st.booleans()):
        fields["version"] = PROTOCOL_VERSION
    if draw(st.integers(0, 9)) == 0:
        fields[draw(st.text(max_size=4))] = draw(values)
    try:
        data: bytes = msgpack.packb([name, fields])
    except OverflowError:
        return b""
    return data


def looks_right(data: bytes) -> None:
    try:
        message = decode(data, *CLASSES.values())
    except (ProtocolError, VersionMismatch) as refused:
        story = str(refused)
    else:
        survives(message)
        return
    assert 0 < len(story) < 2_000


def survives(message: Any) -> None:
    """A message can be sent on, and its columns are what columns are."""
    again = encode(message)
    assert encode(decode(again, type(message))) == again
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if isinstance(value, np.ndarray):
            assert value.ndim == 1
            assert not value.flags.writeable or not value.size


@pytest.mark.timeout(int(900 + SECONDS))
def test_anything_that_looks_like_a_message() -> None:
    fuzz(near_messages(), 500, looks_right)


@pytest.mark.timeout(int(900 + SECONDS))
def test_messages_that_were_damaged() -> None:
    fuzz(st.sampled_from(VALID).flatmap(damaged), 1_000, looks_right)


@pytest.mark.timeout(int(900 + SECONDS))
def test_any_bytes() -> None:
    packed = values.map(lambda value: msgpack.packb(value) if packable(value) else b"")
    fuzz(st.one_of(st.binary(max_size=300), packed), 500, looks_right)


def packable(value: Any) -> bool:
    try:
        msgpack.packb(value)
    except OverflowError:
        return False
    return True
