"""Bytes that are no message, messages that are another's to send, and messages in numbers."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from tandem.protocol.codec import MAX_SUBMISSION_BYTES, encode
from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AskStats,
    Cancel,
    ClientHello,
    FetchFile,
    Goodbye,
    Idle,
    Ping,
    Refused,
    StepPlan,
    StepResult,
    Submit,
    UnknownPeer,
    VersionRefused,
    Welcome,
    WorkerWelcome,
)
from tandem.protocol.sampling import SamplingParams
from tandem.protocol.transport import Port

from support.deadlines import DEADLINE_S
from support.peers import FILES, Peer, ScriptedClient, until
from support.siege import Siege

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPT = np.array([1, 2, 3], np.int32)
VALID = encode(Submit(ticket=1, prompt=PROMPT, sampling=GREEDY))


def named(name: Any, fields: Any) -> bytes:
    data: bytes = msgpack.packb([name, fields])
    return data


HELLO_WITH_NAME = b"\x92\xabClientHello\x82\xa7version" + msgpack.packb(PROTOCOL_VERSION) + b"\xa4name"

GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\xc1",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(100_000),
    "ones": b"\xff" * 1_000,
    "nil": msgpack.packb(None),
    "a number": msgpack.packb(2**64 - 1),
    "a map": msgpack.packb({"Submit": {}}),
    "one element": msgpack.packb(["Submit"]),
    "three elements": msgpack.packb(["Submit", {}, {}]),
    "name is a number": named(1, {}),
    "name is bytes": named(b"Submit", {}),
    "name is huge": named("S" * 60_000, {}),
    "name is over the limit": named("S" * 70_000, {}),
    "name is no UTF-8": b"\x92\xa6\xff\xfe\xff\xfe\xff\xfe\x80",
    "name is a class of Python": named("os.system", {"command": "true"}),
    "name is dunder": named("__class__", {}),
    "fields are a list": named("Ping", []),
    "fields are text": named("Ping", "x"),
    "keys are numbers": named("Ping", {1: 2}),
    "keys are no UTF-8": b"\x92\xa4Ping\x81\xa2\xff\xfe\x01",
    "a key twice": b"\x92\xa6Cancel\x82\xa6ticket\x01\xa6ticket\xa1x",
    "value is no UTF-8": HELLO_WITH_NAME + b"\xa2\xff\xfe",
    "a surrogate": HELLO_WITH_NAME + b"\xa3\xed\xa0\x80",
    "an extension": msgpack.packb(["Ping", {"x": msgpack.ExtType(5, b"12")}]),
    "a timestamp": msgpack.packb(["Ping", {"x": msgpack.Timestamp(1)}]),
    "deep": b"\x91" * 1_000_000,
    "deep maps": b"\x81\xa1x" * 300_000,
    "a bomb of arrays": b"\xdc\xff\xff" + b"\x90" * 65_535,
    "a bomb in a bomb": msgpack.packb([[[]] * 60_000] * 100),
    "a huge array": b"\x92\xa4Ping\xdd\xff\xff\xff\xff",
    "a huge map": b"\x92\xa4Ping\xdf\xff\xff\xff\xff",
    "huge bytes": b"\x92\xa4Ping\xc6\xff\xff\xff\xff",
    "huge text": b"\x92\xa4Ping\xdb\xff\xff\xff\xff",
    "more behind it": VALID + b"\x00",
    "two in one": VALID + VALID,
    "pickle": b"cos\nsystem\n(S'true'\ntR.",
    "almost the largest": named("Submit", {"ticket": 1, "prompt": bytes(MAX_SUBMISSION_BYTES - 100), "x": 1}),
    **{f"cut at {cut}": VALID[:cut] for cut in range(1, len(VALID), max(1, len(VALID) // 12))},
}  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("port", ["clients", "workers"])
def test_garbage_gets_a_goodbye(siege: Siege, port: Port, garbage: str) -> None:
    async def attack(siege: Siege) -> None:
        peer: Peer = siege.client() if port == "clients" else siege.liar()
        if port == "clients":
            await peer.send(ClientHello(version=PROTOCOL_VERSION))
        await peer.send(GARBAGE[garbage])
        goodbye = await peer.expect(Goodbye)
        assert 0 < len(goodbye.reason) < 1_100

    siege.run(siege.endure(attack))


def test_a_message_over_the_limit_ends_the_connection(siege: Siege) -> None:
    async def attack(siege: Siege) -> None:
        for size in (MAX_SUBMISSION_BYTES + 1, 4 * MAX_SUBMISSION_BYTES):
            client = siege.client()
            await client.hello()
            await client.expect(Welcome)
            await client.send(bytes(size))
            await client.wait(lambda client=client: zmq.EVENT_DISCONNECTED in client.handshakes)  # type: ignore[misc]

    siege.run(siege.endure(attack))


@pytest.mark.parametrize("count", [0, 2, 1_000])
def test_a_message_of_another_number_of_frames(siege: Siege, count: int) -> None:
    async def attack(siege: Siege) -> None:
        for peer in (siege.client(), siege.liar()):
            async with asyncio.timeout(DEADLINE_S):
                if count:
                    await until(lambda peer=peer: bool(peer.socket.send([VALID] * count)))  # type: ignore[misc]
                else:
                    await until(lambda peer=peer: bool(peer.socket.send([b"", VALID])))  # type: ignore[misc]
            assert "one frame" in (await peer.expect(Goodbye)).reason

    siege.run(siege.endure(attack))


FOREIGN: dict[str, Any] = {
    "Welcome": Welcome(version=PROTOCOL_VERSION, epoch=1, lease_s=1.0),
    "StepPlan": StepPlan(epoch=1, registration=1, step=0),
    "StepResult": StepResult(epoch=1, registration=1, step=0),
    "WorkerWelcome": WorkerWelcome(version=PROTOCOL_VERSION, epoch=1, registration=1),
    "Idle": Idle(epoch=1, registration=1, step=0),
    "UnknownPeer": UnknownPeer(epoch=1),
    "VersionRefused": VersionRefused(version=1),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_client_may_not_say(siege: Siege, name: str) -> None:
    async def attack(siege: Siege) -> None:
        client = siege.client()
        await client.hello()
        await client.send(FOREIGN[name])
        assert name in (await client.expect(Goodbye)).reason

    siege.run(siege.endure(attack))


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 2**31 - 1, -1, 2**64 - 1, "2", None, [], {}])
def test_another_version(siege: Siege, version: Any) -> None:
    async def attack(siege: Siege) -> None:
        client = siege.client()
        await client.send(named("ClientHello", {"version": version, "field_of_the_future": [1]}))
        assert (await client.expect(VersionRefused)).version == PROTOCOL_VERSION

    siege.run(siege.endure(attack))


# --- in numbers ------------------------------------------------------------------------------------------------------


async def ready(siege: Siege) -> ScriptedClient:
    client = siege.client()
    await client.hello()
    await client.expect(Welcome)
    return client


FLOODS: dict[str, tuple[Any, int]] = {
    "hellos": (ClientHello(version=PROTOCOL_VERSION, name="x" * 256), 2_000),
    "pings": (Ping(), 20_000),
    "cancels of nothing": (Cancel(ticket=7), 20_000),
    "questions": (AskStats(), 2_000),
    "files that are not there": (FetchFile(name="../../etc/passwd"), 2_000),
    "offsets beyond the end": (FetchFile(name="tokenizer.json", offset=2**31 - 1), 2_000),
    "submissions that are refused": (Submit(ticket=1, prompt=PROMPT[:0], sampling=GREEDY), 2_000),
    "one ticket": (Submit(ticket=1, prompt=PROMPT, sampling=GREEDY), 500),
    "versions": (named("ClientHello", {"version": 99}), 2_000),
}


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("reads", [True, False], ids=["reading", "not reading"])
def test_floods(siege: Siege, flood: str, reads: bool) -> None:
    """Another message than the flood's is answered after it; who does not read cannot be told, only forgotten."""
    message, count = FLOODS[flood]
    data = message if isinstance(message, bytes) else encode(message)

    async def attack(siege: Siege) -> None:
        client = await ready(siege)
        if not reads:
            client.socket._loop.remove_reader(client.socket._fd)
            raw = client.socket._socket
            for _ in range(count):
                try:
                    raw.send(data, zmq.DONTWAIT)
                except zmq.Again:
                    await asyncio.sleep(0)
            return
        for _ in range(count):
            await client.send(data)
        await client.hello()
        await client.wait(lambda: isinstance(client.got[-1], Welcome) and len(client.got) > 1)

    siege.run(siege.endure(attack))


