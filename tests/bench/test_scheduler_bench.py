"""The scheduler's benchmarks run and count right. Nothing here asserts a time that was measured."""

import json
import random
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from rich.console import Console

from tandem.bench.scheduler.clients import Requests, Settings, read_tokens
from tandem.bench.scheduler.core import judge
from tandem.bench.scheduler.device import SimulatedDevice
from tandem.bench.scheduler.harness import VirtualClock, build_core, describe_model
from tandem.bench.scheduler.report import holds, show_knee
from tandem.bench.scheduler.setup import Setup, spread
from tandem.bench.scheduler.step_time import StepTime
from tandem.bench.scheduler.timeline import Timeline
from tandem.bench.scheduler.workers import Settings as WorkerSettings
from tandem.bench.scheduler.workers import Worker
from tandem.protocol.codec import encode
from tandem.protocol.errors import ProtocolError
from tandem.protocol.messages import (
    NO_INTS,
    PROTOCOL_VERSION,
    Ended,
    Goodbye,
    Ping,
    StepPlan,
    Tokens,
    WorkerWelcome,
)
from tandem.protocol.sampling import SamplingParams
from tandem.scheduler.events import (
    Cancelled,
    Event,
    Instruction,
    SendPlan,
    StepDone,
    Submitted,
    WorkerJoined,
    WorkerLimits,
)

from support.deadlines import DEADLINE_S
from support.simulated_worker import SimulatedWorker


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "tandem.bench.scheduler", command, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


# --- the device ------------------------------------------------------------------------------------------------------


def limits(lookahead: int, blocks: int = 24, slots: int = 6) -> WorkerLimits:
    return WorkerLimits(
        num_blocks=blocks,
        block_size=4,
        max_num_seqs=slots,
        max_num_batched_tokens=16,
        max_model_len=64,
        vocab_size=1_000,
        lookahead=lookahead,
    )


class TwoDevices:
    """Gives each plan to the test's worker, which keeps tokens and follows the protocol to the letter, and to the
    benchmark's, which only counts; both must sample for the same slots."""

    def __init__(self, within: WorkerLimits) -> None:
        self.exact = SimulatedWorker(within.num_blocks, within.block_size, within.max_num_seqs, 16, 1_000)
        self.counting = SimulatedDevice(within.max_num_seqs)

    def compute(self, plan: StepPlan) -> list[int]:
        self.exact.plans.append(plan)
        before = {slot: row.computed for slot, row in self.exact.rows.items() if row.decoding}
        _, tokens = self.exact.compute()
        left = set(plan.leave.tolist())
        decoded = sorted(slot for slot in before if slot not in left)
        completed = [slot for slot in plan.chunk_slot.tolist() if self.exact.rows[slot].decoding]
        done = self.counting.execute(plan)
        assert done.sampled == len(tokens) == len(decoded) + len(completed)
        assert done.decode_rows == len(decoded)
        assert done.completed.tolist() == completed
        assert done.context_tokens == sum(before[slot] for slot in decoded)
        assert done.prefill_tokens == int(plan.chunk_length.sum())
        assert self.counting.decoding_slots().tolist() == sorted(
            slot for slot, row in self.exact.rows.items() if row.decoding
        )
        return tokens


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_device_follows_plans_as_a_worker_does(lookahead: int, seed: int) -> None:
    """Random requests, ends, cancels and preemptions of a real core with few blocks."""
    rng = random.Random(seed)
    within = limits(lookahead)
    core = build_core(prefix_caching=bool(seed % 2))
    devices = TwoDevices(within)
    plans: deque[StepPlan] = deque()
    sent = 0

    def handle(*events: Event) -> None:
        out: list[Instruction] = core.handle(events, now=0.01 * sent)
        plans.extend(one.plan for one in out if isinstance(one, SendPlan))

    handle(WorkerJoined(1, describe_model(64), within))
    for turn in range(600):
        if turn < 500 and rng.random() < 0.3:
            handle(submission(sent, rng))
            sent += 1
        if sent and rng.random() < 0.05:
            handle(Cancelled(0, rng.randrange(sent)))
        if plans:
            plan = plans.popleft()
            handle(StepDone(1, plan.step, np.array(devices.compute(plan), np.int32)))
    assert sent > 100
    assert core.counters.preemptions > 0, "the blocks were too many to test preemption"
    core.check()


def submission(ticket: int, rng: random.Random) -> Submitted:
    prompt = [rng.randrange(4, 9) for _ in range(rng.randint(1, 40))]
    return Submitted(
        client=0,
        ticket=ticket,
        prompt=np.array(prompt, np.int32),
        generated=NO_INTS,
        sampling=SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 24)),
    )


