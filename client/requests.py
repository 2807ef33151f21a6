"""Which open request a message from the scheduler is for, and what it does to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..protocol.errors import InvalidRequest, Overloaded, ProtocolError, RequestFailed, TandemError
from ..protocol.messages import SUSPICIONS, Accepted, Refused, Suspected, Tokens
from .logprobs import told_of_prompts, told_of_tokens
from .stream import TokenStream


class OpenRequests:
    """The requests of one connection that have not ended, by ticket. Messages for others are dropped: those requests
    were cancelled here while the message was on its way."""

    def __init__(
        self,
        broken: Callable[[TokenStream, ProtocolError, bool], None],
        overloaded: Callable[[TokenStream, float], None],
    ) -> None:
        """`broken` is told of a request whose stream has a gap or a repeat, and whether the scheduler still runs it;
        `overloaded` of one that is to go on but that the service has no room for, to be tried again after so many
        seconds. Neither is here any more then."""
        self._broken = broken
        self._overloaded = overloaded
        self._streams: dict[int, TokenStream] = {}
        self._stopped: dict[int, TokenStream] = {}
        """Those that their readers ended, until the scheduler says what they took."""
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._streams)

    def new_tickets(self, count: int) -> int:
        """The first of `count` tickets in a row that were never given before."""
        self._next_ticket += count
        return self._next_ticket - count

    def add(self, stream: TokenStream) -> None:
        self._streams[stream.ticket] = stream

    def remove(self, stream: TokenStream) -> bool:
        """Whether it was open."""
        return self._streams.pop(stream.ticket, None) is not None

    def stop(self, stream: TokenStream) -> bool:
        """Ends a request well whose reader has enough. Whether it was open, and so the scheduler is to be told."""
        stream.stop()
        if self._streams.pop(stream.ticket, None) is None:
            stream.settle(stream.ended)
            return False
        self._stopped[stream.ticket] = stream
        return True

    def take_all(self) -> list[TokenStream]:
        """Removes every request, in the order in which they were sent; of those that were stopped nobody will tell what
        they took."""
        while self._stopped:
            self._stopped.popitem()[1].settle(None)
        streams, self._streams = self._streams, {}
        return list(streams.values())

    def fail_all(self, error: TandemError) -> None:
        """Ends every request here; the scheduler is told nothing."""
        for stream in self.take_all():
            stream.fail(error)

    def handle(self, message: Tokens | Accepted | Refused | Suspected) -> None:
        """Raises ProtocolError if the message makes no sense, and has changed nothing then."""
        match message:
            case Tokens():
                self._on_tokens(message)
            case Accepted():
                stream = self._streams.get(message.ticket)
                if stream is not None:
                    stream.history.epoch, stream.history.number = message.epoch, message.number
            case Refused():
                stream = self._streams.pop(message.ticket, None)
                if stream is None:
                    return
                if stream.resumed and message.code == "overloaded":
                    self._overloaded(stream, message.retry_after_s)
                else:
                    stream.fail(_refusal(message))
            case Suspected():
                self._on_suspected(message)

    def _on_suspected(self, message: Suspected) -> None:
        if len(message.ticket) != len(message.count):
            raise ProtocolError("Suspected: the columns do not fit together")
        for ticket, count in zip(message.ticket.tolist(), message.count.tolist(), strict=True):
            stream = self._streams.get(ticket)
            if stream is not None:
                history = stream.history
                history.suspicions, history.suspected_at = min(max(0, count), SUSPICIONS), len(history.generated)

    def _on_tokens(self, message: Tokens) -> None:
        count, token = message.count, message.token
        rows = len(message.ticket)
        if not (len(message.offset) == len(count) == rows and int(count.sum()) == len(token)):
            raise ProtocolError("Tokens: the columns do not fit together")
        if (rows and int(count.min()) < 1) or (len(token) and int(token.min()) < 0):
            raise ProtocolError("Tokens: a count below 1 or a negative token")
        told = told_of_tokens(message) if len(message.entries) else None
        for ticket, position, positions in told_of_prompts(message):
            stream = self._streams.get(ticket)
            if stream is not None:
                try:
                    stream.push_prompt(position, positions)
                except ProtocolError as error:
                    del self._streams[ticket]
                    self._broken(stream, error, True)
        borders = np.cumsum(count).tolist()
        tokens = token.tolist()
        begin = 0
        for ticket, offset, end in zip(message.ticket.tolist(), message.offset.tolist(), borders, strict=True):
            stream = self._streams.get(ticket)
            if stream is not None:
                try:
                    stream.push(offset, tokens[begin:end], () if told is None else told[begin:end])
                except ProtocolError as error:
                    del self._streams[ticket]
                    self._broken(stream, error, True)
            begin = end
        for ended in message.ended:
            stream = self._streams.pop(ended.ticket, None)
            if stream is None:
                stopped = self._stopped.pop(ended.ticket, None)
                if stopped is not None:
                    stopped.settle(ended)
            else:
                try:
                    stream.end(ended)
                except ProtocolError as error:
                    self._broken(stream, error, False)


def _refusal(refused: Refused) -> TandemError:
    if refused.code == "overloaded":
        return Overloaded(refused.message, retry_after=refused.retry_after_s)
    if refused.code == "internal":
        return RequestFailed(refused.message)
    return InvalidRequest(
        refused.message,
        field=refused.field,
        limit=_number_or_text(refused.limit),
        value=_number_or_text(refused.value),
    )


def _number_or_text(text: str) -> int | float | str | None:
    """Limits and values travel as text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
