"""A service's figures for Prometheus: what the scheduler counts, for itself and for its workers, and what a gateway
counts. docs/metrics.md describes them.

Names are vLLM's behind the prefix `tandem:`, where vLLM has the figure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from ..client.stats import Histogram as Observations
from ..client.stats import Stats, WorkerStats
from .config import SHARED_METRICS

PREFIX = "tandem:"
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
_LIVE_GAUGE = re.compile(r"gauge_live[a-z]*_([0-9]+)\.db")

_SERVICE_GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("num_requests_running", "Requests that have a place on a worker.", lambda s: s.running),
    ("num_requests_waiting", "Requests that wait for a place.", lambda s: s.waiting),
    ("num_requests_suspected", "Waiting requests that will run alone, after workers' deaths.", lambda s: s.suspects),
    ("num_clients", "Connections of clients, gateways among them.", lambda s: s.clients),
    ("num_workers", "Registered workers.", lambda s: len(s.workers)),
    ("scheduler_uptime_seconds", "Since the scheduler started.", lambda s: s.uptime_s),
)
_SERVICE_COUNTERS: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("prompt_tokens", "Prompt tokens of requests that got their first token.", lambda s: s.prompt_tokens),
    ("generation_tokens", "Generated tokens.", lambda s: s.generation_tokens),
    ("num_preemptions", "Requests that lost their place for want of blocks.", lambda s: s.preemptions),
    ("prefix_cache_queries", "Tokens looked up in a prefix cache.", lambda s: s.looked_up_tokens),
    ("prefix_cache_hits", "Tokens found in a prefix cache.", lambda s: s.cached_tokens),
    ("prefix_cache_evictions", "Cached blocks given away for other contents.", lambda s: s.evicted_blocks),
    ("request_resumptions", "Requests that clients went on with after losing a scheduler.", lambda s: s.resumptions),
    ("request_recoveries", "Attempts that ended with their worker and went on elsewhere.", lambda s: s.moved),
    ("requests_poisoned", "Requests that failed because workers died of them.", lambda s: s.poisoned),
    ("workers_joined", "Registrations of workers.", lambda s: s.joined_workers),
    ("workers_lost", "Registrations that ended unintended.", lambda s: s.lost_workers),
    ("worker_restarts", "Registrations of a new process under the name of one gone.", lambda s: s.restarted_workers),
)
_WORKER_GAUGES: tuple[tuple[str, str, Callable[[WorkerStats], float | None]], ...] = (
    ("worker_up", "1 for a worker that is registered, 0 while it is drained.", lambda w: float(w.state == "serving")),
    ("worker_requests_running", "Requests that have a place on this worker.", lambda w: w.running),
    ("worker_silent_seconds", "Since the worker's last sign of progress.", lambda w: w.silent_s),
    ("worker_lease_seconds", "Silence after which the worker is given up.", lambda w: w.lease_s),
    ("kv_cache_usage_perc", "Share of the KV cache that requests use; 1 is all of it.", lambda w: _kv_usage(w)),
    ("kv_cache_blocks", "Blocks of the KV cache.", lambda w: w.num_blocks),
    ("kv_cache_cached_blocks", "Blocks whose contents can be found again.", lambda w: w.cached_blocks),
    ("lookahead", "Steps that may be queued ahead of the running one.", lambda w: w.lookahead),
    ("steps_in_flight", "Steps at the worker, the running one included.", lambda w: w.in_flight),
    ("gpu_idle_share", "Share of gaps in the last 10 to 20 s with work.", lambda w: w.recent_idle_share),
)
_WORKER_COUNTERS: tuple[tuple[str, str, Callable[[WorkerStats], float | None]], ...] = (
    ("worker_steps", "Steps done.", lambda w: w.steps),
    ("worker_sampled_tokens", "Sampled tokens, wasted ones included.", lambda w: w.tokens),
    ("gpu_busy_seconds", "Device time inside steps.", lambda w: w.busy_us / 1e6),
    ("gpu_gap_seconds", "Device time between steps while there was work.", lambda w: w.gap_us / 1e6),
    ("decode_busy_seconds", "Device time in steps in which all rows decode.", lambda w: w.decode_busy_us / 1e6),
    (
        "decode_floor_seconds",
        "How long these would take if they only read weights, keys and values; absent where the bandwidth is unknown.",
        lambda w: w.decode_floor_us / 1e6 if w.decode_floor_us or not w.decode_busy_us else None,
    ),
)
_HISTOGRAMS: dict[str, str] = {
    "time_to_first_token_seconds": "From acceptance to the first token.",
    "inter_token_latency_seconds": "Between two tokens of a request.",
    "request_queue_time_seconds": "From acceptance to the first place on a worker.",
    "request_prefill_time_seconds": "From the first place to the first token.",
    "request_decode_time_seconds": "From the first token to the end.",
    "request_inference_time_seconds": "From the first place to the end.",
    "e2e_request_latency_seconds": "From acceptance to the end.",
    "request_time_per_output_token_seconds": "A request's mean time for a token after the first.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Generated tokens of a request.",
    "iteration_tokens_total": "Tokens computed in a step.",
    "plan_time_seconds": "The scheduler's time to enter results and plan the next step.",
    "plan_bytes": "Size of a plan on the wire.",
    "step_time_seconds": "Device time of a step.",
    "step_gap_seconds": "Device time between two steps while there was work.",
    "result_latency_seconds": "From sending a plan to receiving its result.",
    "steps_queued_ahead": "Steps that the worker still had when a result came.",
}


class ServiceCollector(Collector):
    """One reading of a service, as metric families. `stats` is None if the scheduler did not answer."""

    def __init__(self, stats: Stats | None, model_name: str) -> None:
        self._stats = stats
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(PREFIX + "scheduler_up", "Whether the scheduler answered this scrape.")
        up.add_metric([], float(self._stats is not None))
        yield up
        if self._stats is not None:
            yield from self._service(self._stats)
            yield from self._workers(self._stats.workers)

    def _service(self, stats: Stats) -> Iterator[Metric]:
        labels, values = ["model_name"], [self._model]
        for name, text, read in _SERVICE_GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=labels)
            gauge.add_metric(values, read(stats))
            yield gauge
        for name, text, read in _SERVICE_COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, text, labels=labels)
            counter.add_metric(values, read(stats))
            yield counter
        yield self._by_kind("request_success", "Requests that ended, by reason.", "finished_reason", stats.finished)
        yield self._by_kind("request_refusals", "Requests that were refused, by code.", "code", stats.refusals)
        for one in stats.histograms:
            yield _histogram(one.name, labels, [(values, one)])

    def _by_kind(self, name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name", label])
        for kind, count in sorted(counts.items()):
            family.add_metric([self._model, kind], count)
        return family

    def _workers(self, workers: Sequence[WorkerStats]) -> Iterator[Metric]:
        labels = ["model_name", "worker"]
        named = [([self._model, name], worker) for name, worker in zip(_names(workers), workers, strict=True)]
        for kind, figures in ((GaugeMetricFamily, _WORKER_GAUGES), (CounterMetricFamily, _WORKER_COUNTERS)):
            for name, text, read in figures:
                family = kind(PREFIX + name, text, labels=labels)
                for values, worker in named:
                    value = read(worker)
                    if value is not None:
                        family.add_metric(values, value)
                yield family
        by_name: dict[str, list[tuple[list[str], Observations]]] = {}
        for values, worker in named:
            for one in worker.histograms:
                by_name.setdefault(one.name, []).append((values, one))
        for name, found in by_name.items():
            yield _histogram(name, labels, found)


def _kv_usage(worker: WorkerStats) -> float:
    return 1.0 - worker.free_blocks / worker.num_blocks if worker.num_blocks else 0.0


def _names(workers: Sequence[WorkerStats]) -> list[str]:
    """The workers' names; one that several have gets the registration, because two series must not be the same."""
    names = [worker.name for worker in workers]
    return [
        f"{name}#{worker.registration}" if names.count(name) > 1 else name
        for name, worker in zip(names, workers, strict=True)
    ]


