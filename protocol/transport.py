"""Sockets: where they are, who may open them, and how a loop reads and writes them without ever blocking or losing
silently.

An address names a service. `ipc:///some/dir` is a directory, private to the user (0700), that holds the sockets
`clients` and `workers`; `tcp://host:port` is one socket. ROUTER sockets belong to the scheduler, DEALER sockets to
clients and workers.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import zmq

from .codec import MAX_MESSAGE_BYTES
from .errors import ConfigurationError
from .wires import Wire, unwatch, wire_of

if TYPE_CHECKING:
    from .keys import PeerKeys, ServerKeys

Port = Literal["clients", "workers"]

HEARTBEAT_MS = 2_000
"""ZeroMQ's own ping; a peer that is silent for HEARTBEAT_TIMEOUT_MS is disconnected (and reconnects if it lives)."""
HEARTBEAT_TIMEOUT_MS = 10_000
HANDSHAKE_MS = 5_000
"""A connection that has not introduced itself by then is closed, so that half-open ones do not pile up."""
LINGER_MS = 500
"""How long a closing socket may go on sending what is queued."""
QUEUE_MESSAGES = 4_096
"""High-water mark per peer. Sends never block: a full queue raises, and the caller decides (see Socket.send)."""
_REMEDIES = {
    errno.EMFILE: "; raise the limit on them (ulimit -n)",
    errno.EADDRINUSE: "; another process listens there: stop it or choose another port",
    errno.EADDRNOTAVAIL: "; choose an IP address of this machine, or * for all of them",
    errno.ENODEV: "; choose an IP address of this machine, or * for all of them",
}
MAX_IPC_PATH = 107
"""Longest path of a Unix socket that Linux takes, bytes."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service's sockets are. Raises ConfigurationError for anything but ipc:///directory and
    tcp://host:port."""

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))
        if self.url.startswith("ipc://"):
            if not os.path.isabs(self.url[len("ipc://") :]):
                raise ConfigurationError(
                    f"address {self.url!r}: ipc needs an absolute directory, as in ipc:///run/tandem"
                )
            longest = self.endpoint("workers")[len("ipc://") :]
            if len(os.fsencode(longest)) > MAX_IPC_PATH:
                raise ConfigurationError(
                    f"address {self.url!r}: {longest} is over the {MAX_IPC_PATH} bytes that a socket path may have; "
                    "choose a shorter directory"
                )
        elif self.url.startswith("tcp://"):
            host, _, port = self.url[len("tcp://") :].rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
                raise ConfigurationError(f"address {self.url!r}: expected tcp://host:port with a port of 1 to 65535")
        else:
            raise ConfigurationError(f"address {self.url!r}: expected ipc:///directory or tcp://host:port")

    @property
    def is_ipc(self) -> bool:
        return self.url.startswith("ipc://")

    @property
    def directory(self) -> Path:
        """The directory of an ipc address."""
        return Path(self.url[len("ipc://") :])

    def endpoint(self, port: Port) -> str:
        """What ZeroMQ binds or connects to. A tcp address is one endpoint, whatever the port."""
        return f"{self.url}/{port}" if self.url.startswith("ipc://") else self.url

    def needs_keys(self, insecure: bool, keys: str | None) -> bool:
        """Whether sockets here check keys: TCP, loopback included, unless `insecure` was spelled out. Raises
        ConfigurationError if `keys`, where they are, was given and they would not be used."""
        if keys is not None and (self.is_ipc or insecure):
            why = "the directory guards an ipc address" if self.is_ipc else "--insecure means none"
            raise ConfigurationError(f"address {self.url!r} takes no keys ({why}), but --keys {keys} is given")
        return not self.is_ipc and not insecure

    @property
    def reachable(self) -> Address:
        """Where a process on this machine connects: a host that means all interfaces is the loopback."""
        for everywhere, loopback in (("tcp://*:", "tcp://127.0.0.1:"), ("tcp://0.0.0.0:", "tcp://127.0.0.1:")):
            if self.url.startswith(everywhere):
                return Address(loopback + self.url[len(everywhere) :])
        return self


def default_address(name: str = "default") -> Address:
    """$TANDEM_ADDRESS, or a directory of this user's in $XDG_RUNTIME_DIR (else /tmp) for the service of that name."""
    given = os.environ.get("TANDEM_ADDRESS")
    if given and name == "default":
        return Address(given)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = f"{runtime}/tandem" if runtime and os.path.isabs(runtime) else f"/tmp/tandem-{os.getuid()}"
    return Address(f"ipc://{base}/{name}")


