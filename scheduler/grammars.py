"""Grammars whose requests wait until a worker has said that it can follow them.

A hostile grammar costs its worker a second of a process of its own. So a worker is asked about few at a time, and
clients take turns: what one sends delays another's by one grammar, however many it sends.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ..protocol.structured import StructuredOutputsParams
from .events import SendCheck, Submitted

MAX_CHECKS_PER_CLIENT: Final = 256
"""Grammars that may wait to be checked for one client …"""
MAX_CHECKS: Final = 1_024
"""… and for all of them."""
OUTSTANDING: Final = 2
"""Questions that a worker may have at once: the next is there when it has answered one."""
MAX_VERDICTS: Final = 4_096
MAX_VERDICT_BYTES: Final = 32 * 1024 * 1024
"""Of grammars whose verdicts are remembered."""
REFUSED_FOR_S: Final = 60.0
"""A grammar that was found bad is tried again after this time: the reason may have been the worker's."""
MAX_LOSSES: Final = 2
"""A grammar that was being checked when so many workers were lost is refused."""


@dataclass(slots=True, eq=False)
class Held:
    """A submission that waits for a verdict."""

    event: Submitted
    since: float
    check: _Check
    cancelled: set[int] = field(default_factory=set)
    """Tickets of its samples that were cancelled meanwhile."""


@dataclass(slots=True, eq=False)
class _Check:
    number: int
    grammar: StructuredOutputsParams
    client: int
    """Whose turn it takes."""
    worker: int | None = None
    """Who was asked."""
    losses: int = 0
    held: list[Held] = field(default_factory=list)


