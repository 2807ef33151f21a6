"""`tandem keys`: what it writes, for whose eyes, and what it refuses."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tandem.launch import cli
from tandem.launch.keys import KeyDirectory, new_pair
from tandem.protocol.errors import ConfigurationError
from tandem.protocol.keys import PeerFile, ServerFile, admitted, keys_path, peer_keys, read_key_file, server_keys
from tandem.protocol.transport import Address
from tandem.worker.compiling import cache_folder

TCP = Address("tcp://127.0.0.1:7000")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


def tandem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["tandem", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_create_makes_all_that_one_machine_needs_and_only_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = tandem(monkeypatch, capsys, "keys", "create")
    assert code == 0
    assert sorted(out.split()) == sorted(
        ["made", str(place / "server.key"), "made", str(place / "clients/default.key")]
        + ["made", str(place / "workers/default.key")]
    )
    server = server_keys(place)
    for port in ("clients", "workers"):
        keys = peer_keys(TCP, port, None, insecure=False)
        assert keys is not None
        assert keys.server == server.public
        assert admitted(place, port) == {keys.public: "default"}
        assert keys.secret not in repr(keys)
    for path in [place, *place.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert tandem(monkeypatch, capsys, "keys", "create")[0] == 0
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_a_named_key_lives_in_a_file_of_its_own_that_can_be_carried_elsewhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tandem(monkeypatch, capsys, "keys", "create")
    assert tandem(monkeypatch, capsys, "keys", "create", "client", "alice")[0] == 0
    elsewhere = tmp_path / "alice.key"
    elsewhere.write_bytes((place / "clients/alice.key").read_bytes())
    elsewhere.chmod(0o600)
    keys = peer_keys(TCP, "clients", str(elsewhere), insecure=False)
    assert keys is not None
    assert admitted(place, "clients")[keys.public] == "alice"
    (place / "clients/alice.key").unlink()
    _, out, _ = tandem(monkeypatch, capsys, "keys", "list")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["client", "alice"],
        ["client", "default"],
        ["worker", "default"],
    ]
    assert "(secret not here)" in out.splitlines()[1]
    assert keys.secret not in out
    assert tandem(monkeypatch, capsys, "keys", "show", "client", "alice")[1] == keys.public + "\n"
    assert tandem(monkeypatch, capsys, "keys", "show", "server")[1] == keys.server + "\n"
    with pytest.raises(ConfigurationError, match="a key for clients, and workers need one of their own"):
        peer_keys(TCP, "workers", str(elsewhere), insecure=False)


def test_a_public_key_that_was_made_elsewhere_is_admitted(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    public, _ = new_pair()
    tandem(monkeypatch, capsys, "keys", "create")
    assert tandem(monkeypatch, capsys, "keys", "create", "worker", "gpu1", "--public", public)[0] == 0
    assert admitted(place, "workers")[public] == "gpu1"
    assert not (place / "workers/gpu1.key").exists()
    code, _, err = tandem(monkeypatch, capsys, "keys", "create", "client", "gpu1", "--public", public)
    assert code == 2
    assert "admitted as 'gpu1' of workers already" in err


def test_rotate_and_revoke(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tandem(monkeypatch, capsys, "keys", "create")
    before = admitted(place, "clients")
    assert tandem(monkeypatch, capsys, "keys", "rotate", "client", "default")[0] == 0
    after = admitted(place, "clients")
    assert list(after.values()) == ["default"]
    assert not set(before) & set(after)
    keys = peer_keys(TCP, "clients", None, insecure=False)
    assert keys is not None
    assert keys.public in after

    server = server_keys(place).public
    assert tandem(monkeypatch, capsys, "keys", "rotate", "server")[0] == 0
    assert server_keys(place).public != server
    for port in ("clients", "workers"):
        file = read_key_file(place / port / "default.key", PeerFile)
        assert file.server == server_keys(place).public
    assert admitted(place, "clients") == after

    assert tandem(monkeypatch, capsys, "keys", "revoke", "client", "default")[0] == 0
    assert admitted(place, "clients") == {}
    assert list((place / "clients").iterdir()) == []
    assert admitted(place, "workers") != {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list"], "there is no such directory"),
        (["show", "client", "nobody"], "there is no such directory"),
        (["revoke", "client", "nobody"], "there is no such directory"),
        (["create", "clients", "x"], "'clients' is no role"),
        (["create", "client"], "which client? give a name"),
        (["create", "client", "../x"], "the name '../x' of a key may have"),
        (["create", "client", ".hidden"], "may have letters"),
        (["create", "client", "x" * 65], "64 at most"),
        (["create", "--public", "x" * 40], "--public needs a role and a name"),
        (["create", "client", "x", "--public", "short"], "a key has 40 characters, not 5"),
        (["create", "client", "x", "--public", "~" * 40], "not Z85"),
        (["create", "client", "x", "--public", "é" * 40], "a key has 40 characters"),
        (["rotate", "server", "x"], "the scheduler has one key"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    arguments: list[str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[:2] == ["rotate", "server"]:
        tandem(monkeypatch, capsys, "keys", "create")
    code, _, err = tandem(monkeypatch, capsys, "keys", *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("tandem: ")


@pytest.mark.parametrize("command", ["rotate", "revoke", "show"])
def test_a_name_that_is_not_there(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tandem(monkeypatch, capsys, "keys", "create")
    code, _, err = tandem(monkeypatch, capsys, "keys", command, "client", "nobody")
    assert code == 2
    assert "'nobody'" in err


@pytest.mark.parametrize(
    ("path", "mode", "message"),
    [
        (".", 0o750, "other users may enter it"),
        ("server.key", 0o640, "other users may read it"),
        ("clients/default.pub", 0o666, "other users may read it"),
    ],
)
def test_what_others_can_read_is_not_used(path: str, mode: int, message: str, place: Path) -> None:
    directory = KeyDirectory(place, make=True)
    directory.create_server()
    directory.create("clients", "default")
    (place / path).chmod(mode)
    read = admitted if path.startswith("clients") else lambda place, _: server_keys(place)
    with pytest.raises(ConfigurationError, match=message):
        read(place, "clients")


def test_damaged_key_files_are_refused_without_showing_them(place: Path) -> None:
    directory = KeyDirectory(place, make=True)
    directory.create_server()
    file = directory.create("clients", "default")
    good = file.read_text()
    secret = read_key_file(file, PeerFile).secret
    other = new_pair()[1]
    for damaged in (
        good[:-20],
        good.replace(secret, other),
        good.replace(secret, secret[:-1]),
        good.replace('"clients"', '"masters"'),
        good + "x",
        "",
        "\0" * 100,
        "x" * 5_000,
        "[" * 4_000,
    ):
        file.write_text(damaged)
        with pytest.raises(ConfigurationError, match=r"default\.key") as refused:
            peer_keys(TCP, "clients", None, insecure=False)
        assert secret not in str(refused.value)
        assert other not in str(refused.value)
    with pytest.raises(ConfigurationError, match=r"default\.key"):
        read_key_file(file, ServerFile)


def test_a_key_that_is_a_pipe_is_not_waited_for(place: Path) -> None:
    directory = KeyDirectory(place, make=True)
    directory.create_server()
    os.mkfifo(place / "clients" / "pipe.pub", 0o600)
    with pytest.raises(ConfigurationError, match="not a file"):
        admitted(place, "clients")


def test_without_keys_the_sentence_says_what_to_do(place: Path) -> None:
    with pytest.raises(ConfigurationError, match="tandem keys create.*--insecure"):
        peer_keys(TCP, "clients", None, insecure=False)
    assert peer_keys(TCP, "clients", None, insecure=True) is None
    assert peer_keys(Address("ipc:///run/x"), "clients", None, insecure=False) is None


def test_who_has_no_home_is_asked_for_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TANDEM_KEYS", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # whom nobody knows, as in a container with --user
    with pytest.raises(ConfigurationError, match=r"name their directory in full, with --keys or \$TANDEM_KEYS"):
        keys_path(None)
    with pytest.raises(ConfigurationError, match="name their directory in full"):
        keys_path("~no.such.user/keys")
    with pytest.raises(ConfigurationError, match="set HOME or XDG_CACHE_HOME"):
        cache_folder()
    assert keys_path("/some/keys") == Path("/some/keys")