def test_more_requests_than_a_client_may_have_are_refused_one_by_one(siege: Siege) -> None:
    async def attack(siege: Siege) -> None:
        client = await ready(siege)
        for ticket in range(70):
            await client.submit(ticket, [1, 2, 3], max_tokens=2)
        refused = [one for one in await answers(client, 70) if isinstance(one, Refused)]
        assert all(one.code == "overloaded" and one.retry_after_s > 0 for one in refused)
        for ticket in range(70):
            await client.send(Cancel(ticket=ticket))

    siege.run(siege.endure(attack))


async def answers(client: ScriptedClient, count: int) -> list[Any]:
    def found() -> list[Any] | None:
        all_of_them = [one for one in client.got if isinstance(one, Accepted | Refused)]
        return all_of_them if len(all_of_them) >= count else None

    result = await client.wait(found)
    assert result is not None
    return result


def test_the_queue_is_bounded_for_all_clients_together(siege: Siege) -> None:
    async def attack(siege: Siege) -> None:
        clients = [await ready(siege) for _ in range(8)]
        for client in clients:
            await client.send(Submit(ticket=1, prompt=PROMPT, sampling=GREEDY, n=50))
        outcomes = [(await answers(client, 1))[0] for client in clients]
        assert any(isinstance(one, Refused) and one.code == "overloaded" for one in outcomes)
        for client in clients:
            await client.send(Goodbye(reason="enough"))

    siege.run(siege.endure(attack))


def test_a_client_that_vanishes_with_open_requests_leaves_nothing(siege: Siege) -> None:
    async def attack(siege: Siege) -> None:
        client = await ready(siege)
        await client.submit(1, [1, 2, 3], max_tokens=60)
        await client.expect(Accepted)

    siege.run(siege.endure(attack))


def test_files_are_not_handed_out_without_end(siege: Siege) -> None:
    async def attack(siege: Siege) -> None:
        client = await ready(siege)
        goodbye = asyncio.ensure_future(client.expect(Goodbye))
        name, size = max(((name, len(data)) for name, data in FILES.items()), key=lambda item: item[1])
        for _ in range(10):
            for offset in range(0, size, 65_536):
                if not goodbye.done():
                    await client.send(FetchFile(name=name, offset=offset))
                    await asyncio.sleep(0)
            if goodbye.done():
                break
        assert "fetched" in (await goodbye).reason

    siege.run(siege.endure(attack))