def _histogram(name: str, labels: Sequence[str], found: Iterable[tuple[list[str], Observations]]) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, _HISTOGRAMS.get(name, name), labels=labels)
    for values, one in found:
        cumulated = one.counts.cumsum().tolist()
        bounds = [*map(str, one.bounds), "+Inf"]
        family.add_metric(values, buckets=list(zip(bounds, cumulated, strict=True)), sum_value=one.total)
    return family


class GatewayMetrics:
    """What a gateway process counts, and the page that Prometheus reads from it. Gateways on one port, any of which may
    be asked, count in files of a directory that they share ($PROMETHEUS_MULTIPROC_DIR), and tell of all together."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._shared = os.environ.get(SHARED_METRICS)
        self._requests = Counter(
            "http_requests",
            "HTTP requests that were answered.",
            ["handler", "method", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            ["handler", "method"],
            buckets=REQUEST_SECONDS,
            registry=self._registry,
        )
        self._open = Gauge(
            "http_requests_in_progress",
            "HTTP requests without an end.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )

    def begun(self) -> None:
        """A request has arrived; `ended` must follow."""
        self._open.inc()

    def ended(self, handler: str, method: str, status: int, seconds: float) -> None:
        """`handler` is the route's pattern, never the path that a stranger sent."""
        self._open.dec()
        self._requests.labels(handler, method, str(status)).inc()
        self._seconds.labels(handler, method).observe(seconds)

    def page(self, stats: Stats | None, model_name: str) -> bytes:
        """Everything in Prometheus' text format, of CONTENT_TYPE: this gateway's figures and those of the service."""
        own = self._registry if self._shared is None else _registry_of_all(self._shared)
        return generate_latest(own) + page(stats, model_name)


def _registry_of_all(directory: str) -> CollectorRegistry:
    for name in os.listdir(directory):
        live = _LIVE_GAUGE.fullmatch(name)
        if live is not None and not Path("/proc", live[1]).exists():
            with suppress(FileNotFoundError):  # another gateway may have been asked just now as well
                mark_process_dead(live[1], directory)  # it was killed, and what it had open has ended
    registry = CollectorRegistry()
    MultiProcessCollector(registry, directory)
    return registry


def page(stats: Stats | None, model_name: str) -> bytes:
    """The service's figures alone."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(stats, model_name))
    return generate_latest(registry)
