"""The worker's link: an address that cannot work, a directory that is not there yet or not private, and its end."""

from __future__ import annotations

import contextlib
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from tandem.protocol.codec import decode, encode
from tandem.protocol.errors import ConfigurationError, ProtocolError
from tandem.protocol.messages import PROTOCOL_VERSION, Goodbye, Idle, UnknownPeer, WorkerWelcome
from tandem.protocol.transport import Address, open_router
from tandem.worker.link import Failure, Link, Reachable

from support.deadlines import DEADLINE_S


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where a service's directory may be made; short, because a socket's path is limited."""
    base = Path(tempfile.mkdtemp(prefix="tl-"))
    yield base / "run"
    shutil.rmtree(base)


@contextmanager
def router(directory: Path) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = open_router(context, Address(f"ipc://{directory}").endpoint("workers"))
    try:
        yield socket
    finally:
        socket.close(0)
        context.term()


@contextmanager
def linked(directory: Path) -> Iterator[Link]:
    link = Link(Address(f"ipc://{directory}"))
    try:
        yield link
    finally:
        link.close()


def receive(socket: zmq.Socket[bytes]) -> tuple[bytes, Any]:
    assert socket.poll(int(DEADLINE_S * 1000))
    route, data = socket.recv_multipart()
    return route, decode(data, Idle, Goodbye)


def reach(link: Link, scheduler: zmq.Socket[bytes]) -> bytes:
    """Sends until something arrives, again whenever it is said to be possible; returns the link's route."""
    link.send(Goodbye(reason="first"))
    end = time.monotonic() + DEADLINE_S
    while not scheduler.poll(20):
        assert time.monotonic() < end
        with contextlib.suppress(queue.Empty):
            assert isinstance(link.inbox.get_nowait(), Reachable)
            link.send(Goodbye(reason="again"))
    return receive(scheduler)[0]


@pytest.mark.parametrize("url", ["tcp://*:5", "tcp://bad host:5"])
def test_an_address_to_which_nobody_can_connect_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot connect"):
        Link(Address(url))


def test_a_directory_that_others_may_enter_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o755)
    with pytest.raises(ConfigurationError, match="other users may enter it"):
        Link(Address(f"ipc://{directory}"))


def test_a_directory_that_cannot_be_is_refused(directory: Path) -> None:
    directory.write_text("a file")
    with pytest.raises(ConfigurationError, match="not a directory"):
        Link(Address(f"ipc://{directory}"))
    with pytest.raises(ConfigurationError, match="Not a directory"):
        Link(Address(f"ipc://{directory}/below"))


def test_a_directory_that_does_not_exist_is_waited_for(directory: Path) -> None:
    with linked(directory) as link:
        link.send(Goodbye(reason="to nobody"))
        directory.mkdir(mode=0o700)
        with router(directory) as scheduler:
            assert isinstance(link.inbox.get(timeout=DEADLINE_S), Reachable)
            link.send(Goodbye(reason="to somebody"))
            assert receive(scheduler)[1].reason == "to somebody"


def test_a_directory_that_comes_to_be_and_is_not_private_is_a_failure(directory: Path) -> None:
    with linked(directory) as link:
        (directory.parent / "else").mkdir()
        (directory.parent / "else").chmod(0o755)
        (directory.parent / "else").rename(directory)
        failure = link.inbox.get(timeout=DEADLINE_S)
        assert isinstance(failure, Failure)
        assert isinstance(failure.error, ConfigurationError)
        link.send(Goodbye(reason="nobody hears it"))  # whoever ends the process need not know that the thread is over


def test_a_welcome_from_a_directory_that_is_private_no_more_is_a_failure(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    with router(directory) as scheduler, linked(directory) as link:
        route = reach(link, scheduler)
        directory.chmod(0o777)
        scheduler.send_multipart([route, encode(WorkerWelcome(version=PROTOCOL_VERSION, epoch=1, registration=1))])
        failure = link.inbox.get(timeout=DEADLINE_S)
        assert isinstance(failure, Failure)
        assert isinstance(failure.error, ConfigurationError)


def test_what_cannot_be_understood_is_a_failure_and_the_scheduler_can_still_be_told(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    with router(directory) as scheduler, linked(directory) as link:
        route = reach(link, scheduler)
        unexpected = encode(Idle(epoch=1, registration=1, step=1))
        for frames in ([b"\xc1"], [encode(UnknownPeer(epoch=1)), b"more"], [unexpected]):
            scheduler.send_multipart([route, *frames])
            failure = link.inbox.get(timeout=DEADLINE_S)
            assert isinstance(failure, Failure)
            assert isinstance(failure.error, ProtocolError)
        link.send(Goodbye(reason="cannot understand you"))
        assert receive(scheduler)[1].reason == "cannot understand you"


def test_threads_send_at_once_and_nothing_is_lost_by_closing(directory: Path) -> None:
    threads, each = 4, 200
    directory.mkdir(mode=0o700)
    with router(directory) as scheduler, linked(directory) as link:
        reach(link, scheduler)

        def talk(number: int) -> None:
            for step in range(each):
                link.send(Idle(epoch=1, registration=number, step=step))

        talkers = [threading.Thread(target=talk, args=(number,)) for number in range(threads)]
        for talker in talkers:
            talker.start()
        for talker in talkers:
            talker.join(DEADLINE_S)
        link.close()
        link.close()
        link.send(Goodbye(reason="after the end"))
        seen: dict[int, list[int]] = {number: [] for number in range(threads)}
        while sum(map(len, seen.values())) < threads * each:
            message = receive(scheduler)[1]
            seen[message.registration].append(message.step)
        assert all(steps == list(range(each)) for steps in seen.values())
        assert not scheduler.poll(0)
