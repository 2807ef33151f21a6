"""What the scheduler counts: equal to what was sent and received in runs that do exactly what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.protocol import messages
from tandem.protocol.codec import encode
from tandem.protocol.messages import Cancel, ModelDescription, Refused, Stats, StepPlan, StepResult
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler.core import Core
from tandem.scheduler.events import SendPlan, StepDone, Submitted, WorkerJoined, WorkerLimits, WorkerLost
from tandem.scheduler.metrics import LONG_S, DeviceMeter, Histogram
from tandem.scheduler.policy import Policy

from support.peers import Scene, scene
from support.simulated_worker import SimulatedWorker


def play(script: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        async with scene() as made:
            await script(made)

    asyncio.run(run())


def histogram(found: Stats, name: str) -> messages.Histogram:
    groups = (found.histograms, *(worker.histograms for worker in found.workers))
    (one,) = (one for group in groups for one in group if one.name == name)
    return one


def count(found: Stats, name: str) -> int:
    return int(histogram(found, name).counts.sum())


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50))))
def test_a_histogram_holds_each_observation_below_its_bound(observed: list[tuple[float, int]]) -> None:
    made = Histogram("x", (0.5, 1.0, 10.0))
    for value, times in observed:
        made.observe(value, times)
    told = made.message()
    for i, bound in enumerate(told.bounds):
        assert told.counts[: i + 1].sum() == sum(times for value, times in observed if value <= bound)
    assert told.counts.sum() == sum(times for _, times in observed)
    assert told.total == pytest.approx(sum(value * times for value, times in observed))


def test_counters_tell_what_a_run_sent_and_received() -> None:
    async def script(made: Scene) -> None:
        worker, client = made.worker(), made.client()
        await worker.hello()
        await client.hello()
        await client.expect(messages.Welcome)
        await client.wait(lambda: any(isinstance(one, messages.Welcome) and one.model for one in client.got))
        await client.submit(0, [5, 6, 7], max_tokens=4)
        await client.submit(1, [8, 9], max_tokens=1)
        await client.wait(lambda: client.ended(0) and client.ended(1))
        await client.submit(2, [1] * 70)  # longer than the model's context
        await client.submit(3, [2])
        await client.expect(Refused)
        await client.wait(lambda: client.ended(3))
        found = await client.stats()

        assert found.finished == {"length": 3}
        assert found.refusals == {"invalid": 1}
        assert (found.prompt_tokens, found.generation_tokens, found.clients) == (6, 10, 1)
        assert (found.joined_workers, found.restarted_workers) == (1, 0)
        assert found.uptime_s >= 0
        assert count(found, "time_to_first_token_seconds") == 3
        assert count(found, "inter_token_latency_seconds") == 10 - 3
        for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
            assert count(found, f"{name}_seconds") == 3
        assert count(found, "request_time_per_output_token_seconds") == 2
        assert histogram(found, "request_prompt_tokens").total == 6
        assert histogram(found, "request_generation_tokens").total == 10

        plans = [one for one in worker.got if isinstance(one, StepPlan)]
        (device,) = found.workers
        assert device.steps == len(plans) == count(found, "step_time_seconds") == count(found, "plan_bytes")
        assert count(found, "result_latency_seconds") == device.steps
        assert histogram(found, "plan_bytes").total == sum(len(encode(plan)) for plan in plans)
        # Each token is computed once but for the last of a request, which nothing follows.
        assert histogram(found, "iteration_tokens_total").total == 6 + 10 - 3
        assert count(found, "step_gap_seconds") == sum(not plan.after_idle for plan in plans)
        assert 0 < count(found, "plan_time_seconds") <= device.steps
        assert (device.in_flight, device.lookahead) == (0, 1)

    play(script)


def test_resumptions_cancels_and_refusals_of_samples_are_counted() -> None:
    async def script(made: Scene) -> None:
        worker, client = made.worker(manual=True), made.client()
        await worker.hello()
        await client.hello()
        await client.wait(lambda: any(isinstance(one, messages.Welcome) and one.model for one in client.got))
        sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        resumed = messages.Submit(
            ticket=0, prompt=np.array([5, 6], np.int32), generated=np.array([9], np.int32), sampling=sampling
        )
        await client.send(resumed)
        await client.send(messages.Submit(ticket=9, prompt=np.array([99], np.int32), sampling=sampling, n=3))
        await client.expect(Refused, 3)
        await client.send(Cancel(ticket=0))
        await client.wait(lambda: client.ended(0))
        found = await client.stats()
        assert (found.resumptions, found.finished, found.refusals) == (1, {"abort": 1}, {"invalid": 3})
        assert count(found, "time_to_first_token_seconds") == 0

    play(script)


def test_a_worker_that_comes_back_as_another_process_is_a_restart() -> None:
    async def script(made: Scene) -> None:
        client = made.client()
        await client.hello()
        first = made.worker(1)
        await first.hello()
        await first.wait(lambda: first.welcome)
        await first.send(messages.Goodbye(reason="over"))
        again = made.worker(1)  # the same process, which registers anew
        await again.hello()
        await again.wait(lambda: again.welcome)
        await again.send(messages.Goodbye(reason="over"))
        other = made.worker(2, name="worker-1")
        await other.hello()
        await other.wait(lambda: other.welcome)
        found = await client.stats()
        assert (found.joined_workers, found.restarted_workers) == (3, 1)

    play(script)


LIMITS = WorkerLimits(
    num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, vocab_size=50, lookahead=1
)
MODEL = ModelDescription(name="m", architecture="none", dtype="none", vocab_size=50, max_model_len=64)


class Clocked:
    """A core whose results come one after the other, each a second after the last."""

    def __init__(self) -> None:
        self.core = Core(1, Policy())
        self.now = 0.0
        self.join(1)

    def join(self, number: int) -> None:
        self.number, self.worker = number, SimulatedWorker(64, 4, 8, 64, 50)
        self.handle(WorkerJoined(number, MODEL, LIMITS))

    def handle(self, *events: object) -> None:
        for one in self.core.handle(events, self.now):  # type: ignore[arg-type]
            if isinstance(one, SendPlan):
                self.worker.plans.append(one.plan)

    def submit(self, ticket: int, max_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        nothing, prompt = np.empty(0, np.int32), np.array([5, 6], np.int32)
        self.handle(Submitted(client=1, ticket=ticket, prompt=prompt, generated=nothing, sampling=sampling))

    def steps(self, count: int) -> None:
        for _ in range(count):
            step, tokens = self.worker.compute()
            self.now += 1.0
            self.handle(StepDone(self.number, step, np.array(tokens, np.int32)))


def test_latencies_between_tokens_are_those_of_each_request() -> None:
    made = Clocked()
    made.submit(0, 5)
    made.steps(2)  # tokens at 1, 2
    made.submit(1, 3)
    made.steps(3)  # 0: at 3, 4, 5. 1: two steps are planned already, so its first one ends at 5
    counters = made.core.counters
    assert counters.finished == {"length": 1}
    assert (counters.inter_token_latency.total, sum(counters.inter_token_latency.counts)) == (4, 4)
    made.steps(2)
    counters.enter_pending()
    assert counters.finished == {"length": 2}
    assert (counters.inter_token_latency.total, sum(counters.inter_token_latency.counts)) == (6, 6)
    assert (counters.time_to_first_token.total, counters.decode_time.total) == (1 + 3, 4 + 2)
    assert (counters.queue_time.total, counters.prefill_time.total) == (0 + 1, 1 + 2)
    assert (counters.inference_time.total, counters.latency.total) == (5 + 4, 5 + 5)


def test_the_token_after_a_workers_loss_comes_as_long_after_the_last_one_before() -> None:
    made = Clocked()
    made.submit(0, 6)
    made.steps(3)
    made.handle(WorkerLost(1))
    made.now += 10.0
    made.join(2)
    made.steps(1)
    assert made.core.counters.inter_token_latency.total == 2 + 11
    made.steps(2)
    counters = made.core.counters
    assert (counters.inter_token_latency.total, sum(counters.inter_token_latency.counts)) == (2 + 11 + 2, 5)
    counters.enter_pending()
    assert sum(counters.time_to_first_token.counts) == 1


@given(st.lists(st.one_of(st.sampled_from(LONG_S), st.floats(0.0, 2_000.0), st.just(float("nan"))), max_size=40))
def test_many_observations_at_once_count_as_one_by_one(values: list[float]) -> None:
    one_by_one, at_once = Histogram("a", LONG_S), Histogram("a", LONG_S)
    for value in values:
        if not np.isnan(value):
            one_by_one.observe(value)
    at_once.observe_all(np.array(values, np.float64))
    assert at_once.counts == one_by_one.counts
    assert at_once.total == pytest.approx(one_by_one.total)


def result(busy: int, gap: int, kv_tokens: int = 0) -> StepResult:
    token = np.zeros(2, np.int32)
    return StepResult(epoch=1, registration=1, step=0, token=token, busy_us=busy, gap_us=gap, kv_tokens=kv_tokens)


def test_the_idle_share_is_the_gaps_part_of_the_time_with_work() -> None:
    meter = DeviceMeter(0, 0, 0)
    assert meter.recent_idle_share is None
    meter.result(result(900, 0), 100.0, 99.9, True, 1)
    meter.result(result(900, 200), 101.0, 100.9, False, 1)
    assert (meter.steps, meter.tokens, meter.busy_us, meter.gap_us) == (2, 4, 1_800, 200)
    assert meter.recent_idle_share == pytest.approx(0.1)
    assert sum(meter.step_gap.counts) == 1  # after an idle spell there is no gap to speak of
    for second in range(102, 130):
        meter.result(result(1_000, 0), float(second), second - 0.1, False, 0)
    assert meter.recent_idle_share == 0.0  # what was 20 s ago is forgotten
    assert meter.gap_us == 200
    assert meter.depth.counts[:2] == [28, 2]


def test_the_floor_of_decode_steps_is_what_they_must_read() -> None:
    meter = DeviceMeter(weight_bytes=1_000_000, kv_bytes_per_token=100, memory_bandwidth=1_000_000_000)
    meter.result(result(5_000, 0), 1.0, 0.9, True, 1)  # has chunks
    meter.result(result(1_500, 10, kv_tokens=2_000), 2.0, 1.9, False, 1)
    assert (meter.decode_busy_us, meter.decode_floor_us) == (1_500, 1_200)
    unknown = DeviceMeter(weight_bytes=1_000_000, kv_bytes_per_token=100, memory_bandwidth=0)
    unknown.result(replace(result(1_500, 10), kv_tokens=5), 2.0, 1.9, False, 1)
    assert unknown.decode_floor_us == 0
