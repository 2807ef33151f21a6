"""The page that Prometheus reads: well-formed whatever names there are, and whoever does not answer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem.client.stats import Histogram, Stats, WorkerStats
from tandem.gateway.metrics import GatewayMetrics, page
from tandem.launch.stats import quantile
from tandem.protocol.messages import StepResult
from tandem.scheduler.metrics import Counters, DeviceMeter

ROOT = Path(__file__).resolve().parents[2]


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


def every_metric() -> dict[str, set[str]]:
    """All samples' names that a gateway may show, and the labels of each."""
    counters, meter = Counters(), DeviceMeter(1, 1, 1)
    meter.result(StepResult(epoch=1, registration=1, step=0, busy_us=9, gap_us=1, kv_tokens=1), 99.0, 98.0, False, 1)
    told = replace(worker("w", 1), histograms=meter.histograms(), recent_idle_share=0.1, decode_floor_us=1)
    stats = Stats(
        epoch=1,
        running=0,
        waiting=0,
        preemptions=0,
        finished={"stop": 1},
        refusals={"invalid": 1},
        histograms=counters.histograms(),
        workers=(told,),
    )
    metrics = GatewayMetrics()
    metrics.begun()
    metrics.ended("/v1/models", "GET", 200, 0.1)
    found: dict[str, set[str]] = {}
    for name, labels in read(metrics.page(stats, "m")):
        found.setdefault(name, set()).update(dict(labels))
    return found


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    known = every_metric()
    asked: set[str] = set()
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 40
    for expression in expressions:
        for name, labels in re.findall(r"((?:tandem:|http_)\w+)(?:\{([^}]*)\})?", expression):
            assert name in known, f"{name} in {expression}"
            asked.add(name)
            used = set(re.findall(r"(\w+)(?:=~|!~|=|!=)", labels))
            assert used <= known[name], f"{name} has no label {used - known[name]}"
        (grouped,) = re.findall(r"max by \(([^)]*)\)", expression)[:1] or ("",)
        labels_of_all = set.union(*(known[name] for name in re.findall(r"(?:tandem:|http_)\w+", expression)))
        assert set(filter(None, grouped.split(", "))) <= labels_of_all
    assert {"tandem:step_gap_seconds_bucket", "tandem:gpu_gap_seconds_total"} <= asked
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_page_of_metrics_names_each_of_them() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name in every_metric():
        base = re.sub(r"_(bucket|sum|count|created)$", "", name.removeprefix("tandem:"))
        assert f"`{base}" in text, f"docs/metrics.md does not name {base}"
