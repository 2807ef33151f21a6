"""Log-probabilities through the core: each with its token, those of a prompt once and before its first token, whatever
is preempted; and a worker that tells too little or too much."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.protocol.codec import encode
from tandem.protocol.messages import ModelDescription
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler.core import Core
from tandem.scheduler.events import Deliver, Event, Expel, SendPlan, StepDone, Submitted, WorkerJoined, WorkerLimits
from tandem.scheduler.logprobs import StepLogprobs
from tandem.scheduler.policy import Policy

from support.simulated_worker import SimulatedWorker

VOCAB = 1_000
MAX_LEN = 64


def column(values: list[int]) -> Any:
    return np.array(values, np.int32)


@dataclass
class TellingWorker(SimulatedWorker):
    """Tells of a token t with n values: rank t % 7 + 1, and tokens t, t + 1 … with the values -t, -t - 1 …"""

    entries: dict[int, int] = field(default_factory=dict)
    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By slot: length of the prompt, values of each of its tokens."""

    def step(self) -> tuple[int, list[int], StepLogprobs | None]:
        plan = self.plans[0]
        for slot in plan.leave.tolist():
            self.entries.pop(slot, None)
            self.prompts.pop(slot, None)
        computed = {slot: row.computed for slot, row in self.rows.items()}
        computed |= dict(zip(plan.join_slot.tolist(), plan.join_computed.tolist(), strict=True))
        lengths = dict(zip(plan.join_slot.tolist(), plan.join_prompt_length.tolist(), strict=True))
        for slot, wanted in zip(plan.logprobs_slot.tolist(), plan.logprobs.tolist(), strict=True):
            self.entries[slot] = wanted + 1
        for slot, wanted in zip(plan.prompt_logprobs_slot.tolist(), plan.prompt_logprobs.tolist(), strict=True):
            assert computed[slot] == 0, "the prompt's beginning was taken from the cache"
            self.prompts[slot] = lengths[slot], wanted + 1
        gone = set(plan.leave.tolist())
        decoding = sorted(slot for slot, row in self.rows.items() if row.decoding and slot not in gone)
        step, tokens = self.compute()
        chunks = list(zip(plan.chunk_slot.tolist(), plan.chunk_length.tolist(), strict=True))
        sampled = decoding + [slot for slot, _ in chunks if self.rows[slot].decoding]
        told = [
            (token, self.entries[slot]) for slot, token in zip(sampled, tokens, strict=True) if slot in self.entries
        ]
        of_prompts = []
        for slot, length in chunks:
            if slot in self.prompts:
                prompt_length, wanted = self.prompts[slot]
                begin = computed[slot] + 1
                positions = self.rows[slot].tokens[begin : min(begin + length, prompt_length)]
                of_prompts += [(token, wanted) for token in positions]
        if not told and not of_prompts:
            return step, tokens, None
        columns = [*self._columns(told), *self._columns(of_prompts)]
        return step, tokens, StepLogprobs(*columns)

    @staticmethod
    def _columns(told: list[tuple[int, int]]) -> tuple[Any, Any, Any]:
        entries = [min(token + i, VOCAB - 1) for token, count in told for i in range(count)]
        return column([token % 7 + 1 for token, _ in told]), column(entries), -column(entries).astype(np.float32)


