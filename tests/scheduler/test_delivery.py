"""Tokens that are held for a while: each client gets all of its own, in order, with each end after its last token."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.protocol.codec import decode, encode, encode_tokens
from tandem.protocol.messages import Ended, Tokens
from tandem.scheduler.delivery import EAGER_MESSAGES, Delivery
from tandem.scheduler.events import Deliver
from tandem.scheduler.logprobs import Logprobs, PromptLogprobs

EPOCH = 1_790_000_000_000_000_000
INTERVAL_S = 0.02


def deliver(rows: list[tuple[int, int, int, int]], ended: list[tuple[int, int]] | None = None) -> Deliver:
    """`rows`: client, ticket, offset, token; `ended`: client, ticket."""
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    return Deliver(
        np.array(columns[0], np.int64),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.int32),
        np.array(columns[3], np.int32),
        tuple((client, Ended(ticket=ticket, reason="stop")) for client, ticket in ended or ()),
    )


class Reader:
    """All clients: puts the messages together and checks them as an SDK does."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.ended: set[tuple[int, int]] = set()
        self.messages = 0

    def read(self, messages: list[tuple[int, bytes]]) -> None:
        assert len({client for client, _ in messages}) == len(messages), "two messages to one client at once"
        for client, data in messages:
            self.messages += 1
            message = decode(data, Tokens)
            assert message.epoch == EPOCH
            assert len(set(message.ticket.tolist())) == len(message.ticket), "a request in two rows"
            begin = 0
            for ticket, offset, count in zip(message.ticket, message.offset, message.count, strict=True):
                key = client, int(ticket)
                assert key not in self.ended
                assert offset == len(self.tokens[key])
                self.tokens[key] += message.token[begin : begin + count].tolist()
                begin += count
            assert begin == len(message.token)
            self.ended |= {(client, end.ticket) for end in message.ended}


STEP = st.tuples(
    st.floats(0.0, 0.03),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), max_size=60, unique=True),
    st.booleans(),
    st.booleans(),
)


@given(steps=st.lists(STEP, max_size=12), interval_s=st.sampled_from([0.0, 0.005, INTERVAL_S]))
def test_every_client_gets_its_tokens_in_order(
    steps: list[tuple[float, list[tuple[int, int]], bool, bool]], interval_s: float
) -> None:
    delivery, reader, now = Delivery(EPOCH, interval_s), Reader(), 0.0
    sent: dict[tuple[int, int], list[int]] = defaultdict(list)
    over: set[tuple[int, int]] = set()
    for passes, requests, one_ends, in_time in steps:
        now += passes
        if in_time and delivery.due is not None and delivery.due <= now:
            reader.read(delivery.flush())
        rows: list[tuple[int, int, int, int]] = []
        for client, ticket in requests:
            if (client, ticket) not in over:
                rows.append((client, ticket, len(sent[client, ticket]), len(rows) + 7))
                sent[client, ticket].append(len(rows) + 6)
        ended = [rows[0][:2]] if one_ends and rows else []
        over.update(ended)
        at_once = delivery.add(deliver(rows, ended), now)
        reader.read(at_once)
        assert reader.ended == over, "an end was held"
        assert all(reader.tokens[row[:2]] for row in rows), "a first token was held"
        if not interval_s:
            assert reader.tokens == sent
            assert delivery.due is None
        elif delivery.due is not None:
            assert delivery.due <= now + interval_s
    reader.read(delivery.flush())
    assert {key: tokens for key, tokens in reader.tokens.items() if tokens} == sent
    assert delivery.due is None
    assert delivery.flush() == []


def test_little_traffic_is_not_held() -> None:
    delivery, reader = Delivery(EPOCH, INTERVAL_S), Reader()
    for step in range(100):
        reader.read(delivery.add(deliver([(1, 0, step, 5), (2, 0, step, 6)]), step * 0.012))
        assert len(reader.tokens[1, 0]) == step + 1
        assert delivery.due is None


def test_much_traffic_goes_in_one_message_an_interval() -> None:
    clients, steps = 256, 100
    delivery, reader = Delivery(EPOCH, INTERVAL_S), Reader()
    for step in range(steps):
        now = step * 0.003
        if delivery.due is not None and delivery.due <= now:
            reader.read(delivery.flush())
        reader.read(delivery.add(deliver([(client, 0, step, 5) for client in range(clients)]), now))
    reader.read(delivery.flush())
    assert all(len(reader.tokens[client, 0]) == steps for client in range(clients))
    intervals = steps * 0.003 / INTERVAL_S
    assert reader.messages <= clients * (intervals + 3)