class ServiceDirectory:
    """Holds an ipc address for one scheduler: the directory, private to this user, and a lock in it.

    Raises ConfigurationError if another live scheduler holds it, or if the directory is not this user's alone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._created = [directory / "clients", directory / "workers"]
        self._lock = self._acquire()
        for path in self._created:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                os.close(self._lock)
                raise ConfigurationError(
                    f"address ipc://{directory}: {path} is in the way and cannot be removed: {error.strerror}; move it "
                    "or choose another --address"
                ) from error

    def _acquire(self) -> int:
        """The descriptor of the lock file, locked. A holder that leaves removes file and directory, so either may be
        gone by the time it is ours, and then it is made anew."""
        path = self._directory / "lock"
        while True:
            make_private(self._directory)
            try:
                require_private(self._directory)
                lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConfigurationError(
                    f"address ipc://{self._directory}: cannot write there: {error.strerror}"
                ) from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
            except FileNotFoundError:
                pass  # removed between the two looks
            except BlockingIOError:
                os.close(lock)
                raise ConfigurationError(
                    f"address ipc://{self._directory}: another scheduler is serving there; stop it or choose another "
                    "--address"
                ) from None
            os.close(lock)

    def close(self) -> None:
        """Removes the sockets and the lock, and the directory if it is empty then."""
        for path in (*self._created, self._directory / "lock"):
            path.unlink(missing_ok=True)
        os.close(self._lock)
        try:
            self._directory.rmdir()
        except OSError:
            return  # somebody keeps something of their own there


def make_private(directory: Path, what: str = "address ipc://") -> None:
    """Makes a directory, and those above it that are missing, for this user alone. Raises ConfigurationError, which
    begins with `what` and the directory, if it cannot."""
    try:
        for missing in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{what}{directory}: cannot make the directory: {error.strerror}") from error


def require_private(directory: Path, what: str = "address ipc://") -> None:
    """Raises ConfigurationError, which begins with `what` and the directory, unless it is a real directory of this
    user's that nobody else may enter."""
    info = os.lstat(directory)
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigurationError(f"{what}{directory}: not a directory")
    if info.st_uid != os.getuid():
        raise ConfigurationError(
            f"{what}{directory}: the directory belongs to user {info.st_uid}, not to you ({os.getuid()})"
        )
    if info.st_mode & 0o077:
        raise ConfigurationError(
            f"{what}{directory}: other users may enter it (mode {stat.S_IMODE(info.st_mode):o}); run chmod 700 on it"
        )


def open_router(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    unread_messages: int = QUEUE_MESSAGES,
    keys: ServerKeys | None = None,
    domain: Port = "clients",
    prepare: Callable[[zmq.Socket[bytes]], None] | None = None,
) -> zmq.Socket[bytes]:
    """A bound ROUTER: sends to unknown or full peers raise instead of dropping, and no peer can take over another's
    identity. A peer whose message is larger than `max_message_bytes` is disconnected; one with `unread_messages`
    waiting here must wait.

    With `keys` it speaks CURVE and nothing else, and the context's ZAP handler is asked who may connect to `domain`;
    without a handler nobody may. `prepare` is called with the socket before it is bound.
    """
    socket: zmq.Socket[bytes] | None = None
    try:
        socket = context.socket(zmq.ROUTER)
        _configure(socket)
        _configure_router(socket, max_message_bytes, unread_messages, keys, domain)
        if prepare is not None:
            prepare(socket)
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if socket is not None:
            unwatch(socket)
            socket.close(0)
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise ConfigurationError(f"cannot listen on {endpoint}: {error.strerror}{remedy}") from error
    return socket


def _configure_router(
    socket: zmq.Socket[bytes], max_message_bytes: int, unread_messages: int, keys: ServerKeys | None, domain: Port
) -> None:
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    if keys is not None:
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        socket.set(zmq.ZAP_DOMAIN, domain.encode())
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.set(zmq.MAXMSGSIZE, max_message_bytes)
    socket.set(zmq.RCVHWM, unread_messages)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    socket.set(zmq.ROUTER_HANDOVER, 0)


