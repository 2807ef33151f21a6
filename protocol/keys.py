"""CURVE keys on disk.

    DIRECTORY/server.key          the scheduler's key pair
    DIRECTORY/clients/NAME.pub    the public key of a client that the scheduler admits; likewise workers/NAME.pub
    DIRECTORY/clients/NAME.key    what that client needs: its key pair and the scheduler's public key

The scheduler reads server.key and the .pub files. A client or worker on the same machine reads clients/default.key or
workers/default.key; elsewhere it needs just its own .key file. Nobody but their owner may read any of them.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import zmq
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from .errors import ConfigurationError
from .transport import Address, Port, require_private

KEYS_VARIABLE = "TANDEM_KEYS"
DEFAULT_NAME = "default"
KEY_CHARS = 40
"""Of a key in Z85."""
MAX_KEY_FILE_BYTES = 4_096
SERVER_FILE = "server.key"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a key may be called."""


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """The scheduler's CURVE key pair, Z85."""

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class PeerKeys:
    """A client's or worker's CURVE key pair, and the public key of the scheduler that it will talk to; Z85."""

    public: str
    secret: str = field(repr=False)
    server: str


def public_of(secret: str) -> str:
    """The public key of a pair. Raises ValueError if `secret` is no key."""
    return zmq.curve_public(checked_key(secret).encode()).decode()


def checked_key(key: str) -> str:
    """The key itself. Raises ValueError if it is not 40 characters of Z85."""
    if len(key) != KEY_CHARS or not key.isascii():
        raise ValueError(f"a key has {KEY_CHARS} characters, not {len(key)}")
    try:
        zmq.curve_public(key.encode())  # any 32 bytes will do; what is checked is the text
    except zmq.ZMQError:
        raise ValueError("the key is not Z85") from None
    return key


_Key = Annotated[str, AfterValidator(checked_key)]


class ServerFile(BaseModel):
    """What server.key holds."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    public: _Key
    secret: _Key

    @model_validator(mode="after")
    def _is_a_pair(self) -> ServerFile:
        _require_pair(self.public, self.secret)
        return self


class PeerFile(BaseModel):
    """What NAME.key holds."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    role: Port
    name: str
    public: _Key
    secret: _Key
    server: _Key

    @model_validator(mode="after")
    def _is_a_pair(self) -> PeerFile:
        _require_pair(self.public, self.secret)
        return self


def _require_pair(public: str, secret: str) -> None:
    if public_of(secret) != public:
        raise ValueError("public and secret are not of one pair")


def keys_path(given: str | None) -> Path:
    """Where the keys are: `given`, else $TANDEM_KEYS, else tandem/keys in $XDG_CONFIG_HOME (~/.config). Raises
    ConfigurationError where that depends on a home directory that nobody knows."""
    named = given or os.environ.get(KEYS_VARIABLE)
    config = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        if named:
            return Path(named).expanduser()
        return (Path(config) if os.path.isabs(config) else Path.home() / ".config") / "tandem" / "keys"
    except RuntimeError as error:  # of ~nobody, or of a user without $HOME whom the system does not know either
        raise ConfigurationError(
            f"keys: {error}; name their directory in full, with --keys or ${KEYS_VARIABLE}"
        ) from error


def peer_keys(address: Address, port: Port, keys: str | None, insecure: bool) -> PeerKeys | None:
    """What a client or worker needs to connect to `address`; None where no keys are used. `keys` is a key file or a key
    directory (see keys_path). Raises ConfigurationError if they are missing, wrong, or not private."""
    if not address.needs_keys(insecure, keys):
        return None
    path = keys_path(keys)
    if path.is_dir():
        require_private(path, "keys ")
        path = path / port / f"{DEFAULT_NAME}.key"
    if not path.exists():
        raise ConfigurationError(
            f"address {address.url!r}: TCP needs keys, and there are none at {path}; run `tandem keys create` where "
            "the scheduler runs and name the key file with --keys or $TANDEM_KEYS, or add --insecure to do without "
            "(then anyone who can reach the port may use the service)"
        )
    read = read_key_file(path, PeerFile)
    if read.role != port:
        raise ConfigurationError(f"keys {path}: a key for {read.role}, and {port} need one of their own")
    return PeerKeys(read.public, read.secret, read.server)


def server_keys(directory: Path) -> ServerKeys:
    """The scheduler's key pair. Raises ConfigurationError if it is missing, wrong, or not private."""
    path = directory / SERVER_FILE
    if directory.exists():
        require_private(directory, "keys ")
    if not path.exists():
        raise ConfigurationError(
            f"keys {directory}: there is no {SERVER_FILE}; make keys with `tandem keys create`, or add --insecure to "
            "do without (then anyone who can reach the port may use the service)"
        )
    read = read_key_file(path, ServerFile)
    return ServerKeys(read.public, read.secret)


def admitted(directory: Path, port: Port) -> dict[str, str]:
    """The public keys that may connect to a port, and their names. A file that cannot be used raises
    ConfigurationError; a list that does not exist is empty."""
    found = {}
    for path in sorted((directory / port).glob("*.pub")):
        try:
            found[checked_key(_read_private(path).strip())] = path.stem
        except ValueError as error:
            raise ConfigurationError(f"keys {path}: {error}") from error
    return found


_F = TypeVar("_F", ServerFile, PeerFile)


def read_key_file(path: Path, kind: type[_F]) -> _F:
    """A key file. Raises ConfigurationError, which never tells what the file holds."""
    try:
        return kind.model_validate_json(_read_private(path))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(f"keys {path}: {where + ': ' if where else ''}{first['msg']}") from None


def _read_private(path: Path) -> str:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise ConfigurationError(f"keys {path}: not a file")
            if info.st_uid not in (os.getuid(), 0) or info.st_mode & 0o077:
                raise ConfigurationError(
                    f"keys {path}: other users may read it (owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o}); "
                    "make it yours and run chmod 600 on it"
                )
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"keys {path}: {error.strerror}") from error
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigurationError(f"keys {path}: no key file is over {MAX_KEY_FILE_BYTES} bytes")
    return data.decode(errors="replace")


def _open_at_once(path: str, flags: int) -> int:
    """A pipe under that name would be waited for."""
    return os.open(path, flags | os.O_NONBLOCK)