class Grammars:
    """Sans-IO: questions to workers come back from `dispatch`."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[StructuredOutputsParams, tuple[str, float]] = OrderedDict()
        """What is wrong with a grammar ("" for nothing), and when that was said."""
        self._verdict_bytes = 0
        self._checks: dict[StructuredOutputsParams, _Check] = {}
        self._numbers: dict[int, _Check] = {}
        self._turns: OrderedDict[int, deque[_Check]] = OrderedDict()
        """By client, in the order of their turns: checks that no worker was asked about."""
        self._next_number = 0
        self._of_client: dict[int, list[Held]] = {}
        self.held = 0
        """Requests that wait for a verdict …"""
        self.held_tokens = 0
        """… and their known tokens."""

    # --- figures ---------------------------------------------------------------------------------------------------

    def held_of(self, client: int) -> list[Held]:
        """A client's submissions that wait for a verdict."""
        return self._of_client.get(client, [])

    def _count(self, held: Held, sign: int) -> None:
        event = held.event
        self.held += sign * event.n
        self.held_tokens += sign * event.n * (len(event.prompt) + len(event.generated))

    def _enter(self, held: Held) -> None:
        self._count(held, 1)
        self._of_client.setdefault(held.event.client, []).append(held)

    def _leave(self, held: Held) -> None:
        self._count(held, -1)
        of_client = self._of_client[held.event.client]
        of_client.remove(held)
        if not of_client:
            del self._of_client[held.event.client]

    # --- verdicts --------------------------------------------------------------------------------------------------

    def verdict(self, grammar: StructuredOutputsParams, now: float) -> str | None:
        """What is wrong with it, "" if nothing, None if that is not known."""
        found = self._verdicts.get(grammar)
        if found is None or (found[0] and now - found[1] > REFUSED_FOR_S):
            return None
        self._verdicts.move_to_end(grammar)
        return found[0]

    def _remember(self, grammar: StructuredOutputsParams, error: str, now: float) -> None:
        if self._verdicts.pop(grammar, None) is None:
            self._verdict_bytes += grammar.size
        self._verdicts[grammar] = (error, now)
        while len(self._verdicts) > MAX_VERDICTS or self._verdict_bytes > MAX_VERDICT_BYTES:
            oldest, _ = self._verdicts.popitem(last=False)
            self._verdict_bytes -= oldest.size

    # --- submissions that wait -------------------------------------------------------------------------------------

    def hold(self, event: Submitted, grammar: StructuredOutputsParams, now: float) -> tuple[str, int] | None:
        """Keeps a submission until the verdict; or says which limit that would exceed, which is the client's own or
        that of all."""
        check = self._checks.get(grammar)
        if check is None:
            mine = self._turns.get(event.client, ())
            if len(mine) >= MAX_CHECKS_PER_CLIENT:
                return "grammars of this client", MAX_CHECKS_PER_CLIENT
            if len(self._checks) >= MAX_CHECKS:
                return "grammars", MAX_CHECKS
            check = _Check(self._next_number, grammar, event.client)
            self._next_number += 1
            self._checks[grammar] = self._numbers[check.number] = check
            self._turns.setdefault(event.client, deque()).append(check)
        held = Held(event, now, check)
        check.held.append(held)
        self._enter(held)
        return None

    def settle(self, worker: int, number: int, error: str, now: float) -> list[Held]:
        """Takes a worker's verdict; returns what has waited for it. Ignores an answer that nobody asked for."""
        check = self._numbers.get(number)
        if check is None or check.worker != worker:
            return []
        self._forget(check)
        self._remember(check.grammar, error, now)
        return check.held

    def withdraw(self, client: int, ticket: int) -> Held | None:
        """Notes that a request was cancelled; its submission, if all of it is cancelled now and so waits no more."""
        for held in self.held_of(client):
            event = held.event
            if event.ticket <= ticket < event.ticket + event.n:
                held.cancelled.add(ticket)
                if len(held.cancelled) < event.n:
                    return None
                self._withdraw(held)
                return held
        return None

    def _withdraw(self, held: Held) -> None:
        self._leave(held)
        held.check.held.remove(held)
        self._drop_idle(held.check)

    def forget_client(self, client: int) -> None:
        """Its submissions wait no more."""
        for held in list(self.held_of(client)):
            self._withdraw(held)

    # --- workers ---------------------------------------------------------------------------------------------------

    def dispatch(self, workers: Iterable[int]) -> list[SendCheck]:
        """Questions to those workers that can take one."""
        asked = dict.fromkeys(workers, 0)
        for check in self._numbers.values():
            if check.worker is not None:
                asked[check.worker] = asked.get(check.worker, 0) + 1
        out = []
        while self._turns and asked:
            worker = min(asked, key=asked.__getitem__)
            if asked[worker] >= OUTSTANDING:
                break
            client, checks = self._turns.popitem(last=False)
            check = checks.popleft()
            if checks:
                self._turns[client] = checks  # behind all others
            check.worker = worker
            asked[worker] += 1
            out.append(SendCheck(worker, check.number, check.grammar))
        return out

    def worker_lost(self, worker: int, now: float, *, died: bool) -> list[Held]:
        """Its questions are for others to answer; returns what waited for a grammar that too many died of."""
        refused: list[Held] = []
        for check in [check for check in self._numbers.values() if check.worker == worker]:
            check.worker = None
            check.losses += died
            if check.losses >= MAX_LOSSES:
                self._forget(check)
                self._remember(check.grammar, f"the worker was lost {check.losses} times while it was checked", now)
                refused += check.held
            elif not check.held:
                self._forget(check)
            else:
                self._turns.setdefault(check.client, deque()).appendleft(check)
        return refused

    def _drop_idle(self, check: _Check) -> None:
        """Forgets a check that nobody waits for and no worker was asked about."""
        if not check.held and check.worker is None:
            self._turns[check.client].remove(check)
            if not self._turns[check.client]:
                del self._turns[check.client]
            self._forget(check)

    def _forget(self, check: _Check) -> None:
        for held in check.held:
            self._leave(held)
        del self._checks[check.grammar]
        del self._numbers[check.number]

    # --- integrity -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError unless every check is with one worker or in one client's turns."""
        queued = [check.number for checks in self._turns.values() for check in checks]
        asked = [check.number for check in self._numbers.values() if check.worker is not None]
        if sorted(queued + asked) != sorted(self._numbers) or len(self._checks) != len(self._numbers):
            raise AssertionError(f"checks {sorted(self._numbers)} are queued {queued} or asked {asked}")
        waiting = [held for check in self._numbers.values() for held in check.held]
        if self.held != sum(held.event.n for held in waiting) or len(waiting) != sum(
            map(len, self._of_client.values())
        ):
            raise AssertionError(f"{self.held} requests are counted as held, by {len(waiting)} submissions")
        if not all(self._turns.values()):
            raise AssertionError("a client has a turn and nothing to check")
