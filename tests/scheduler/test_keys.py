"""Who is let in over TCP: a real scheduler service, real CURVE handshakes, keys in a real directory."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq

from tandem.client.aio import AsyncClient
from tandem.launch.keys import KeyDirectory, new_pair
from tandem.protocol import wires
from tandem.protocol.errors import AuthenticationError, ConfigurationError
from tandem.protocol.keys import PeerFile, PeerKeys, read_key_file
from tandem.protocol.messages import Accepted, Goodbye, UnknownPeer, Welcome, WorkerWelcome
from tandem.protocol.transport import Address, LoopSocket, Port, open_dealer
from tandem.scheduler.config import SchedulerConfig
from tandem.scheduler.service import Service
from tandem.worker.link import Failure, Link

from support.deadlines import DEADLINE_S
from support.peers import Peer, Scene, free_ports, keyed_scene, until
from support.proxy import Proxy
from support.simulated_worker import continuation

pytestmark = pytest.mark.thorough

LEASES = {"client_lease": 2.0, "worker_lease": 2.0}
"""Short: keys are looked at four times in one."""


def run(scenario: Callable[[Scene], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), keyed_scene(**options) as made:
            await scenario(made)

    asyncio.run(main())


def stranger(server: str) -> PeerKeys:
    """A key that nobody listed."""
    return PeerKeys(*new_pair(), server=server)


def has_model(client: Peer) -> bool:
    """Whether the service has told the client of a model."""
    return bool(client.got) and client.got[-1].model is not None


async def answered(scene: Scene, client: Any, ticket: int = 1) -> None:
    prompt = [5, 6, 7]
    await client.submit(ticket, prompt, max_tokens=6)
    end = await client.wait(lambda: client.ended(ticket))
    assert end.reason == "length"
    assert client.tokens(ticket) == continuation(prompt, 9, frozenset(), 50, 0)[0]


def test_listed_keys_are_served() -> None:
    async def scenario(scene: Scene) -> None:
        worker, client = scene.worker(keys=scene.peer_keys("workers")), scene.client(scene.peer_keys("clients"))
        await worker.hello()
        await client.hello()
        await client.wait(partial(has_model, client))
        await answered(scene, client)

    run(scenario)


WRONG: dict[str, Callable[[Scene, Port], PeerKeys | None]] = {
    "unknown": lambda scene, other: stranger(scene.peer_keys("clients").server),
    "of the other port": lambda scene, other: scene.peer_keys(other),
    "for another scheduler": lambda scene, other: PeerKeys(*_pair(scene.peer_keys("clients")), new_pair()[0]),
    "none": lambda scene, other: None,
}


def _pair(keys: PeerKeys) -> tuple[str, str]:
    return keys.public, keys.secret


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("port", "other"), [("clients", "workers"), ("workers", "clients")])
def test_wrong_keys_are_refused_and_logged(
    wrong: str, port: Port, other: Port, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(scene: Scene) -> None:
        keys = WRONG[wrong](scene, other)
        peer: Peer = scene.client(keys) if port == "clients" else scene.worker(keys=keys)
        failed = zmq.EVENT_HANDSHAKE_FAILED_AUTH
        if wrong in ("for another scheduler", "none"):
            failed = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        await peer.wait(lambda: any(event & failed for event in peer.handshakes))
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: f"port for {port}" in caplog.text)
        assert peer.got == []
        assert not any(event == zmq.EVENT_HANDSHAKE_SUCCEEDED for event in peer.handshakes)
        # Nobody else is bothered.
        good = scene.client(scene.peer_keys("clients"))
        await good.hello()
        await good.expect(Welcome)

    with caplog.at_level(logging.WARNING):
        run(scenario)


def test_refusals_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(scene: Scene) -> None:
        server = scene.peer_keys("clients").server
        peers = [scene.client(stranger(server)) for _ in range(20)]
        for peer in peers:
            await peer.wait(partial(peer.handshakes.__contains__, zmq.EVENT_HANDSHAKE_FAILED_AUTH))

    with caplog.at_level(logging.WARNING):
        run(scenario)
    assert 1 <= caplog.text.count("refused a connection") < 10


def test_a_revoked_client_is_cut_off_and_its_requests_are_cancelled() -> None:
    async def scenario(scene: Scene) -> None:
        KeyDirectory(scene.keys).create("clients", "second")
        await wait_for_key(scene, "clients", "second")
        worker = scene.worker(keys=scene.peer_keys("workers"), manual=True)
        revoked, other = scene.client(scene.peer_keys("clients")), scene.client(scene.peer_keys("clients", "second"))
        await worker.hello()
        for client in (revoked, other):
            await client.hello()
            await client.wait(partial(has_model, client))
            await client.submit(1, [4, 5, 6], max_tokens=20)
            await client.expect(Accepted)
        KeyDirectory(scene.keys).revoke("clients", "default")
        goodbye = await revoked.expect(Goodbye)
        assert "revoked" in goodbye.reason
        await revoked.wait(lambda: zmq.EVENT_DISCONNECTED in revoked.handshakes)
        await revoked.wait(lambda: zmq.EVENT_HANDSHAKE_FAILED_AUTH in revoked.handshakes)
        assert scene.service._core.running + scene.service._core.waiting == 1
        assert not any(isinstance(message, Goodbye) for message in other.got)

    run(scenario, **LEASES)


async def wait_for_key(scene: Scene, port: Port, name: str) -> None:
    """Until the scheduler has noticed a key that was added."""
    admission = scene.service._admission
    assert admission is not None
    key = scene.peer_keys(port, name).public
    async with asyncio.timeout(DEADLINE_S):
        await until(lambda: admission.admits(port, key))


def test_a_revoked_client_that_has_nothing_to_say_is_cut_off_too() -> None:
    """Its connection would live on for ever: ZeroMQ answers pings by itself."""

    async def scenario(scene: Scene) -> None:
        client = scene.client(scene.peer_keys("clients"))
        await client.hello()
        await client.expect(Welcome)
        KeyDirectory(scene.keys).rotate("clients", "default")
        await client.wait(lambda: zmq.EVENT_DISCONNECTED in client.handshakes)

    run(scenario, **LEASES)


def test_a_revoked_connection_that_never_said_hello_is_cut_when_it_speaks() -> None:
    async def scenario(scene: Scene) -> None:
        client = scene.client(scene.peer_keys("clients"))
        await client.wait(lambda: zmq.EVENT_HANDSHAKE_SUCCEEDED in client.handshakes)
        KeyDirectory(scene.keys).revoke("clients", "default")
        admission = scene.service._admission
        assert admission is not None
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: not admission._names["clients"])
        await client.hello()
        await client.wait(lambda: zmq.EVENT_DISCONNECTED in client.handshakes)
        assert client.got == []

    run(scenario, **LEASES)


def test_the_requests_of_a_revoked_worker_go_on_elsewhere() -> None:
    async def scenario(scene: Scene) -> None:
        KeyDirectory(scene.keys).create("workers", "second")
        await wait_for_key(scene, "workers", "second")
        client = scene.client(scene.peer_keys("clients"))
        first = scene.worker(1, manual=True, keys=scene.peer_keys("workers"))
        await first.hello()
        await first.expect(WorkerWelcome)
        await client.hello()
        await client.wait(partial(has_model, client))
        await client.submit(1, [4, 5, 6], max_tokens=9)
        await first.wait(lambda: first.simulated.plans)
        KeyDirectory(scene.keys).revoke("workers", "default")
        goodbye = await first.expect(Goodbye)
        assert goodbye.final
        second = scene.worker(2, keys=scene.peer_keys("workers", "second"))
        await second.hello()
        end = await client.wait(lambda: client.ended(1))
        assert end.reason == "length"
        assert client.tokens(1) == continuation([4, 5, 6], 12, frozenset(), 50, 0)[0]
        await first.wait(lambda: zmq.EVENT_HANDSHAKE_FAILED_AUTH in first.handshakes)

    run(scenario, **LEASES)


def test_another_worker_key_cannot_end_a_registration_by_its_instance_number() -> None:
    async def scenario(scene: Scene) -> None:
        KeyDirectory(scene.keys).create("workers", "second")
        await wait_for_key(scene, "workers", "second")
        victim = scene.worker(7, keys=scene.peer_keys("workers"))
        await victim.hello()
        await victim.expect(WorkerWelcome)
        thief = scene.worker(7, keys=scene.peer_keys("workers", "second"))
        await thief.hello()
        await thief.expect(WorkerWelcome)
        assert len(scene.service.workers.stats()) == 2

    run(scenario)


def test_lists_that_cannot_be_read_leave_things_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(scene: Scene) -> None:
        (scene.keys / "clients" / "broken.pub").write_text("not a key")
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: "unchanged" in caplog.text)
        client = scene.client(scene.peer_keys("clients"))
        await client.hello()
        await client.expect(Welcome)

    run(scenario, **LEASES)


@pytest.mark.parametrize("wrong", ["unknown", "revoked while connected", "for another scheduler", "none"])
def test_the_sdk_says_that_it_is_not_admitted(wrong: str) -> None:
    async def scenario(scene: Scene) -> None:
        directory = KeyDirectory(scene.keys)
        file = directory.create("clients", "sdk")
        worker = scene.worker(keys=scene.peer_keys("workers"))
        await worker.hello()
        await worker.expect(WorkerWelcome)
        options: dict[str, Any] = {"keys": file, "connect_timeout": DEADLINE_S}
        if wrong == "none":
            options = {"insecure": True, "connect_timeout": DEADLINE_S}
        elif wrong == "unknown":
            kept = file.read_text()
            directory.revoke("clients", "sdk")
            file.write_text(kept)
            file.chmod(0o600)
        elif wrong == "for another scheduler":
            directory.rotate_server()
        client = AsyncClient(scene.address, **options)
        if wrong != "revoked while connected":
            with pytest.raises(AuthenticationError, match=scene.address):
                await client.connect()
            return
        await wait_for_key(scene, "clients", "sdk")
        await client.connect()
        directory.revoke("clients", "sdk")
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: client._connection.is_closed)
        with pytest.raises(AuthenticationError, match="does not admit"):
            await client.generate([4, 5])
        await client.close()

    run(scenario, **LEASES)


@pytest.mark.parametrize("insecure", [False, True], ids=["keys", "insecure"])
def test_a_proxy_without_a_scheduler_behind_it_refuses_no_key(
    insecure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends each connection in the midst of the handshake, as a scheduler with another key does."""
    directory = KeyDirectory(tmp_path / "keys", make=True)
    directory.create_server()
    directory.create("workers", "default")
    directory.create("clients", "default")
    shown: dict[str, Any] = {"insecure": True} if insecure else {"keys": str(directory.path)}
    file = read_key_file(directory.path / "workers" / "default.key", PeerFile)
    (port,) = free_ports(1)

    async def main() -> None:
        client = AsyncClient(f"tcp://127.0.0.1:{proxy.port}", connect_timeout=DEADLINE_S, **shown)
        async with asyncio.timeout(DEADLINE_S):
            with monkeypatch.context() as patch:
                patch.setattr(wires, "CLOSED_HANDSHAKES_S", 0.0)
                patch.setattr(wires, "LOOK_EVERY_S", 0.0)
                connecting = asyncio.create_task(client.connect())
                await until(lambda: proxy.turned_away > 20 or connecting.done())
                assert not connecting.done()
            async with keyed_scene(**{"keys": None, **shown, "address": f"tcp://127.0.0.1:{port}"}) as scene:
                worker = scene.worker(keys=None if insecure else PeerKeys(file.public, file.secret, file.server))
                await worker.hello()
                await connecting
                await client.close()

    with Proxy(port) as proxy:
        asyncio.run(main())


