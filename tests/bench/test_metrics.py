"""Figures of timelines made by hand: each is what vLLM's definition gives."""

import pytest

from tandem.bench.load import device_figures, shares
from tandem.bench.metrics import Outcome, failures, figures, medians, read_limits
from tandem.protocol.errors import ConfigurationError
from tandem.protocol.messages import Stats, WorkerStats

# Sent at 1 s: first token after 0.2 s, then 2 tokens 0.1 s later, then 1 after another 0.3 s. 4 tokens in 0.6 s.
FIRST = Outcome(
    late=0.1, sent=1.0, times=[1.2, 1.3, 1.6], counts=[1, 2, 1], ended=1.7, prompt_tokens=10, cached_tokens=4
)
SINGLE = Outcome(sent=2.0, times=[2.4], counts=[1], ended=4.0, prompt_tokens=6)
FAILED = Outcome(sent=2.0, times=[2.1], counts=[1], ended=3.0, failure="RequestFailed", message="broken")
UNSENT = Outcome(sent=2.5, ended=2.5, failure="Overloaded", message="full")


def test_one_request() -> None:
    found = figures([FIRST], {})
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["mean_e2el_ms"] == pytest.approx(600)
    assert found["mean_tpot_ms"] == pytest.approx(400 / 3)
    assert found["mean_itl_ms"] == pytest.approx(200)
    assert found["p50_itl_ms"] == pytest.approx(200)
    assert found["p90_itl_ms"] == pytest.approx(280)  # between 100 and 300, linearly
    assert found["tokens_per_delivery"] == pytest.approx(4 / 3)
    assert found["p99_client_late_ms"] == pytest.approx(100)
    assert found["duration_s"] == 1.7
    assert found["output_throughput"] == pytest.approx(4 / 1.7)
    assert found["total_token_throughput"] == pytest.approx(14 / 1.7)
    assert found["cached_tokens"] == 4
    assert "request_goodput" not in found


def test_failures_count_as_failures_and_as_nothing_else() -> None:
    found = figures([FIRST, SINGLE, FAILED, UNSENT], {})
    assert (found["completed"], found["failed"], found["output_tokens"], found["prompt_tokens"]) == (2, 2, 5, 16)
    assert found["duration_s"] == 4.0
    assert found["request_throughput"] == pytest.approx(0.5)
    assert found["mean_ttft_ms"] == pytest.approx(300)
    assert found["mean_tpot_ms"] == pytest.approx(400 / 3)  # a single token has no TPOT
    assert failures([FIRST, FAILED, UNSENT, FAILED]) == {
        "RequestFailed": {"count": 2, "first_message": "broken"},
        "Overloaded": {"count": 1, "first_message": "full"},
    }


def test_the_first_message_of_a_kind_is_the_one_that_is_told() -> None:
    outcomes = [Outcome(failure="X", message=message) for message in ("one", "two")]
    assert failures(outcomes) == {"X": {"count": 2, "first_message": "one"}}


def test_a_run_without_a_completed_request_has_no_latencies() -> None:
    found = figures([UNSENT], {"ttft": 1.0})
    assert (found["completed"], found["failed"]) == (0, 1)
    assert found["mean_ttft_ms"] is None
    assert found["p99_itl_ms"] is None
    assert found["request_goodput"] == 0


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 200.1}, 1),
        ({"ttft": 400.1}, 2),
        ({"ttft": 400.1, "tpot": 133.0}, 1),  # the single token's TPOT fails no limit
        ({"ttft": 400.1, "tpot": 134.0}, 2),
        ({"e2el": 500.0}, 1),
        ({"ttft": 300.0, "e2el": 500.0}, 0),
    ],
)
def test_goodput_counts_those_that_keep_every_limit(limits: dict[str, float], good: int) -> None:
    assert figures([FIRST, SINGLE, FAILED], limits)["request_goodput"] == pytest.approx(good / 4.0)


def test_limits_are_read() -> None:
    assert read_limits(["ttft:500", "tpot:12.5", "e2el:1e4"]) == {"ttft": 500.0, "tpot": 12.5, "e2el": 10_000.0}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["itl:5"], "expected one of ttft, tpot, e2el as in ttft:500, not 'itl:5'"),
        (["500"], "not '500'"),
        (["ttft"], "ttft needs a number of milliseconds above 0, not ''"),
        (["ttft:soon"], "not 'soon'"),
        (["ttft:0"], "above 0"),
        (["ttft:nan"], "above 0"),
        (["ttft:inf"], "above 0"),
        (["ttft:1", "ttft:2"], "ttft is given twice"),
    ],
)
def test_bad_limits_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match="--goodput: ") as refused:
        read_limits(texts)
    assert message in str(refused.value)


def test_medians_are_of_each_figure_and_of_the_runs_that_have_it() -> None:
    runs = [{"a": 1.0, "b": None, "c": None}, {"a": 5.0, "b": 2.0, "c": None}, {"a": 3.0, "b": 4.0, "c": None}]
    assert medians(runs) == {"a": 3.0, "b": 3.0, "c": None}


def worker(registration: int, steps: int, busy: int, gap: int) -> WorkerStats:
    return WorkerStats(
        name="w",
        registration=registration,
        num_blocks=1,
        free_blocks=1,
        running=0,
        steps=steps,
        tokens=0,
        busy_us=busy,
        gap_us=gap,
    )


def test_device_figures_are_differences_over_all_workers() -> None:
    before = Stats(
        epoch=1, running=0, waiting=0, preemptions=2, workers=(worker(1, 10, 1_000, 500), worker(2, 5, 7, 7))
    )
    after = Stats(
        epoch=1,
        running=0,
        waiting=0,
        preemptions=3,
        looked_up_tokens=80,
        cached_tokens=20,
        workers=(worker(1, 14, 7_000, 1_500), worker(3, 2, 3_000, 0)),  # 2 left, 3 joined
    )
    assert device_figures(before, after) == {
        "steps": 6,
        "step_ms": 1.5,
        "idle_share": pytest.approx(0.1),
        "preemptions": 1,
        "prefix_cache_hit_rate": 0.25,
    }
    assert device_figures(after, after)["step_ms"] is None


def test_a_load_is_shared_among_processes_without_losing_any_of_it() -> None:
    assert shares(10, 3) == [4, 3, 3]
    assert shares(2, 3) == [1, 1, 0]
