"""ZeroMQ's context for an owner that may be forgotten."""

from __future__ import annotations

from typing import Any

import zmq


class Context(zmq.Context[zmq.Socket[bytes]]):
    """Closes its sockets before it ends, though nobody asked it to.

    pyzmq's own knows its sockets by weak references only. Where a client is never closed and is found by the garbage
    collector, these are gone before the context ends, which then waits for sockets that nobody closes: for ever, in
    whatever thread the collector happens to run.
    """

    _opened: list[zmq.Socket[bytes]] | None = None

    def socket(self, *arguments: Any, **options: Any) -> Any:
        """As zmq.Context.socket."""
        made = super().socket(*arguments, **options)
        self._opened = [one for one in self._opened or () if not one.closed]
        self._opened.append(made)
        return made

    def __del__(self) -> None:
        # Not by `unwatch`, which waits for an event on its way to a reader that the collector has closed by then, for
        # ever. The context's end breaks that off.
        for one in self._opened or ():
            one.close(0)
        super().__del__()