@pytest.mark.parametrize("wrong", ["unknown", "for another scheduler", "none"])
def test_a_worker_says_that_it_is_not_admitted(wrong: str) -> None:
    async def scenario(scene: Scene) -> None:
        server = scene.peer_keys("workers").server
        keys = {
            "unknown": stranger(server),
            "for another scheduler": PeerKeys(*_pair(scene.peer_keys("workers")), new_pair()[0]),
            "none": None,
        }[wrong]
        link = Link(Address(scene.worker_address), keys)
        try:
            failure = await asyncio.to_thread(link.inbox.get, timeout=DEADLINE_S)
        except queue.Empty:
            pytest.fail("the worker was not told")
        finally:
            await asyncio.to_thread(link.close)
        assert isinstance(failure, Failure)
        assert isinstance(failure.error, AuthenticationError)

    run(scenario)


def test_a_client_with_keys_does_not_trust_a_service_without() -> None:
    """Whoever listens must prove to have the scheduler's key."""

    async def scenario(scene: Scene) -> None:
        client = AsyncClient(scene.address, keys=scene.keys, connect_timeout=DEADLINE_S)
        with pytest.raises(AuthenticationError):
            await client.connect()

    run(scenario, keys=None, insecure=True)


def test_peers_that_choose_their_own_routing_id_are_refused() -> None:
    async def scenario(scene: Scene) -> None:
        def name_it(dealer: zmq.Socket[bytes]) -> None:
            dealer.set(zmq.ROUTING_ID, b"another's")

        client = scene.client(scene.peer_keys("clients"))
        client.socket.close(0)
        dealer = open_dealer(
            scene.context, Address(scene.address).endpoint("clients"), scene.peer_keys("clients"), name_it
        )
        client.socket = LoopSocket(dealer, client._on_frames)
        await client.hello()
        assert "routing id" in (await client.expect(Goodbye)).reason

    run(scenario)


def test_a_service_without_keys_or_with_useless_ones_does_not_start() -> None:
    async def main() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            cases: tuple[tuple[dict[str, Any], str], ...] = (
                ({"address": "tcp://127.0.0.1:7000", "worker_address": "tcp://127.0.0.1:7001"}, "tandem keys create"),
                ({"address": "tcp://127.0.0.1:7000"}, "--worker-address"),
                ({"address": "ipc:///tmp/tandem-never", "keys": "/k"}, "--keys /k"),
                ({"address": "tcp://127.0.0.1:7000", "worker_address": "ipc:///tmp/n", "keys": "/k"}, "server.key"),
            )
            for options, story in cases:
                with pytest.raises(ConfigurationError, match=story):
                    Service(SchedulerConfig(**options), context)
        finally:
            context.term()

    asyncio.run(main())


def test_a_peer_without_hello_is_unknown() -> None:
    async def scenario(scene: Scene) -> None:
        client = scene.client(scene.peer_keys("clients"))
        await client.submit(1, [1])
        await client.expect(UnknownPeer)

    run(scenario)