def plan(step: int, **columns: list[int]) -> StepPlan:
    arrays: dict[str, Any] = {name: np.array(column, np.int32) for name, column in columns.items()}
    return StepPlan(epoch=1, registration=1, step=step, **arrays)


JOIN = {"join_slot": [0], "join_length": [5], "join_computed": [0], "chunk_slot": [0], "chunk_length": [3]}


@pytest.mark.parametrize(
    ("wrong", "story"),
    [
        (plan(2), "plan 2 came where 1 was due"),
        (plan(1, leave=[1]), "leave that nobody owns"),
        (plan(1, leave=[0, 0]), "leave that nobody owns"),
        (plan(1, **JOIN), "join that are owned"),
        (plan(1, grow_slot=[2], grow_block=[0]), "grows a slot that nobody owns"),
        (plan(1, chunk_slot=[0], chunk_length=[3]), "go past what is known"),
        (plan(1, chunk_slot=[1], chunk_length=[1]), "not in prefill"),
    ],
)
def test_device_refuses_a_plan_that_does_not_follow(wrong: StepPlan, story: str) -> None:
    device = SimulatedDevice(4)
    assert device.execute(plan(0, **JOIN)).sampled == 0
    with pytest.raises(ProtocolError, match=story):
        device.execute(wrong)


# --- time ------------------------------------------------------------------------------------------------------------


def test_steps_follow_each_other_on_the_device() -> None:
    timeline = Timeline(lookahead=1)
    assert timeline.plan_arrived(0, at=10.0, seconds=1.0, after_idle=True) == (11.0, 0.0)
    assert timeline.plan_arrived(1, at=10.25, seconds=1.0, after_idle=False) == (12.0, 0.0)
    timeline.result_sent(0, due=11.0, at=11.0)
    end, waited = timeline.plan_arrived(2, at=12.5, seconds=1.0, after_idle=False)
    assert (end, waited) == (13.5, 0.5)
    report = timeline.report()
    assert report["slack_us"] == [750_000.0, -500_000.0]
    assert (report["steps"], report["waited"], report["busy_s"], report["waited_s"]) == (2, 1, 3.0, 0.5)


def test_a_result_that_went_out_late_is_not_charged_to_the_scheduler() -> None:
    timeline = Timeline(lookahead=1)
    timeline.plan_arrived(0, at=10.0, seconds=1.0, after_idle=True)
    timeline.plan_arrived(1, at=10.0, seconds=1.0, after_idle=False)
    timeline.result_sent(0, due=11.0, at=11.75)  # the process slept; the answer takes half a second
    end, waited = timeline.plan_arrived(2, at=12.25, seconds=1.0, after_idle=False)
    assert (end, waited) == (13.0, 0.0)
    report = timeline.report()
    assert (report["waited"], report["waited_as_seen"]) == (0, 1)
    assert report["late_us"] == [750_000.0]


def test_a_device_stands_still_while_its_process_sleeps() -> None:
    timeline = Timeline(lookahead=1)
    timeline.plan_arrived(0, at=10.0, seconds=1.0, after_idle=True)
    timeline.plan_arrived(1, at=10.0, seconds=1.0, after_idle=False)
    timeline.stand_still(5.0)
    timeline.result_sent(0, due=16.0, at=16.0)
    assert timeline.plan_arrived(2, at=16.5, seconds=1.0, after_idle=False) == (18.0, 0.0)
    assert timeline.report()["stood_still_s"] == 5.0


def test_a_device_that_was_idle_did_not_wait() -> None:
    timeline = Timeline(lookahead=1)
    timeline.plan_arrived(0, at=10.0, seconds=1.0, after_idle=True)
    assert timeline.plan_arrived(1, at=20.0, seconds=1.0, after_idle=True) == (21.0, 0.0)
    assert timeline.report()["steps"] == 0


def test_a_simulated_worker_takes_what_the_scheduler_sends_to_one_that_was_silent(tmp_path: Path) -> None:
    settings = WorkerSettings(
        endpoint=f"ipc://{tmp_path}/workers",
        first=0,
        workers=1,
        rows=4,
        num_blocks=64,
        max_num_batched_tokens=64,
        max_model_len=64,
        lookahead=1,
        step_time=StepTime(),
        high_priority=False,
    )
    welcome = WorkerWelcome(version=PROTOCOL_VERSION, epoch=1, registration=2)
    with zmq.Context[zmq.Socket[bytes]]() as context:
        worker = Worker(settings, 0, context)
        try:
            for message in (Ping(), welcome, Ping()):
                worker.handle(encode(message), 0.0)
            assert worker.welcome is not None
            assert worker.welcome.registration == 2
            with pytest.raises(RuntimeError, match="simulated-0: the scheduler says Goodbye"):
                worker.handle(encode(Goodbye(reason="expelled")), 0.0)
        finally:
            worker.socket.close(0)


