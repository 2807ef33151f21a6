"""A system for one program: its own scheduler and worker, reachable by this user alone, gone when the program is."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Self

from ..protocol.errors import ConfigurationError
from .config import Options
from .directory import PrivateDirectory
from .relay import Listener
from .signals import uninterrupted
from .status import Ready
from .supervisor import ChildDied, PassThrough
from .system import System


class EmbeddedSystem:
    """Starts a scheduler and its workers as child processes, with sockets in a fresh private directory.

        with EmbeddedSystem({"model": "Qwen/Qwen3-0.6B"}) as system:
            client = Client(system.address)

    Any number may run at once. The options are those of the command line, by field name (`max_num_seqs`); without a
    model, the built-in one. Processes write warnings and errors to the program's stderr through `listener`.
    """

    def __init__(
        self,
        worker_options: Options | None = None,
        scheduler_options: Options | None = None,
        *,
        data_parallel_size: int = 1,
        listener: Listener | None = None,
        on_death: Callable[[ChildDied], None] | None = None,
    ) -> None:
        """Checks the options and starts nothing yet. Raises ConfigurationError."""
        self._worker_options = {"log_level": "warning", **(worker_options or {})}
        self._scheduler_options = {"log_level": "warning", **(scheduler_options or {})}
        for name in ("address", "worker_address"):
            if name in self._scheduler_options:
                raise ConfigurationError(f"{name}: an embedded system chooses its own; use `tandem serve`")
        self._data_parallel_size = data_parallel_size
        self._listener = listener or PassThrough()
        self._on_death = on_death
        self._system: System | None = None
        self._finalizer: weakref.finalize[[System, PrivateDirectory, int], EmbeddedSystem] | None = None
        self._new_system("ipc:///unused")

    def _new_system(self, address: str) -> System:
        return System(
            {**self._scheduler_options, "address": address},
            self._worker_options,
            data_parallel_size=self._data_parallel_size,
            listener=self._listener,
            on_death=self._on_death,
        )

    @property
    def address(self) -> str:
        """Where clients connect. Raises RuntimeError before `start`."""
        if self._system is None:
            raise RuntimeError("the system is not running: call start(), or use it in a with block")
        return self._system.address

    @property
    def death(self) -> ChildDied | None:
        """The process that ended unasked and took the system with it, if one did."""
        return None if self._system is None else self._system.death

    def start(self) -> list[Ready]:
        """Returns when the workers are ready, with what they said of themselves. Raises ChildDied; nothing runs then.

        A program that ends without `stop()` takes the system with it.
        """
        if self._system is not None:
            raise RuntimeError("this system has been started before")
        directory = PrivateDirectory()
        try:
            self._system = system = self._new_system(f"ipc://{directory.path}")
        except BaseException:
            directory.close()
            raise
        self._finalizer = weakref.finalize(self, _end, system, directory, os.getpid())
        try:
            return system.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all processes and removes their sockets. Idempotent."""
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _end(system: System, directory: PrivateDirectory, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child must not take the system away from its parent
    with uninterrupted(redeliver=True):
        system.stop()
        directory.close()
