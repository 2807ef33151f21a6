"""`tandem keys`: makes, shows, replaces and takes away the keys that TCP addresses need (protocol/keys.py says where
they lie). A running scheduler notices within a lease."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer
import zmq

from ..protocol.errors import ConfigurationError
from ..protocol.keys import (
    DEFAULT_NAME,
    NAME,
    SERVER_FILE,
    PeerFile,
    ServerFile,
    admitted,
    checked_key,
    keys_path,
    read_key_file,
    server_keys,
)
from ..protocol.transport import Port, make_private, require_private

ROLES: dict[str, Port] = {"client": "clients", "worker": "workers"}
SERVER = "server"

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Role = Annotated[str | None, typer.Argument(metavar="[client|worker]", show_default=False)]
AnyRole = Annotated[str, typer.Argument(metavar="server|client|worker", show_default=False)]
Name = Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False)]
Directory = Annotated[
    str | None,
    typer.Option("--keys", help="Directory of the keys (default: $TANDEM_KEYS, else ~/.config/tandem/keys)."),
]


class KeyDirectory:
    """A directory of keys, which only its owner may enter."""

    def __init__(self, path: Path, *, make: bool = False) -> None:
        """Raises ConfigurationError if it does not exist (unless `make`) or is not this user's alone."""
        self.path = path
        if make:
            for folder in (path, *(path / port for port in ROLES.values())):
                make_private(folder, "keys ")
        elif not path.is_dir():
            raise ConfigurationError(f"keys {path}: there is no such directory; make keys with `tandem keys create`")
        require_private(path, "keys ")

    def create_server(self) -> bool:
        """Makes the scheduler's key pair unless there is one; returns whether it did."""
        if (self.path / SERVER_FILE).exists():
            server_keys(self.path)
            return False
        self._write_server()
        return True

    def _write_server(self) -> None:
        public, secret = new_pair()
        _write(self.path / SERVER_FILE, ServerFile(public=public, secret=secret).model_dump_json(indent=1) + "\n")

    def create(self, port: Port, name: str, public: str | None = None) -> Path:
        """Admits a new key of that name; returns its key file, or with `public` (a key that was made elsewhere) the
        list's file. Raises ConfigurationError if the name or the key is in use."""
        require_name(name)
        if name in self.names(port).values():
            raise ConfigurationError(f"keys {self.path}: {port} has a key {name!r} already; rotate or revoke it")
        return self._admit(port, name, public)

    def _admit(self, port: Port, name: str, public: str | None) -> Path:
        server = server_keys(self.path).public
        listed, file = self._files(port, name)
        if public is None:
            public, secret = new_pair()
            peer = PeerFile(role=port, name=name, public=public, secret=secret, server=server)
            _write(file, peer.model_dump_json(indent=1) + "\n")
            _write(listed, public + "\n")
            return file
        try:
            checked_key(public)
        except ValueError as error:
            raise ConfigurationError(f"--public: {error}") from error
        for other in ROLES.values():
            if public in (names := self.names(other)):
                raise ConfigurationError(f"--public: this key is admitted as {names[public]!r} of {other} already")
        _write(listed, public + "\n")
        return listed

    def rotate(self, port: Port, name: str, public: str | None = None) -> Path:
        """Replaces a key; the old one is not admitted any more."""
        if name not in self.names(port).values():
            raise ConfigurationError(f"keys {self.path}: {port} has no key {name!r}; see `tandem keys list`")
        return self._admit(port, name, public)

    def rotate_server(self) -> list[Path]:
        """Replaces the scheduler's key pair, and its public key in the key files that are here; returns these."""
        server_keys(self.path)
        self._write_server()
        server = server_keys(self.path).public
        changed = []
        for port in ROLES.values():
            for path in sorted((self.path / port).glob("*.key")):
                file = read_key_file(path, PeerFile).model_copy(update={"server": server})
                _write(path, file.model_dump_json(indent=1) + "\n")
                changed.append(path)
        return changed

    def revoke(self, port: Port, name: str) -> None:
        """Takes a key off the list, and removes its key file if that is here."""
        if name not in self.names(port).values():
            raise ConfigurationError(f"keys {self.path}: {port} has no key {name!r}; see `tandem keys list`")
        for path in self._files(port, name):
            path.unlink(missing_ok=True)

    def names(self, port: Port) -> dict[str, str]:
        """Public keys and their names."""
        return admitted(self.path, port)

    def _files(self, port: Port, name: str) -> tuple[Path, Path]:
        return self.path / port / f"{name}.pub", self.path / port / f"{name}.key"

    def key_file(self, port: Port, name: str) -> Path | None:
        """The key file of that name, if it is here."""
        path = self._files(port, name)[1]
        return path if path.exists() else None


