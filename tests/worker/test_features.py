"""Rare sampling parameters from the scheduler's columns to the logits that a token is chosen from, against the
reference; and what of them a plan must not say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.protocol.errors import ProtocolError
from tandem.protocol.messages import StepPlan
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler.joining import is_rare, rare_columns
from tandem.scheduler.requests import Request
from tandem.worker.adjustments import MAX_COUNT, Adjustments, stage_joins, table_bytes
from tandem.worker.features import HostFeatures
from tandem.worker.logprobs import tell, unpack
from tandem.worker.sampler import likeliest_by_search, likeliest_by_sort
from tandem.worker.staging import Lane

from support.reference_sampling import adjusted, log_softmax

VOCAB = 70
SLOTS = 4
EOS = 1
TOKENS = st.integers(0, VOCAB - 1)

SAMPLING = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.7]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.3]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
    logit_bias=st.none() | st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 0.5, 100.0]), max_size=4),
    allowed_token_ids=st.none() | st.lists(TOKENS, min_size=1, max_size=40).map(tuple),
    bad_words_token_ids=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(TOKENS, max_size=3).map(tuple),
)


def request_of(sampling: SamplingParams, prompt: list[int], generated: list[int]) -> Request:
    return Request(
        number=0,
        client=0,
        ticket=0,
        known=np.array(prompt + generated, np.int32),
        prompt_length=len(prompt),
        limit=1_000_000,
        sampling=sampling,
        stops=frozenset(),
        now=0.0,
        rare=is_rare(sampling),
        held_back=tuple({EOS, *sampling.stop_token_ids}) if sampling.min_tokens else (),
    )


def joining(rows: dict[int, Request]) -> StepPlan:
    requests = list(rows.values())
    return StepPlan(
        epoch=1,
        registration=1,
        step=0,
        join_slot=np.array(list(rows), np.int32),
        join_prompt_length=np.array([one.prompt_length for one in requests], np.int32),
        join_length=np.array([len(one.known) for one in requests], np.int32),
        join_token=np.concatenate([one.known for one in requests]),
        **rare_columns(list(rows), requests, VOCAB),
    )


class Rig:
    """The host's columns and the device's tables, without a model."""

    def __init__(self) -> None:
        self.host = HostFeatures(SLOTS, VOCAB)
        self.device = Adjustments(SLOTS, VOCAB, torch.device("cpu"))

    def join(self, rows: dict[int, Request]) -> None:
        joins = self.host.join(joining(rows))
        if joins is not None:
            lane = Lane(0, inputs=8, outputs=8, device=torch.device("cpu"))
            staged = stage_joins(joins, lane)
            lane.send()
            self.device.join(staged)

    def step(self, rows: dict[int, Request], logits: torch.Tensor, chosen: list[int] | None = None) -> torch.Tensor:
        slots = np.array(list(rows), np.int32)
        lengths = np.array([len(one.known) for one in rows.values()], np.int32)
        prompts = np.array([one.prompt_length for one in rows.values()], np.int32)
        features = self.host.step(slots, lengths, True, None)
        on_device, position = torch.from_numpy(slots).to(torch.int64), torch.from_numpy(lengths - prompts)
        if features is not None and features.adjusts:
            logits = self.device.apply(features, logits, on_device, position)
        if features is not None and chosen is not None:
            self.device.note(features, on_device, position, torch.tensor(chosen))
        if chosen is not None:
            for one, token in zip(rows.values(), chosen, strict=True):
                one.known = np.append(one.known, np.int32(token))
        return logits


def expected(request: Request, logits: torch.Tensor) -> Any:
    known = request.known.tolist()
    prompt, generated = known[: request.prompt_length], known[request.prompt_length :]
    return adjusted(logits.numpy(), request.sampling, prompt, generated, [EOS])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_logits_are_the_references_step_by_step(data: st.DataObject) -> None:
    """Rows come, generate, and give their slots to others, some in the midst of their output."""
    rig, rows = Rig(), dict[int, Request]()
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    for _ in range(data.draw(st.integers(1, 4))):
        gone = [slot for slot in rows if data.draw(st.booleans())]
        rig.host.leave(np.array(gone, np.int32))
        for slot in gone:
            del rows[slot]
        new = {
            slot: request_of(
                data.draw(st.just(SamplingParams()) | SAMPLING),
                data.draw(st.lists(TOKENS, min_size=1, max_size=5)),
                data.draw(st.lists(st.integers(0, 5), max_size=40)),
            )
            for slot in range(SLOTS)
            if slot not in rows and data.draw(st.booleans())
        }
        if new:
            rig.join(new)
            rows |= new
        for _ in range(data.draw(st.integers(1, 3)) if rows else 0):
            logits = torch.randn(len(rows), VOCAB, generator=rng) * 4
            wanted = [expected(one, row) for one, row in zip(rows.values(), logits, strict=True)]
            chosen = [data.draw(st.integers(0, 5)) for _ in rows]
            got = rig.step(rows, logits, chosen)
            np.testing.assert_allclose(got.numpy(), np.array(wanted), rtol=1e-5, atol=1e-5)


def test_a_step_whose_rows_use_nothing_has_no_features() -> None:
    rig = Rig()
    plain, rare = request_of(SamplingParams(), [5], []), request_of(SamplingParams(min_tokens=2), [5], [])
    rig.join({0: plain, 1: rare})
    column = np.array([0], np.int32)
    assert rig.host.step(column, column + 1, False, None) is None
    assert rig.host.step(column + 1, column + 1, False, None) is not None
    assert rig.host.step(column + 1, column + 3, False, None) is None  # past its min_tokens
    rig.host.leave(column + 1)
    assert not rig.host.any


def test_counts_go_on_where_a_row_joins_again_and_end_somewhere() -> None:
    sampling = SamplingParams(frequency_penalty=0.001)
    rig, rows = Rig(), {0: request_of(sampling, [5], [6] * (MAX_COUNT - 1))}
    rig.join(rows)
    for times in (MAX_COUNT - 1, MAX_COUNT, MAX_COUNT, MAX_COUNT):
        got = rig.step(rows, torch.zeros(1, VOCAB), [6])
        assert got[0, 6].item() == pytest.approx(-0.001 * times)
        assert got[0, 5].item() == 0.0


def test_the_memory_that_is_set_aside_is_what_the_tables_take() -> None:
    tables = vars(Adjustments(SLOTS, VOCAB, torch.device("cpu"))).values()
    assert table_bytes(SLOTS, VOCAB) == sum(one.nbytes for one in tables if isinstance(one, torch.Tensor))


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.lists(st.sampled_from([-50.0, -1.0, -0.0, 0.0, 0.3, 0.31, 2.0, 9.0]), min_size=9, max_size=9),
                    min_size=1, max_size=4),
    top_k=st.none() | st.lists(st.integers(0, 12), min_size=4, max_size=4),
    top_p=st.none() | st.lists(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]), min_size=4, max_size=4),
)  # fmt: skip
def test_counting_finds_what_sorting_finds(
    values: list[list[float]], top_k: list[int] | None, top_p: list[float] | None
) -> None:
    logits = torch.tensor(values)
    logits[0, 3] = float("-inf")
    weights = (torch.softmax(logits, -1) * 2.0**36).to(torch.int64)
    k = None if top_k is None else torch.tensor(top_k[: len(values)], dtype=torch.int32)
    p = None if top_p is None else torch.tensor(top_p[: len(values)])
    by_sort = likeliest_by_sort(logits, weights, k, p)
    assert torch.equal(likeliest_by_search(logits, weights, k, p), by_sort)
    assert (by_sort.sum(-1) > 0).all()


def test_counting_finds_what_sorting_finds_in_a_large_vocabulary() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, 5000).mul(3).round(decimals=1)  # many are equal
    weights = (torch.softmax(logits, -1) * 2.0**36).to(torch.int64)
    k = torch.tensor([0, 1, 50, 4999, 5000, 9000], dtype=torch.int32)
    p = torch.tensor([0.9, 0.5, 0.99, 0.3, 1.0, 0.95])
    for top_k, top_p in ((k, p), (k, None), (None, p)):
        by_sort = likeliest_by_sort(logits, weights, top_k, top_p)
        assert torch.equal(likeliest_by_search(logits, weights, top_k, top_p), by_sort)


@pytest.mark.parametrize("likeliest", [0, 1, 5, 20])
def test_log_probabilities_are_log_softmax_and_equals_come_by_id(likeliest: int) -> None:
    torch.manual_seed(2)
    logits = torch.randn(7, VOCAB).mul(2).round(decimals=1)
    tokens = torch.arange(7) * 9
    entries = np.array([likeliest + 1, 1, likeliest + 1, 1, 1, 1, likeliest + 1], np.int32)
    told = unpack(tell(logits, tokens, likeliest).numpy(), entries)
    begin = 0
    for row in range(7):
        reference = log_softmax(logits[row].numpy())
        ids, values = told.token[begin : begin + entries[row]], told.logprob[begin : begin + entries[row]]
        begin += int(entries[row])
        order = sorted(range(VOCAB), key=lambda token, r=reference: (-np.float32(r[token]), token))  # type: ignore[misc]
        assert ids.tolist() == [int(tokens[row]), *order[: entries[row] - 1]]
        assert values.tolist() == pytest.approx(reference[ids].tolist(), abs=1e-5)
        own = torch.log_softmax(logits[row], -1)
        assert told.rank[row] == int((own >= own[tokens[row]]).sum())
    alone = [tell(logits[row : row + 1], tokens[row : row + 1], likeliest) for row in range(7)]
    assert torch.equal(torch.cat(alone), tell(logits, tokens, likeliest))


def column(*values: int) -> Any:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {"penalty_slot": column(0)},
        {"min_p_slot": column(0)},
        {"allowed_slot": column(0), "allowed_mask": column(1)},
        {"min_tokens_slot": column(0), "min_tokens": column(3)},
        {"min_tokens_slot": column(0), "min_tokens": column(3), "min_tokens_stops": column(1),
         "min_tokens_stop": column(VOCAB)},
        {"bias_slot": column(0), "bias_count": column(2), "bias_token": column(3), "bias": np.ones(1, np.float32)},
        {"bias_slot": column(0), "bias_count": column(1), "bias_token": column(-1), "bias": np.ones(1, np.float32)},
        {"bad_words_slot": column(0), "bad_words_length": column(2), "bad_words_token": column(3)},
        {"bad_words_slot": column(0), "bad_words_length": column(0), "bad_words_token": column()},
        {"bad_words_slot": column(0), "bad_words_length": column(33), "bad_words_token": column(*[3] * 33)},
        {"bad_words_slot": column(*[0] * 257), "bad_words_length": column(*[1] * 257),
         "bad_words_token": column(*[3] * 257)},
        {"bad_words_slot": column(0), "bad_words_length": column(1), "bad_words_token": column(VOCAB)},
        {"logprobs_slot": column(0), "logprobs": column(21)},
        {"logprobs_slot": column(0), "logprobs": column(-1)},
        {"logprobs_slot": column(1), "logprobs": column(1)},
        {"logprobs_slot": column(0, 0), "logprobs": column(1, 1)},
        {"prompt_logprobs_slot": column(0), "prompt_logprobs": column(21)},
    ],
)  # fmt: skip
def test_columns_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    plan = joining({0: request_of(SamplingParams(), [5, 6], [])})
    HostFeatures(SLOTS, VOCAB).join(plan)
    with pytest.raises(ProtocolError, match="plan 0"):
        HostFeatures(SLOTS, VOCAB).join(replace(plan, **changes))