def open_dealer(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    keys: PeerKeys | None = None,
    prepare: Callable[[zmq.Socket[bytes]], None] | None = None,
) -> zmq.Socket[bytes]:
    """A connecting DEALER; ZeroMQ connects in the background and reconnects by itself. Queues nothing for a peer that
    is not there. With `keys` it speaks CURVE, and only with the scheduler that has `keys.server`. `prepare` is called
    with the socket before it connects."""
    socket = context.socket(zmq.DEALER)
    _configure(socket)
    if keys is not None:
        socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        socket.set(zmq.CURVE_SERVERKEY, keys.server.encode())
    if prepare is not None:
        prepare(socket)
    socket.set(zmq.IMMEDIATE, 1)
    socket.set(zmq.RECONNECT_IVL, 20)
    socket.set(zmq.RECONNECT_IVL_MAX, 80)  # milliseconds; streams wait while their scheduler is started again
    socket.connect(endpoint)
    return socket


def _configure(socket: zmq.Socket[bytes]) -> None:
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.SNDHWM, QUEUE_MESSAGES)
    socket.set(zmq.RCVHWM, QUEUE_MESSAGES)
    socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


class Sent(Enum):
    """What became of a message that was to be sent."""

    QUEUED = "queued"
    FULL = "the peer's queue is full"
    GONE = "nobody of that identity is connected"

    def __bool__(self) -> bool:
        return self is Sent.QUEUED


_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
_LAST = int(zmq.DONTWAIT)


LOCAL = "local"
"""The sender of a message that came over a socket without keys."""


class LoopSocket:
    """A ZeroMQ socket driven by an asyncio loop through callbacks, without a task or future per message.

    `on_message(frames)` is called for each message, in order. All messages are copied in and out, so that no buffer is
    shared with ZeroMQ's threads. ZeroMQ's file descriptor is edge-triggered: any call on the socket may consume the
    edge, which is why a send is always followed by another look at what can be received.
    """

    BURST_S = 0.002
    """Time for which messages are handled before other callbacks of the loop get their turn."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_message: Callable[[list[bytes]], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = loop or asyncio.get_running_loop()
        self._fd = int(socket.get(zmq.FD))
        self._pending: asyncio.Handle | None = None
        self._closed = False
        self._keyed = socket.get(zmq.MECHANISM) == zmq.CURVE and bool(socket.get(zmq.CURVE_SERVER))
        self._first: zmq.Frame | None = None
        self.sender = LOCAL
        """Who sent the message that is being handled: the public key (Z85) that its connection proved to have."""
        self._loop.add_reader(self._fd, self._read)
        self._read_soon()

    def send(self, frames: list[bytes]) -> Sent:
        """Queues a message, or says why it was not queued. Never blocks."""
        if self._closed:
            return Sent.GONE
        try:
            # Not send_multipart, which takes twice as long. Whether there is room is decided by the first frame.
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE)
            self._socket.send(frames[-1], _LAST)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        finally:
            self._read_soon()
        return Sent.QUEUED

    @property
    def has_room(self) -> bool:
        """Whether a message could be queued now: of a DEALER, that somebody is connected whose queue is not full."""
        if self._closed:
            return False
        self._read_soon()
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLOUT)

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Idempotent. Queued messages may go out for up to `linger_ms` more."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            if self._pending is not None:
                self._pending.cancel()
            unwatch(self._socket)
            self._socket.close(linger_ms)

    def _read_soon(self) -> None:
        if self._pending is None and not self._closed:
            self._pending = self._loop.call_soon(self._read)

    def _read(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        until = self._loop.time() + self.BURST_S
        try:
            while not self._closed and self._loop.time() < until:
                try:
                    frames = self._receive_keyed() if self._keyed else self._socket.recv_multipart(flags=zmq.DONTWAIT)
                except zmq.Again:
                    return
                self._on_message(frames)
        except BaseException:
            self._read_soon()  # the edge is consumed: what else is waiting would not be announced again
            raise
        self._read_soon()

    def _receive_keyed(self) -> list[bytes]:
        """Only a Frame, which costs a copy's time, knows who sent it."""
        self._first = self._socket.recv(zmq.DONTWAIT, copy=False)
        self.sender = str(self._first.get("User-Id"))
        frames = [self._first.bytes]
        while self._socket.get(zmq.RCVMORE):
            frames.append(self._socket.recv(zmq.DONTWAIT))
        return frames

    def wire(self) -> Wire | None:
        """The connection that the message being handled came over; None without keys, or if it has ended."""
        return None if self._first is None else wire_of(self._first)