def test_step_times_are_near_those_that_were_measured() -> None:
    measured = {(32, 768): 5.95e-3, (32, 4_096): 9.21e-3}
    for (rows, context), seconds in measured.items():
        assert StepTime().seconds(rows, rows * context, 0) == pytest.approx(seconds, rel=0.05)
    assert StepTime.constant(0.012).seconds(256, 10**6, 4_096) == 0.012


def test_virtual_time_calls_back_in_order_and_not_what_was_cancelled() -> None:
    clock, called = VirtualClock(), list[str]()
    clock.call_later(0.02, lambda: called.append("second"))
    clock.call_later(0.01, lambda: called.append("first"))
    clock.call_later(0.01, lambda: called.append("never")).cancel()
    clock.run_due()
    assert called == []
    clock.now = 0.02
    clock.run_due()
    assert called == ["first", "second"]


# --- clients ---------------------------------------------------------------------------------------------------------

SETTINGS = Settings(endpoint="", open_requests=(2, 1), prompt_tokens=4, least_output=3, most_output=3, seed=0)


def fields(message: Tokens) -> dict[str, Any]:
    """As the clients unpack it."""
    name, values = msgpack.unpackb(encode(message))
    assert name == "Tokens"
    return dict(values)


def tokens(ticket: list[int], count: list[int], *ended: Ended) -> dict[str, Any]:
    return fields(
        Tokens(
            epoch=1,
            ticket=np.array(ticket, np.int64),
            offset=np.zeros(len(ticket), np.int32),
            count=np.array(count, np.int32),
            token=np.zeros(sum(count), np.int32),
            ended=ended,
        )
    )


def test_clients_count_tokens_gaps_and_first_tokens() -> None:
    requests = Requests(SETTINGS)
    for place in (0, 1, 2):
        requests.submit(place, now=1.0)
    assert requests.take(read_tokens([(0, tokens([0, 1], [1, 1])), (1, tokens([0], [2]))]), now=1.5) == []
    ended = Ended(ticket=0, reason="length", prompt_tokens=4, completion_tokens=3)
    assert requests.take(read_tokens([(0, tokens([0, 0], [1, 1], ended))]), now=1.75) == [0]
    assert (requests.tokens, requests.finished) == (6, 1)
    assert requests.first_token_ms == pytest.approx([500.0] * 3)
    assert requests.gaps.sum() == 1, "tokens that come together have no gap between them"
    assert requests.gaps[2_500] == 1
    requests.submit(0, now=2.0)
    assert requests.next_ticket.tolist() == [4, 3, 2, 1], "the last place is nobody's: that client has one request"
    assert requests.take(read_tokens([(0, tokens([2], [3]))]), now=3.0) == []
    assert requests.first_token_ms[-1] == pytest.approx(1_000.0)


@pytest.mark.parametrize(
    ("came", "ended"),
    [
        (3, Ended(ticket=0, reason="stop", completion_tokens=3)),
        (2, Ended(ticket=0, reason="length", completion_tokens=3)),
        (4, Ended(ticket=0, reason="length", completion_tokens=3)),
    ],
)
def test_clients_notice_a_request_that_did_not_bring_what_it_should(came: int, ended: Ended) -> None:
    requests = Requests(SETTINGS)
    requests.submit(0, now=1.0)
    with pytest.raises(RuntimeError, match="then the request ended"):
        requests.take(read_tokens([(0, tokens([0], [came], ended))]), now=2.0)


def test_requests_and_workers_are_spread_over_processes() -> None:
    assert spread(10, 4) == [3, 3, 2, 2]
    assert spread(1, 3) == [1]
    setup = Setup(
        rows=100,
        step_s=None,
        clients=16,
        seconds=1.0,
        warm_up_s=0.0,
        prompt_tokens=8,
        least_output=1,
        most_output=8,
        lookahead=1,
        worker_processes=2,
        client_processes=3,
        high_priority=False,
    )
    workers = setup.worker_settings("", 3)
    assert [(one.first, one.workers) for one in workers] == [(0, 2), (2, 1)]
    clients = setup.client_settings("", 3)
    assert [len(one.open_requests) for one in clients] == [6, 5, 5]
    assert sum(sum(one.open_requests) for one in clients) == 309, "all rows and three in a hundred more"


# --- the commands ----------------------------------------------------------------------------------------------------


