"""The page that Prometheus reads: well-formed whatever names there are, and whoever does not answer."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem.client.stats import Histogram, Stats, WorkerStats
from tandem.gateway.metrics import GatewayMetrics, page
from tandem.launch.stats import quantile


def worker(name: str, registration: int) -> WorkerStats:
    counts = np.array([1, 2, registration], np.int64)
    gaps = Histogram(name="step_gap_seconds", bounds=(0.001, 0.1), counts=counts, total=0.5)
    return WorkerStats(
        name=name,
        registration=registration,
        num_blocks=10,
        free_blocks=4,
        running=1,
        steps=registration,
        tokens=4,
        busy_us=2_000_000,
        gap_us=5,
        histograms=(gaps,),
    )


def read(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def test_workers_of_one_name_are_told_apart() -> None:
    workers = (worker("w", 1), worker("w", 2), worker('other "w"\n', 3))
    found = read(page(Stats(epoch=1, running=3, waiting=0, preemptions=0, workers=workers), "m"))
    steps = {
        dict(labels)["worker"]: value for (name, labels), value in found.items() if name == "tandem:worker_steps_total"
    }
    assert steps == {"w#1": 1, "w#2": 2, 'other "w"\n': 3}
    counts = {
        dict(labels)["worker"]: value
        for (name, labels), value in found.items()
        if name.endswith("step_gap_seconds_count")
    }
    assert counts == {"w#1": 4, "w#2": 5, 'other "w"\n': 6}
    labels = frozenset({("model_name", "m"), ("worker", "w#1")})
    assert found["tandem:kv_cache_usage_perc", labels] == pytest.approx(0.6)
    assert ("tandem:gpu_idle_share", labels) not in found  # it has had no work lately
    assert ("tandem:decode_floor_seconds_total", labels) in found


def test_a_scheduler_that_does_not_answer_is_told_beside_the_gateways_own_figures() -> None:
    metrics = GatewayMetrics()
    metrics.begun()
    metrics.begun()
    metrics.ended("/v1/completions", "POST", 200, 0.3)
    found = read(metrics.page(None, "m"))
    assert found["tandem:scheduler_up", frozenset()] == 0
    assert not any(name.startswith("tandem:num_") for name, _ in found)
    of_route = {("handler", "/v1/completions"), ("method", "POST")}
    assert found["http_requests_total", frozenset({*of_route, ("status", "200")})] == 1
    assert found["http_request_duration_seconds_bucket", frozenset({*of_route, ("le", "0.5")})] == 1
    assert found["http_request_duration_seconds_bucket", frozenset({*of_route, ("le", "0.25")})] == 0
    assert found["http_requests_in_progress", frozenset()] == 1
    assert read(GatewayMetrics().page(None, "m"))["http_requests_in_progress", frozenset()] == 0  # nothing is shared


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ([4, 0, 0], 0.5, 0.5),
        ([2, 2, 0], 0.5, 1.0),
        ([0, 4, 0], 0.25, 1.5),
        ([0, 0, 9], 0.5, 3.0),
        ([0, 0, 0], 0.5, None),
    ],
)
def test_quantiles_are_those_of_prometheus(counts: list[int], share: float, value: float | None) -> None:
    made = Histogram(name="x", bounds=(1.0, 3.0), counts=np.array(counts, np.int64), total=0.0)
    assert quantile(made, share) == value