class Bench:
    def __init__(self, num_blocks: int, lookahead: int) -> None:
        self.core = Core(1, Policy(watermark=0.0))
        self.worker = TellingWorker(num_blocks, 4, 8, 16, VOCAB)
        self.prompts: dict[int, list[int]] = {}
        self.sampling: dict[int, SamplingParams] = {}
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.told: dict[int, int] = defaultdict(lambda: 1)
        self.ended: dict[int, str] = {}
        self.expelled: list[str] = []
        model = ModelDescription(name="m", architecture="a", dtype="d", vocab_size=VOCAB, max_model_len=MAX_LEN)
        limits = WorkerLimits(
            num_blocks=num_blocks,
            block_size=4,
            max_num_seqs=8,
            max_num_batched_tokens=16,
            max_model_len=MAX_LEN,
            vocab_size=VOCAB,
            lookahead=lookahead,
        )
        self.handle(WorkerJoined(1, model, limits))

    def handle(self, event: Event) -> None:
        for instruction in self.core.handle([event], 0.0):
            match instruction:
                case SendPlan():
                    self.worker.plans.append(instruction.plan)
                case Expel():
                    self.expelled.append(instruction.reason)
                case Deliver():
                    self._deliver(instruction)
        self.core.check()

    def _deliver(self, deliver: Deliver) -> None:
        for part in deliver.prompts:
            prompt, wanted = self.prompts[part.ticket], self.sampling[part.ticket].prompt_logprobs
            assert part.position == self.told[part.ticket], "a gap or a repeat"
            assert not self.tokens[part.ticket]
            assert part.entries == (wanted or 0) + 1
            tokens = prompt[part.position : part.position + len(part.rank)]
            self.told[part.ticket] += len(part.rank)
            self._check(tokens, [part.entries] * len(tokens), part.rank.tolist(), part.token, part.logprob)
        tokens, tickets = deliver.token.tolist(), deliver.ticket.tolist()
        wants = [self.sampling[ticket].logprobs for ticket in tickets]
        if deliver.logprobs is None:
            assert all(one is None for one in wants)
        else:
            entries = [0 if one is None else one + 1 for one in wants]
            assert deliver.logprobs.entries.tolist() == entries
            ranks = deliver.logprobs.rank.tolist()
            self._check(tokens, entries, ranks, deliver.logprobs.token, deliver.logprobs.logprob)
        for ticket, token in zip(tickets, tokens, strict=True):
            if self.sampling[ticket].prompt_logprobs is not None:
                assert self.told[ticket] == len(self.prompts[ticket])
            self.tokens[ticket].append(token)
        self.ended |= {ended.ticket: ended.reason for _, ended in deliver.ended}

    @staticmethod
    def _check(tokens: list[int], entries: list[int], ranks: list[int], told: Any, values: Any) -> None:
        expected = [
            min(token + i, VOCAB - 1) for token, count in zip(tokens, entries, strict=True) for i in range(count)
        ]
        assert ranks == [token % 7 + 1 if count else 0 for token, count in zip(tokens, entries, strict=True)]
        assert told.tolist() == expected
        assert values.tolist() == [-float(token) for token in expected]

    def submit(self, ticket: int, prompt: list[int], **sampling: Any) -> None:
        self.prompts[ticket] = prompt
        self.sampling[ticket] = SamplingParams(temperature=0.0, **sampling)
        self.handle(
            Submitted(
                client=1,
                ticket=ticket,
                prompt=column(prompt),
                generated=column([]),
                sampling=self.sampling[ticket],
            )
        )

    def step(self) -> None:
        self.handle(StepDone(1, *self._result()))

    def _result(self) -> Any:
        step, tokens, told = self.worker.step()
        return step, column(tokens), 0, (), told


ASKED = st.none() | st.integers(0, 3)


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 25), ASKED, ASKED, st.booleans()), min_size=1, max_size=10
    ),
    num_blocks=st.integers(16, 40),
    lookahead=st.integers(0, 2),
)
def test_each_comes_with_its_token_whatever_is_preempted(
    requests: list[tuple[int, int, int | None, int | None, bool]], num_blocks: int, lookahead: int
) -> None:
    bench = Bench(num_blocks, lookahead)
    for ticket, (length, most, logprobs, prompt_logprobs, late) in enumerate(requests):
        prompt = [7] * (length // 2) + [ticket + i for i in range(length - length // 2)]
        bench.submit(ticket, prompt, max_tokens=most, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        if late and bench.worker.plans:
            bench.step()
    while bench.worker.plans:
        bench.step()
    assert bench.ended == dict.fromkeys(range(len(requests)), "length")
    assert not bench.expelled


@pytest.mark.parametrize(
    "lie", [None, {"rank": column([])}, {"token": column([1, 2, 3])}, {"token": column([1, VOCAB])},
            {"token": column([-1, 2])}, {"logprob": np.zeros(1, np.float32)}, {"prompt_rank": column([1] * 9)}],
    ids=str,
)  # fmt: skip
def test_a_worker_that_tells_something_else_is_expelled(lie: dict[str, Any] | None) -> None:
    bench = Bench(32, 0)
    bench.submit(0, [5, 6, 7], max_tokens=4, logprobs=1, prompt_logprobs=0)
    step, tokens, told = bench.worker.step()
    assert told is not None
    false = None if lie is None else replace(told, **lie)
    bench.handle(StepDone(1, step, column(tokens), 0, (), false))
    assert len(bench.expelled) == 1
    assert "log-probabilities" in bench.expelled[0]
    assert not bench.tokens[0]


def test_what_joining_rows_bring_counts_for_the_size_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.scheduler.introductions.MAX_JOINING_BYTES", 20_000)
    bench = Bench(64, 1)
    for ticket in range(8):
        bench.submit(ticket, [ticket, 1], max_tokens=2, bad_words_token_ids=((5,) * 32,) * 60)
    sizes = []
    while bench.worker.plans:
        sizes.append(len(encode(bench.worker.plans[0])))
        bench.step()
    assert max(sizes) < 40_000
    assert len(bench.ended) == 8