def new_pair() -> tuple[str, str]:
    """Public and secret, Z85."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def require_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f"the name {name!r} of a key may have letters, digits, '.', '_' and '-', 64 at most, and begins with a "
            "letter or digit"
        )


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and never readable by others."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ConfigurationError(f"keys {path}: cannot write: {error.strerror}") from error


def _port(role: str | None) -> Port:
    try:
        return ROLES[role or ""]
    except KeyError:
        raise ConfigurationError(f"{role!r} is no role; keys are for a client or a worker") from None


@app.command()
def create(
    role: Role = None,
    name: Name = None,
    public: Annotated[
        str | None, typer.Option(help="Admit this public key, which was made elsewhere; its secret never comes here.")
    ] = None,
    keys: Directory = None,
) -> None:
    """Make the scheduler's key and one each for a client and a worker on this machine; or, with a role and a name, one
    more key."""
    if role is None and public is not None:
        raise ConfigurationError("--public needs a role and a name: tandem keys create client NAME --public KEY")
    port = None if role is None else _port(role)
    directory = KeyDirectory(keys_path(keys), make=True)
    made = [directory.path / SERVER_FILE] if directory.create_server() else []
    if port is not None:
        if name is None:
            raise ConfigurationError(f"which {role}? give a name: tandem keys create {role} NAME")
        made.append(directory.create(port, name, public))
    else:
        for one in ROLES.values():
            if DEFAULT_NAME not in directory.names(one).values():
                made.append(directory.create(one, DEFAULT_NAME))
    for path in made:
        print(f"made {path}")
    if not made:
        print(f"{directory.path} has its keys already")
    elif port is not None and public is None:
        print(f"Take {made[-1]} to the {role}, by a way that nobody else can read; it names it with --keys.")


@app.command("list")
def list_keys(keys: Directory = None) -> None:
    """Show which keys are admitted."""
    directory = KeyDirectory(keys_path(keys))
    print(f"{'server':8}{'':26}{server_keys(directory.path).public}")
    for role, port in ROLES.items():
        for public, name in sorted(directory.names(port).items(), key=lambda item: item[1]):
            here = "" if directory.key_file(port, name) else "  (secret not here)"
            print(f"{role:8}{name:25} {public}{here}")


@app.command()
def show(role: AnyRole, name: Name = None, keys: Directory = None) -> None:
    """Print one public key, and nothing else."""
    directory = KeyDirectory(keys_path(keys))
    if role == SERVER:
        print(server_keys(directory.path).public)
        return
    for public, found in directory.names(_port(role)).items():
        if found == (name or DEFAULT_NAME):
            print(public)
            return
    raise ConfigurationError(f"keys {directory.path}: no {role} has the key {name or DEFAULT_NAME!r}")


@app.command()
def rotate(
    role: AnyRole,
    name: Name = None,
    public: Annotated[str | None, typer.Option(help="Admit this public key instead, made elsewhere.")] = None,
    keys: Directory = None,
) -> None:
    """Replace a key by a new one; the old one is cut off within a lease. The scheduler's own is used when it is
    restarted, and every peer needs its new public key then."""
    directory = KeyDirectory(keys_path(keys))
    if role == SERVER:
        if name is not None or public is not None:
            raise ConfigurationError("the scheduler has one key, which is made here: tandem keys rotate server")
        changed = directory.rotate_server()
        print(f"made {directory.path / SERVER_FILE}; restart the scheduler to use it")
        for path in changed:
            print(f"changed {path}")
        print("Key files elsewhere need the new public key, or to be replaced by those here.")
        return
    port = _port(role)
    if name is None:
        raise ConfigurationError(f"which {role}? give a name: tandem keys rotate {role} NAME")
    print(f"made {directory.rotate(port, name, public)}")


@app.command()
def revoke(role: AnyRole, name: Name = None, keys: Directory = None) -> None:
    """Admit a key no more; its connections are cut within a lease and its requests cancelled."""
    directory = KeyDirectory(keys_path(keys))
    port = _port(role)
    if name is None:
        raise ConfigurationError(f"which {role}? give a name: tandem keys revoke {role} NAME")
    directory.revoke(port, name)
    print(f"revoked {role} {name}")