def test_core_benchmark_writes_every_case(tmp_path: Path) -> None:
    out = tmp_path / "core.json"
    done = run("core", "--size", "8", "--size", "64", "--steps", "60", "--clients", "4", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    cases = {(case["load"], case["running"]): case for case in report["cases"]}
    assert set(cases) == {(load, size) for load in ("steady", "churn", "prefill", "prefix") for size in (8, 64)}
    for case in cases.values():
        assert case["us"]["step"]["median"] <= case["us"]["step"]["p99"] <= case["us"]["step"]["worst"]
        assert case["us"]["handle"]["mean"] + case["us"]["encode"]["mean"] == pytest.approx(case["us"]["step"]["mean"])
        assert case["client_messages"] > 0
    steady = cases["steady", 64]
    assert (steady["rows"], steady["joined"], steady["chunk_tokens"]) == (64, 0, 0)
    assert 0 < steady["plan_bytes"]["median"] < 1_024
    assert cases["churn", 64]["joined"] == pytest.approx(0.64, rel=0.4)
    assert cases["prefill", 64]["steps_with_chunks"] > 0.9
    assert cases["prefix", 64]["cached_share_of_prompts"] > 0.8
    assert cases["churn", 64]["cached_share_of_prompts"] == 0
    assert report["calibration"]["ratio"] > 0
    assert report["machine"]["cores"] > 0
    assert {one["what"] for one in report["targets"]} >= {"steady step at 64, median µs"}


def test_core_benchmark_judges_by_the_targets() -> None:
    def case(load: str, running: int, us: float, size: float) -> dict[str, Any]:
        return {"load": load, "running": running, "us": {"step": {"median": us}}, "plan_bytes": {"p99": size}}

    verdicts = judge([case("steady", 1_024, 299.0, 1_025.0), case("churn", 1_024, 599.0, 9_999.0)])
    assert [one["holds"] for one in verdicts] == [True, False, False, True]


def test_core_benchmark_names_an_unknown_load() -> None:
    done = run("core", "--load", "heavy")
    assert done.returncode == 2
    assert "heavy" in done.stderr


CLUSTER = (
    "--rows 8 --step-ms 4 --clients 5 --seconds 1 --warm-up 0.1 --prompt-tokens 8 --least-output 4 --most-output 20"
)


def test_cluster_delivers_what_its_workers_sample(tmp_path: Path) -> None:
    out = tmp_path / "cluster.json"
    done = run("cluster", "--workers", "2", *CLUSTER.split(), "--out", str(out))
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["runs"]
    assert found["workers"] == 2
    assert found["steps"] > 0
    assert 0 <= found["waited_share"] <= 1
    assert found["step_ms"] >= 3.9  # more on a busy machine
    assert 0 < found["rows_in_use"] <= 8
    assert found["requests_finished"] > 0
    assert found["delivered_per_s"] > 0
    assert found["gap_ms"]["p50"] <= found["gap_ms"]["worst"]
    assert found["first_token_ms"]["p50"] > 0
    assert found["cores"]["scheduler"] > 0


def test_cluster_shows_a_profile_of_the_scheduler(tmp_path: Path) -> None:
    out = tmp_path / "cluster.json"
    done = run("cluster", "--workers", "1", *CLUSTER.split(), "--profile", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert any("core.py" in one["function"] for one in report["profile"]["ours_with_callees"])


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ([], None),
        ([0.001], True),
        ([0.0011], None),
        ([0.5, 0.5], False),
        ([0.5, 0.0], None),
        ([0.5, 0.0, 0.0], True),
        ([0.5, 0.0, 0.5], False),
    ],
)
def test_two_runs_of_three_decide_where_the_first_is_bad(shares: list[float], verdict: bool | None) -> None:
    assert holds([{"waited_share": share} for share in shares]) is verdict


def test_sweep_tells_of_every_point() -> None:
    console = Console(record=True, width=200)
    runs = [
        {"workers": workers, "rows": 256, "waited_share": share, "delivered_per_s": 1.0}
        for workers, share in ((1, 0.0), (2, 0.2), (2, 0.0), (2, 0.0), (4, 0.5), (4, 0.25))
    ]
    show_knee(console, runs)
    *lines, knee = console.export_text().splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["held", "held", "too many"]
    assert knee == "Here one scheduler process carries 2 × 256 = 512 streams, and 4 × 256 no more."
    assert lines[2].startswith("4 workers, 1,024 streams")
    assert "50.000%, 25.000% of the steps" in lines[2]


def test_cluster_refuses_a_number_of_workers_beside_a_sweep() -> None:
    done = run("cluster", "--sweep", "--workers", "3")
    assert done.returncode == 2
    assert "--workers" in done.stderr


def test_cluster_refuses_outputs_that_do_not_fit() -> None:
    done = run("cluster", "--least-output", "9", "--most-output", "3")
    assert done.returncode == 2
    assert "least" in done.stderr
