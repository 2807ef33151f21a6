"""What a client keeps of a worker's death, and when it forgets it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tandem.client.requests import OpenRequests
from tandem.client.stream import History, TokenStream
from tandem.protocol.errors import ProtocolError
from tandem.protocol.messages import CLEARING_TOKENS, SUSPICIONS, Suspected
from tandem.protocol.sampling import SamplingParams


def suspected(*rows: tuple[int, int]) -> Suspected:
    tickets, counts = zip(*rows, strict=True)
    return Suspected(epoch=1, ticket=np.array(tickets, np.int64), count=np.array(counts, np.int32))


def opened() -> tuple[OpenRequests, TokenStream]:
    requests = OpenRequests(lambda *_: None, lambda *_: None)
    history = History(np.array([1, 2], np.int32), SamplingParams(temperature=0.0))
    stream = TokenStream(requests.new_tickets(1), history, lambda _: None)
    requests.add(stream)
    return requests, stream


@pytest.mark.parametrize(("tokens", "carried"), [(0, 2), (CLEARING_TOKENS - 1, 2), (CLEARING_TOKENS, 0)])
def test_a_resumption_carries_the_count_until_enough_tokens_have_come(tokens: int, carried: int) -> None:
    async def script() -> None:
        requests, stream = opened()
        stream.push(0, [7] * 5)
        requests.handle(suspected((stream.ticket, SUSPICIONS), (99, 1)))  # the other one has just ended here
        if tokens:
            stream.push(5, [7] * tokens)
        assert stream.history.submission(8).suspicions == carried

    asyncio.run(script())


def test_columns_that_do_not_fit_are_refused() -> None:
    requests, stream = opened()
    with pytest.raises(ProtocolError, match="Suspected"):
        requests.handle(Suspected(epoch=1, ticket=np.array([stream.ticket], np.int64)))
    assert stream.history.suspicions == 0
