"""Connections that are no clients: other protocols, half a greeting, silence, wrong keys."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import pytest
import zmq

from tandem.launch.keys import new_pair
from tandem.protocol.keys import PeerKeys
from tandem.protocol.messages import Goodbye
from tandem.protocol.transport import LoopSocket, Port

from support.deadlines import DEADLINE_S
from support.peers import Peer, ScriptedClient, until
from support.siege import Siege, endpoint

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
GREETING = SIGNATURE + b"\x03\x01"


def greeting(mechanism: bytes, as_server: int = 0) -> bytes:
    return GREETING + mechanism.ljust(20, b"\0") + bytes([as_server]) + bytes(31)


def command(body: bytes) -> bytes:
    return b"\x04" + bytes([len(body)]) + body


HELLO = b"\x05HELLO\x01\x00" + bytes(72) + bytes(32) + bytes(8) + bytes(80)

SAYINGS: dict[str, bytes] = {
    "nothing": b"",
    "HTTP": b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(190),
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "zeros": bytes(65_536),
    "ones": b"\xff" * 65_536,
    "half a signature": SIGNATURE[:5],
    "a signature": SIGNATURE,
    "ZMTP 1": b"\x01\x00",
    "ZMTP 2": SIGNATURE + b"\x01\x05\x00\x00",
    "ZMTP 255": SIGNATURE + b"\xff\xff" + bytes(52),
    "half a greeting": greeting(b"CURVE")[:40],
    "a greeting": greeting(b"CURVE"),
    "mechanism NULL": greeting(b"NULL") + command(b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"),
    "mechanism PLAIN": greeting(b"PLAIN") + command(b"\x05HELLO\x01u\x01p"),
    "mechanism GSSAPI": greeting(b"GSSAPI"),
    "mechanism of 20 bytes": greeting(b"X" * 20),
    "as a server": greeting(b"CURVE", 1),
    "an empty command": greeting(b"CURVE") + command(b""),
    "HELLO without keys": greeting(b"CURVE") + command(b"\x05HELLO"),
    "HELLO with zeros": greeting(b"CURVE") + command(HELLO),
    "HELLO twice": greeting(b"CURVE") + command(HELLO) * 2,
    "INITIATE first": greeting(b"CURVE") + command(b"\x08INITIATE" + bytes(200)),
    "MESSAGE first": greeting(b"CURVE") + command(b"\x07MESSAGE" + bytes(40)),
    "READY first": greeting(b"CURVE") + command(b"\x05READY" + bytes(40)),
    "a frame of 2^63 bytes": greeting(b"CURVE") + b"\x06" + struct.pack(">Q", 2**63 - 1),
    "a frame of -1 bytes": greeting(b"CURVE") + b"\x06" + b"\xff" * 8,
    "a message instead of a command": greeting(b"CURVE") + b"\x00\x05hello",
    "a ping": greeting(b"CURVE") + command(b"\x04PING\0\0"),
}


def connect(siege: Siege, port: Port) -> socket.socket:
    return socket.create_connection(("127.0.0.1", siege.ports[port]), DEADLINE_S)


@pytest.mark.parametrize("saying", SAYINGS)
@pytest.mark.parametrize("port", ["clients", "workers"])
def test_another_protocol(siege: Siege, port: Port, saying: str) -> None:
    """Half-open ones stay beside the streams as long as these run."""

    async def attack(siege: Siege) -> None:
        connections = [connect(siege, port) for _ in range(5)]
        for connection in connections:
            with contextlib.suppress(OSError):  # it may be closed already
                connection.sendall(SAYINGS[saying])
        await asyncio.sleep(0)
        for connection in connections:
            connection.close()

    siege.run(siege.endure(attack))


@pytest.mark.parametrize("how", ["closed", "reset", "left open"])
def test_many_connections(siege: Siege, how: str) -> None:
    async def attack(siege: Siege) -> None:
        connections = []
        for _ in range(150):
            connection = connect(siege, "clients")
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if how == "left open":
                connections.append(connection)
            else:
                connection.close()
        for _ in range(20):
            await asyncio.sleep(0)
        for connection in connections:
            connection.close()

    siege.run(siege.endure(attack))


def test_a_half_open_connection_is_closed_by_the_scheduler(siege: Siege) -> None:
    async def attack(siege: Siege) -> None:
        connection = connect(siege, "clients")
        try:
            connection.sendall(greeting(b"CURVE"))
            connection.setblocking(False)
            async with asyncio.timeout(DEADLINE_S):
                while await asyncio.get_running_loop().sock_recv(connection, 4_096):
                    pass
        except ConnectionResetError:
            pass
        finally:
            connection.close()

    siege.run(siege.endure(attack))


def wrong_keys(siege: Siege, wrong: str, port: Port) -> PeerKeys | None:
    other: Port = "workers" if port == "clients" else "clients"
    good = siege.keys[port, "attacker"]
    found = {
        "unknown": PeerKeys(*new_pair(), good.server),
        "revoked": siege.keys[port, "revoked"],
        "of the other port": siege.keys[other, "attacker"],
        "for another scheduler": PeerKeys(good.public, good.secret, new_pair()[0]),
        "the scheduler's public key as one's own": PeerKeys(good.server, good.secret, good.server),
        "another's public key": PeerKeys(siege.keys[port, "default"].public, good.secret, good.server),
        "secret and public swapped": PeerKeys(good.secret, good.public, good.server),
        "missing": None,
    }
    return found[wrong]


WRONG_KEYS = (
    "unknown", "revoked", "of the other port", "for another scheduler", "the scheduler's public key as one's own",
    "another's public key", "secret and public swapped", "missing",
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_KEYS)
@pytest.mark.parametrize("port", ["clients", "workers"])
def test_wrong_keys(siege: Siege, port: Port, wrong: str) -> None:
    async def attack(siege: Siege) -> None:
        peer = ScriptedClient(siege.context, endpoint(siege, port), wrong_keys(siege, wrong, port))
        siege.peers.append(peer)
        failed = (
            zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        await peer.wait(lambda: any(event & failed for event in peer.handshakes))
        assert zmq.EVENT_HANDSHAKE_SUCCEEDED not in peer.handshakes
        assert not peer.socket.send([b"hello"])
        assert peer.got == []

    siege.run(siege.endure(attack))


@pytest.mark.parametrize("port", ["clients", "workers"])
@pytest.mark.parametrize("kind", [zmq.REQ, zmq.PUB, zmq.SUB, zmq.PUSH, zmq.PULL, zmq.PAIR, zmq.ROUTER])
def test_other_kinds_of_sockets(siege: Siege, port: Port, kind: int) -> None:
    """With a key that is admitted."""

    async def attack(siege: Siege) -> None:
        keys = siege.keys[port, "attacker"]
        made = siege.context.socket(kind)
        made.set(zmq.LINGER, 0)
        made.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
        made.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        made.set(zmq.CURVE_SERVERKEY, keys.server.encode())
        made.connect(endpoint(siege, port))
        if kind in (zmq.REQ, zmq.PUSH, zmq.PAIR, zmq.PUB):
            with contextlib.suppress(zmq.Again):
                made.send(b"hello", zmq.DONTWAIT)
        for _ in range(50):
            await asyncio.sleep(0)
        made.close(0)

    siege.run(siege.endure(attack))


@pytest.mark.parametrize("chosen", [b"another's", b"x" * 255])
def test_a_chosen_routing_id(siege: Siege, chosen: bytes) -> None:
    async def attack(siege: Siege) -> None:
        made = siege.context.socket(zmq.DEALER)
        made.set(zmq.ROUTING_ID, chosen)
        keys = siege.keys["clients", "attacker"]
        made.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
        made.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        made.set(zmq.CURVE_SERVERKEY, keys.server.encode())
        made.connect(siege.address)
        peer: Peer = siege.client()
        peer.socket.close(0)
        peer.socket = LoopSocket(made, peer._on_frames)
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: bool(peer.socket.send([b"hello"])))
        assert "routing id" in (await peer.expect(Goodbye)).reason

    siege.run(siege.endure(attack))
