"""Private directories of embedded systems: private, gone when closed, and swept when their owner was killed."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.launch.directory import PrivateDirectory
from tandem.protocol.errors import ConfigurationError
from tandem.protocol.transport import ServiceDirectory

OWNER = """
import signal, sys
from pathlib import Path
from tandem.launch.directory import PrivateDirectory
directory = PrivateDirectory(Path(sys.argv[1]))
(directory.path / "clients").touch()
print(directory.path, flush=True)
signal.pause()
"""


def test_private_and_removed_with_all_it_holds(tmp_path: Path) -> None:
    directory = PrivateDirectory(tmp_path / "base")
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    (directory.path / "clients").touch()
    directory.close()
    directory.close()
    assert list((tmp_path / "base").iterdir()) == []


def test_live_directories_are_left_alone_and_dead_ones_swept(tmp_path: Path) -> None:
    base = tmp_path / "base"
    with subprocess.Popen([sys.executable, "-P", "-c", OWNER, base], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        ours = PrivateDirectory(base)
        assert theirs.exists()
        owner.kill()
    second = PrivateDirectory(base)
    assert not theirs.exists()
    assert ours.path.exists()
    ours.close()
    second.close()
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o720])
def test_a_base_that_others_may_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    os.chmod(base, mode)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        PrivateDirectory(base)


def test_a_base_that_a_service_made_before_is_closed_to_others(tmp_path: Path) -> None:
    service = ServiceDirectory(tmp_path / "base" / "default")
    os.chmod(tmp_path / "base", 0o755)  # as a usual umask leaves it
    directory = PrivateDirectory(tmp_path / "base")
    assert stat.S_IMODE((tmp_path / "base").stat().st_mode) == 0o700
    directory.close()
    service.close()


def test_a_base_that_cannot_be_made_is_told() -> None:
    with pytest.raises(ConfigurationError, match="cannot make the directory /proc/nowhere/tandem for sockets"):
        PrivateDirectory(Path("/proc/nowhere/tandem"))
