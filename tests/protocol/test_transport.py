"""Addresses, private directories and sockets that lose nothing silently."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import zmq

from tandem.protocol.errors import ConfigurationError
from tandem.protocol.transport import (
    QUEUE_MESSAGES,
    Address,
    LoopSocket,
    Sent,
    ServiceDirectory,
    default_address,
    open_dealer,
    open_router,
)
from tandem.protocol.wires import HANDSHAKE_EVENTS, monitor

from support.deadlines import DEADLINE_S
from support.peers import until

WATCHED = HANDSHAKE_EVENTS | int(zmq.EVENT_DISCONNECTED)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="tt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


@pytest.mark.parametrize(
    "url",
    ["", "ipc://relative", "tcp://host", "tcp://:1", "tcp://h:0", "tcp://h:65536", "tcp://h:x", "udp://h:1", "/tmp/x"],
)
def test_addresses_that_cannot_be_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="address"):
        Address(url)


def test_a_socket_path_that_linux_cannot_take_is_refused_with_the_limit() -> None:
    with pytest.raises(ConfigurationError, match="107"):
        Address("ipc:///" + "x" * 120)


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:5000", "tcp://[::1]:5000", "tcp://example.org:5000"])
def test_tcp_must_be_asked_for_loopback_included(url: str) -> None:
    assert Address(url).needs_keys(insecure=False, keys=None)
    assert not Address(url).needs_keys(insecure=True, keys=None)


@pytest.mark.parametrize(("url", "insecure"), [("ipc:///run/x", False), ("tcp://127.0.0.1:5000", True)])
def test_keys_that_would_not_be_used_are_refused(url: str, insecure: bool) -> None:
    with pytest.raises(ConfigurationError, match="--keys /k"):
        Address(url).needs_keys(insecure, "/k")


@pytest.mark.parametrize(
    ("bound", "connected"),
    [("tcp://*:7", "tcp://127.0.0.1:7"), ("tcp://0.0.0.0:7", "tcp://127.0.0.1:7"), ("tcp://gpu1:7", "tcp://gpu1:7")],
)
def test_all_interfaces_are_reached_over_the_loopback(bound: str, connected: str) -> None:
    assert Address(bound).reachable.url == connected


def test_the_default_address_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_address().url == "ipc:///run/user/7/tandem/default"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(os.getuid()) in default_address().url
    monkeypatch.setenv("TANDEM_ADDRESS", "ipc:///elsewhere")
    assert default_address().url == "ipc:///elsewhere"


def test_a_service_directory_is_private_held_once_and_leaves_nothing(folder: Path) -> None:
    place = folder / "service"
    held = ServiceDirectory(place)
    assert place.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigurationError, match="another scheduler"):
        ServiceDirectory(place)
    held.close()
    assert not place.exists()
    ServiceDirectory(place).close()


def test_a_directory_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.chmod(0o755)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        ServiceDirectory(folder)
    target = folder / "target"
    target.mkdir(mode=0o700)
    link = folder / "link"
    link.symlink_to(target)
    with pytest.raises(ConfigurationError, match="not a directory"):
        ServiceDirectory(link)


def test_a_socket_that_a_killed_scheduler_left_is_taken_over(
    folder: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    (folder / "clients").write_text("left over")
    held = ServiceDirectory(folder)
    open_router(context, f"ipc://{folder}/clients").close(0)
    held.close()


@pytest.mark.parametrize("name", ["clients", "workers", "lock"])
def test_what_is_in_the_way_of_a_socket_is_named(name: str, folder: Path) -> None:
    (folder / name).mkdir()
    for _ in range(2):  # the first leaves no lock behind
        with pytest.raises(ConfigurationError, match=rf"{folder}.*: "):
            ServiceDirectory(folder)
    (folder / name).rmdir()
    ServiceDirectory(folder).close()


def test_a_taken_port_is_a_clear_error(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    first = context.socket(zmq.ROUTER)
    port = first.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(ConfigurationError, match="cannot listen"):
        open_router(context, f"tcp://127.0.0.1:{port}")
    first.close(0)


def test_a_socket_that_cannot_be_watched_is_closed_and_the_limit_named(folder: Path) -> None:
    def full(_socket: zmq.Socket[bytes]) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(ConfigurationError, match=r"cannot listen on .*: Too many open files; .*\(ulimit -n\)"):
        open_router(context, f"ipc://{folder}/clients", prepare=full)
    context.term()  # which waits for sockets that are open


def test_messages_arrive_whole_though_their_buffer_is_used_again_at_once(
    folder: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    sizes = [0, 1, 65_535, 65_536, 65_537, 1_000_000, 3] * 5

    async def run() -> list[bytes]:
        got: list[bytes] = []
        done = asyncio.Event()

        def on_request(frames: list[bytes]) -> None:
            for index, size in enumerate(sizes):
                buffer = bytearray([index]) * size
                assert router.send([frames[0], cast("bytes", buffer)]) is Sent.QUEUED
                buffer[:] = b"\xff" * size  # while it is in flight

        def on_answer(frames: list[bytes]) -> None:
            got.append(frames[0])
            if len(got) == len(sizes):
                done.set()

        endpoint = f"ipc://{folder}/clients"
        router = LoopSocket(open_router(context, endpoint), on_request)
        dealer = LoopSocket(open_dealer(context, endpoint), on_answer)
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: dealer.send([b"go"]) is Sent.QUEUED)
            await done.wait()
        dealer.close(0)
        router.close(0)
        return got

    assert asyncio.run(run()) == [bytes([index]) * size for index, size in enumerate(sizes)]


def test_a_peer_that_does_not_read_and_one_that_is_gone_are_told_apart(
    folder: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    async def run() -> None:
        hello: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        endpoint = f"ipc://{folder}/clients"
        router = LoopSocket(open_router(context, endpoint), lambda frames: hello.set_result(frames[0]))
        lazy = open_dealer(context, endpoint)
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: bool(lazy.poll(0, zmq.POLLOUT)))
            lazy.send(b"hello")
            route = await hello
            data = bytes(1_000)
            sent = 0
            while (outcome := router.send([route, data])) is Sent.QUEUED:
                sent += 1
            assert outcome is Sent.FULL
            assert sent >= QUEUE_MESSAGES
            received = 0
            while received < sent:  # nothing that was queued is lost
                if lazy.poll(0):
                    assert lazy.recv() == data
                    received += 1
                await asyncio.sleep(0)
            lazy.close(0)
            await until(lambda: router.send([route, data]) is Sent.GONE)
            assert router.send([b"nobody", data]) is Sent.GONE
        router.close(0)
        router.close(0)
        assert router.send([route, data]) is Sent.GONE

    asyncio.run(run())


def test_sockets_whose_handshakes_fail_while_they_are_closed_stop_no_other(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    """ZeroMQ's thread has something to tell of each when nobody listens any more."""
    turned_away = socket.create_server(("127.0.0.1", 0))

    def turn_away() -> None:
        with contextlib.suppress(OSError):  # it was shut down
            while True:
                turned_away.accept()[0].close()

    async def run() -> None:
        readers: list[zmq.Socket[bytes]] = []
        for _ in range(2_000):
            watched = open_dealer(context, endpoint, None, lambda dealer: readers.append(monitor(dealer, WATCHED)))
            dealer, reader = LoopSocket(watched, lambda _: None), readers.pop()
            assert reader.poll(int(DEADLINE_S * 1000)), "the context's thread stands still"
            dealer.close(0)
            reader.close(0)

    endpoint = f"tcp://127.0.0.1:{turned_away.getsockname()[1]}"
    thread = threading.Thread(target=turn_away)
    thread.start()
    try:
        asyncio.run(run())
    finally:
        turned_away.shutdown(socket.SHUT_RDWR)
        thread.join()
        turned_away.close()


def test_missing_parents_are_made_private_too_and_impossible_ones_are_a_clear_error(folder: Path) -> None:
    held = ServiceDirectory(folder / "new" / "service")
    assert (folder / "new").stat().st_mode & 0o777 == 0o700
    held.close()
    (folder / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match="cannot make the directory"):
        ServiceDirectory(folder / "file" / "service")
