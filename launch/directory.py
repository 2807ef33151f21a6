"""Private directories for the sockets of embedded systems, and clearing away those whose owner was killed.

    BASE/e-k3x9q2.lock   held locked (flock) by the owning process for as long as it lives
    BASE/e-k3x9q2/       0700, the system's ipc address

BASE is default_address()'s parent: this user's runtime directory. Socket paths are limited to 107 bytes, which is why
$TMPDIR is not used.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
from pathlib import Path

from ..protocol.errors import ConfigurationError
from ..protocol.transport import default_address, require_private

PREFIX = "e-"


class PrivateDirectory:
    """A fresh directory of this user's alone; `close()` removes it with all that it holds.

    Creating one also removes the directories of owners that ended without closing theirs. Raises ConfigurationError
    if the base directory cannot be made, or is another's, or others could have written to it.
    """

    def __init__(self, base: Path | None = None) -> None:
        self._base = base or default_address("embedded").directory.parent
        try:
            self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"cannot make the directory {self._base} for sockets: {error.strerror}; "
                "set XDG_RUNTIME_DIR to a directory of your own"
            ) from error
        _make_private(self._base)
        _sweep(self._base)
        while True:
            self.path = self._base / (PREFIX + secrets.token_hex(4))
            lock = _lock(_lock_of(self.path), create=True)
            if lock is not None:
                break
        self._lock: int | None = lock
        self.path.mkdir(mode=0o700)

    def close(self) -> None:
        """Idempotent."""
        if self._lock is not None:
            _remove(self.path, self._lock)
            self._lock = None


def _make_private(base: Path) -> None:
    """A base that was made as the parent of a service's directory has the modes that the user's umask left it."""
    info = os.lstat(base)
    if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022:
        os.chmod(base, 0o700)
    require_private(base)


def _lock_of(directory: Path) -> Path:
    return directory.with_name(directory.name + ".lock")


def _lock(path: Path, *, create: bool) -> int | None:
    """The locked file at `path`; None if it is another's, or was removed while we waited for it."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == os.stat(path).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass  # held by its owner, or removed by whoever held it
    os.close(fd)
    return None


def _remove(directory: Path, lock: int) -> None:
    """Removes the directory first: a lock that can be taken must mean that its directory may go."""
    shutil.rmtree(directory, ignore_errors=True)
    _lock_of(directory).unlink(missing_ok=True)
    os.close(lock)


def _sweep(base: Path) -> None:
    for path in base.glob(f"{PREFIX}*.lock"):
        lock = _lock(path, create=False)
        if lock is not None:
            _remove(path.with_suffix(""), lock)
