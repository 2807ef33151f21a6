"""What clients are told of their tokens, in few messages: a message costs far more than a token in it.

In an interval the first few messages go out at once, so that nothing is held while there is little to do. After them
tokens are held until the interval is over, and then each client gets one message with all of its own; the next interval
holds from its beginning, since there is much to do. A request's first token and a request's end are never held, and
take along what is held for that client.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..protocol.codec import encode, encode_tokens
from ..protocol.messages import Ended, Tokens
from .events import BoolColumn, Deliver, IntColumn, LongColumn
from .logprobs import Logprobs, PromptLogprobs, concatenate, no_logprobs

EAGER_MESSAGES = 32
"""So many of an interval go out at once."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens on their way, one a row; rows of one request are in order."""

    client: LongColumn
    ticket: LongColumn
    offset: IntColumn
    token: IntColumn
    logprobs: Logprobs | None
    """None if nobody asked."""

    def where(self, mask: BoolColumn) -> Rows:
        logprobs = None if self.logprobs is None else self.logprobs.take(np.flatnonzero(mask))
        return Rows(self.client[mask], self.ticket[mask], self.offset[mask], self.token[mask], logprobs)


NOTHING = Rows(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32), None)


class Delivery:
    """Sans-IO: what is to be sent comes back as pairs of a client and the bytes of a message."""

    def __init__(self, epoch: int, interval_s: float) -> None:
        """`interval_s`: how long a token may be held; 0 sends each step's at once."""
        self._epoch = epoch
        self._interval_s = interval_s
        self._held: list[Rows] = []
        self._sent = 0
        """Messages since the interval began."""
        self._until = float("-inf")
        """When the interval is over, or would be."""
        self._busy_until = float("-inf")
        """An interval that begins earlier follows a busy one."""

    def add(self, deliver: Deliver, now: float) -> list[tuple[int, bytes]]:
        """Takes a delivery in; returns what goes out at once, one message a client."""
        ended: dict[int, list[Ended]] = {}
        for client, end in deliver.ended:
            ended.setdefault(client, []).append(end)
        rows = Rows(deliver.client, deliver.ticket, deliver.offset, deliver.token, deliver.logprobs)
        if deliver.prompts:  # never held: their requests' first tokens, which they must precede, are not either
            of_prompts = [(prompt.client, _prompt_message(self._epoch, prompt)) for prompt in deliver.prompts]
            return of_prompts + self._add(rows, ended, now)
        return self._add(rows, ended, now)

    def _add(self, rows: Rows, ended: dict[int, list[Ended]], now: float) -> list[tuple[int, bytes]]:
        if now >= self._until and not self._held:
            busy = now < self._busy_until
            self._until = now + self._interval_s
            self._sent = EAGER_MESSAGES if busy else 0
        if not self._interval_s or (not self._held and self._sent < EAGER_MESSAGES):
            return self._messages(rows, ended)
        urgent = np.unique(np.concatenate([rows.client[rows.offset == 0], np.array(list(ended), np.int64)]))
        if not len(urgent):
            self._held.append(rows)
            return []
        rows = self._take_held(rows)
        goes = np.isin(rows.client, urgent)
        self._held = [rows.where(~goes)] if not goes.all() else []
        return self._messages(rows.where(goes), ended)

    @property
    def due(self) -> float | None:
        """When `flush` is to be called: while something is held."""
        return self._until if self._held else None

    def flush(self) -> list[tuple[int, bytes]]:
        """Everything that is held, one message a client; a new interval begins with the next delivery."""
        self._busy_until = self._until + self._interval_s
        self._until = float("-inf")
        return self._messages(self._take_held(NOTHING), {})

    def _take_held(self, newer: Rows) -> Rows:
        parts = [*self._held, newer]
        self._held = []
        return Rows(
            np.concatenate([part.client for part in parts]),
            np.concatenate([part.ticket for part in parts]),
            np.concatenate([part.offset for part in parts]),
            np.concatenate([part.token for part in parts]),
            None
            if all(part.logprobs is None for part in parts)
            else concatenate([part.logprobs or no_logprobs(len(part.token)) for part in parts]),
        )

    def _messages(self, rows: Rows, ended: dict[int, list[Ended]]) -> list[tuple[int, bytes]]:
        messages = []
        for client, ticket, offset, count, token, logprobs in _by_client(rows):
            ends = ended.pop(client, None)
            if ends is None and logprobs is None:
                messages.append((client, encode_tokens(self._epoch, ticket, offset, count, token)))
            else:
                tokens = Tokens(
                    epoch=self._epoch,
                    ticket=np.frombuffer(ticket, np.int64),
                    offset=np.frombuffer(offset, np.int32),
                    count=np.frombuffer(count, np.int32),
                    token=np.frombuffer(token, np.int32),
                    ended=tuple(ends or ()),
                    **(logprobs or {}),
                )
                messages.append((client, encode(tokens)))
        for client, ends in ended.items():
            messages.append((client, encode(Tokens(epoch=self._epoch, ended=tuple(ends)))))
        self._sent += len(messages)
        return messages


def _prompt_message(epoch: int, prompt: PromptLogprobs) -> bytes:
    return encode(
        Tokens(
            epoch=epoch,
            prompt_ticket=np.array([prompt.ticket], np.int64),
            prompt_position=np.array([prompt.position], np.int32),
            prompt_count=np.array([len(prompt.rank)], np.int32),
            prompt_entries=np.array([prompt.entries], np.int32),
            prompt_rank=prompt.rank,
            prompt_entry_token=prompt.token,
            prompt_entry_logprob=prompt.logprob,
        )
    )


def _by_client(rows: Rows) -> Iterator[tuple[int, bytes, bytes, bytes, bytes, dict[str, Any] | None]]:
    """Each client with its columns of a Tokens message, little-endian: ticket, offset, count, token; and those of
    log-probabilities, if it has any."""
    if not len(rows.client):
        return
    order = np.lexsort((rows.ticket, rows.client))  # stable: a request's tokens stay in order
    client, ticket = rows.client[order], rows.ticket[order]
    new_client = client[1:] != client[:-1]
    starts = np.concatenate([[0], np.flatnonzero(new_client | (ticket[1:] != ticket[:-1])) + 1])
    counts = np.diff(starts, append=len(order)).astype(np.int32)
    first_rows = np.concatenate([[0], np.flatnonzero(new_client) + 1])
    first_requests = np.searchsorted(starts, first_rows)
    names = client[first_rows].tolist()
    row_borders = [*first_rows.tolist(), len(order)]
    borders = [*first_requests.tolist(), len(starts)]
    tickets, offsets = ticket[starts].tobytes(), rows.offset[order][starts].tobytes()
    count, tokens = counts.tobytes(), rows.token[order].tobytes()
    logprobs = None if rows.logprobs is None else rows.logprobs.take(order)
    for i, name in enumerate(names):
        a, b, c, d = borders[i], borders[i + 1], row_borders[i], row_borders[i + 1]
        told = None if logprobs is None else _columns(logprobs.take(np.arange(c, d)))
        yield name, tickets[8 * a : 8 * b], offsets[4 * a : 4 * b], count[4 * a : 4 * b], tokens[4 * c : 4 * d], told


def _columns(logprobs: Logprobs) -> dict[str, Any] | None:
    if not len(logprobs.token):
        return None
    return {
        "entries": logprobs.entries,
        "rank": logprobs.rank,
        "entry_token": logprobs.token,
        "entry_logprob": logprobs.logprob,
    }
