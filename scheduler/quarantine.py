"""The poison rule: what a request has to do with the deaths of workers, and how it is found out.

A worker's death suspects every request in its launched steps. A request that is suspected twice without CLEARING_TOKENS
tokens between runs alone, on a worker with nothing else, until it has got so many more. If a worker dies then, it was
that request, which fails.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..protocol.messages import CLEARING_TOKENS, SUSPICIONS
from .queue import WaitingQueue
from .replica import Replica
from .requests import Request


def suspect(request: Request, known: int) -> None:
    """Counts a death while the request, which has `known` tokens now, was in a launched step."""
    if known - request.suspected_at >= CLEARING_TOKENS:
        request.suspicions = 0
    request.suspicions = min(request.suspicions + 1, SUSPICIONS)
    request.suspected_at = known


def must_be_alone(request: Request) -> bool:
    return request.suspicions >= SUSPICIONS


def is_cleared(request: Request, known: int) -> bool:
    """Whether a request that was given a worker of its own needs it no more, having `known` tokens now."""
    return not must_be_alone(request) or known - request.suspected_at >= CLEARING_TOKENS


class Quarantine:
    """Requests that wait to run alone, and the workers where they do.

    Workers that run nothing are used as they are. If there is none, one is taken from the others, whose requests wait
    meanwhile: one at a time, and for at most half of the time, so that neither side starves.
    """

    def __init__(self, aging_s: float) -> None:
        self.waiting = WaitingQueue(aging_s)
        self.active = False
        """Somebody waits or runs alone: `admit` has something to do."""
        self._others_until = float("-inf")
        """No worker is taken from the others before."""

    def push(self, request: Request) -> None:
        self.waiting.push(request)
        self.active = True

    def admit(
        self,
        replicas: Collection[Replica],
        now: float,
        place: Callable[[Request, Replica], None],
        clear: Callable[[Replica], None],
    ) -> None:
        """Ends the turns of requests that are over or cleared, and gives others theirs. `place` takes a request out of
        `waiting` and gives it a place on an empty worker; `clear` sends a worker's requests back to the queue."""
        for replica in replicas:
            if replica.alone is not None:
                self._look_after(replica, now)
        while (request := self.waiting.head()) is not None:
            chosen = self._reserve(replicas, now, clear)
            if chosen is None or chosen.in_flight:
                return  # what is still in its launched steps must not be judged together with the request
            chosen.reserved = False
            place(request, chosen)
            if chosen.rows.owned:
                chosen.alone, chosen.alone_since = request, now
        for replica in replicas:
            replica.reserved = False  # whom it was for has ended meanwhile
        self.active = any(replica.alone is not None for replica in replicas)

    def _look_after(self, replica: Replica, now: float) -> None:
        request = replica.alone
        if request is None:
            return
        slot = replica.slot_of(request)
        if slot is not None and not is_cleared(request, int(replica.rows.known[slot])):
            return
        if slot is not None and must_be_alone(request):
            request.suspicions = 0
        replica.alone = None
        self._others_until = now + (now - replica.alone_since)

    def _reserve(self, replicas: Collection[Replica], now: float, clear: Callable[[Replica], None]) -> Replica | None:
        """The worker for the next turn, which nobody joins any more; None if none is to be had now."""
        free = [one for one in replicas if one.alone is None and not one.draining]
        for replica in free:
            if replica.reserved or not replica.rows.owned:
                replica.reserved = True
                return replica
        if not free or len(free) < len([one for one in replicas if not one.draining]) or now < self._others_until:
            return None
        replica = min(free, key=lambda one: one.rows.owned)
        clear(replica)
        replica.reserved = True
        return replica