def test_after_a_busy_time_little_traffic_is_not_held_again() -> None:
    delivery = Delivery(EPOCH, INTERVAL_S)
    many = [(client, 0, 0, 5) for client in range(2 * EAGER_MESSAGES)]
    delivery.add(deliver(many), 0.0)
    assert delivery.add(deliver([(client, 0, 1, 5) for client, *_ in many]), 0.001) == []
    delivery.flush()
    assert delivery.add(deliver([(1, 0, 2, 5)]), 0.030) == []
    assert len(delivery.flush()) == 1
    assert len(delivery.add(deliver([(1, 0, 3, 5)]), 0.090)) == 1


def test_an_end_takes_along_what_is_held_for_its_client_and_nothing_else() -> None:
    delivery, reader = Delivery(EPOCH, INTERVAL_S), Reader()
    for step in range(4):
        rows = [(client, ticket, step, 10 * step + ticket) for client in range(EAGER_MESSAGES + 1) for ticket in (0, 1)]
        reader.read(delivery.add(deliver(rows), 0.0))
    before = reader.messages
    reader.read(delivery.add(deliver([], [(3, 1)]), 0.001))
    assert reader.messages == before + 1
    assert reader.tokens[3, 0] == [0, 10, 20, 30]
    assert reader.tokens[3, 1] == [1, 11, 21, 31]
    assert reader.tokens[4, 0] == [0]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_short_way_to_encode_tokens_gives_the_same_bytes(rows: int) -> None:
    message = Tokens(
        epoch=EPOCH,
        ticket=np.arange(rows, dtype=np.int64),
        offset=np.arange(rows, dtype=np.int32),
        count=np.ones(rows, np.int32),
        token=np.arange(rows, dtype=np.int32),
    )
    columns = [column.tobytes() for column in (message.ticket, message.offset, message.count, message.token)]
    short = encode_tokens(EPOCH, *columns)
    if rows:
        assert short == encode(message)
    decoded = decode(short, Tokens)
    assert decoded.ticket.tolist() == message.ticket.tolist()


@given(data=st.data())
def test_log_probabilities_stay_with_their_tokens(data: st.DataObject) -> None:
    """Of some requests of some clients, held or not, in any mixture; what each token is told follows from the token."""
    delivery, now = Delivery(EPOCH, INTERVAL_S), 0.0
    offsets: dict[tuple[int, int], int] = defaultdict(int)
    got: dict[tuple[int, int], list[int]] = defaultdict(list)
    prompts: list[tuple[int, int]] = []

    def entries_of(ticket: int) -> int:
        return ticket % 3

    def read(messages: list[tuple[int, bytes]]) -> None:
        for client, data in messages:
            message = decode(data, Tokens)
            prompts.extend((client, ticket) for ticket in message.prompt_ticket.tolist())
            ids, values, at, row = message.entry_token.tolist(), message.entry_logprob.tolist(), 0, 0
            for ticket, count in zip(message.ticket.tolist(), message.count.tolist(), strict=True):
                for _ in range(count):
                    token, entries = int(message.token[row]), entries_of(ticket)
                    got[client, ticket].append(token)
                    if len(message.entries):
                        assert message.entries[row] == entries
                        assert message.rank[row] == (token % 7 + 1 if entries else 0)
                    else:
                        assert not entries
                    assert ids[at : at + entries] == [token + i for i in range(entries)]
                    assert values[at : at + entries] == [-float(token + i) for i in range(entries)]
                    at, row = at + entries, row + 1
            assert at == len(ids) == len(values)

    for _ in range(data.draw(st.integers(1, 60))):
        chosen = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), unique=True, max_size=6))
        rows = []
        for key in chosen:
            rows.append((*key, offsets[key], 1000 * key[1] + offsets[key]))
            offsets[key] += 1
        entries = np.array([entries_of(ticket) for _, ticket, _, _ in rows], np.int32)
        tokens = [token + i for (_, ticket, _, token) in rows for i in range(entries_of(ticket))]
        told = Logprobs(
            entries,
            np.array([token % 7 + 1 if n else 0 for (*_, token), n in zip(rows, entries, strict=True)], np.int32),
            np.array(tokens, np.int32),
            -np.array(tokens, np.float32),
        )
        parts = (
            (PromptLogprobs(9, 4, 1, 1, entries[:0], entries[:0], told.logprob[:0]),)
            if data.draw(st.booleans())
            else ()
        )
        before = len(prompts)
        one = deliver(rows)
        one.logprobs = told if entries.any() else None  # type: ignore[misc]
        one.prompts = parts  # type: ignore[misc]
        read(delivery.add(one, now))
        assert prompts[before:] == [(9, 4)] * len(parts)  # at once
        now += data.draw(st.sampled_from([0.0, INTERVAL_S / 7]))
        if delivery.due is not None and now >= delivery.due:
            read(delivery.flush())
    read(delivery.flush())
    assert got == {key: [1000 * key[1] + i for i in range(count)] for key, count in offsets.items()}
