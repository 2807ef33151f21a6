"""A real system's figures: as the SDK, `tandem stats` and Prometheus read them, and equal to what was asked of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem.client import Client
from tandem.client.stats import Stats
from tandem.gateway.metrics import page
from tandem.launch.status import Status
from tandem.protocol.errors import RequestTimeout

from support.asking import ask_until
from support.commands import tandem, terminal
from support.systems import embedded

pytestmark = pytest.mark.thorough

ENDED = {"length": 6.0, "abort": 1.0}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A system that has answered six requests of 3 + 8 tokens, cancelled one, and refused one."""
    with embedded({"device": "cpu", "threads": 1}) as system:
        with Client(system.address) as client:
            prompts = [[10 + i, 11, 12] for i in range(6)]
            client.generate(prompts, temperature=0, max_tokens=8, ignore_eos=True)
            with client.stream([1, 2, 3], temperature=0, max_tokens=4_000, ignore_eos=True) as stream:
                next(stream)
                stream.cancel()
            with pytest.raises(Exception, match="vocabulary"):
                client.generate([10**6], temperature=0)
            ask_until(lambda: not client.stats().running)
        yield system.address


def samples(stats: Stats) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = page(stats, "some model").decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_what_happened(address: str) -> None:
    with Client(address) as client:
        stats = client.stats()
        found = samples(stats)

    def of(name: str, **labels: str) -> float:
        return found[f"tandem:{name}", frozenset({"model_name": "some model", **labels}.items())]

    assert found["tandem:scheduler_up", frozenset()] == 1
    assert {reason: of("request_success_total", finished_reason=reason) for reason in ENDED} == ENDED
    assert of("request_refusals_total", code="invalid") == 1
    assert of("num_requests_running") == of("num_requests_waiting") == 0
    assert of("request_prompt_tokens_sum") == 3 * 7
    assert of("request_prompt_tokens_bucket", le="2.0") == 0
    assert of("request_prompt_tokens_bucket", le="4.0") == of("request_prompt_tokens_bucket", le="+Inf") == 7
    generated = of("generation_tokens_total")
    assert generated == of("request_generation_tokens_sum") >= 6 * 8 + 1
    assert of("time_to_first_token_seconds_count") == 7
    assert of("inter_token_latency_seconds_count") == generated - 7
    assert of("e2e_request_latency_seconds_count") == 7

    (worker,) = stats.workers
    assert of("worker_up", worker="worker") == 1
    assert of("kv_cache_usage_perc", worker="worker") == 0
    assert of("worker_steps_total", worker="worker") == of("step_time_seconds_count", worker="worker")
    assert of("worker_sampled_tokens_total", worker="worker") >= generated
    assert of("gpu_busy_seconds_total", worker="worker") == pytest.approx(of("step_time_seconds_sum", worker="worker"))
    assert of("gpu_gap_seconds_total", worker="worker") == pytest.approx(of("step_gap_seconds_sum", worker="worker"))
    assert 0 < of("gpu_idle_share", worker="worker") < 1
    assert 0 < of("decode_busy_seconds_total", worker="worker") < of("gpu_busy_seconds_total", worker="worker")
    # Nobody asked for anything since: at lookahead 1 the last result of all finds nothing queued, most others one.
    assert of("steps_queued_ahead_count", worker="worker") == worker.steps
    assert of("steps_queued_ahead_bucket", worker="worker", le="1.0") == worker.steps


def test_stats_prints_a_table_and_json(address: str) -> None:
    with tandem("stats", "--connect", address, environment={}) as command:
        assert command.finish() == 0, command.output
    assert "0 running, 0 waiting" in command.output
    assert "1 abort, 6 length" in command.output
    assert "1 invalid" in command.output
    assert "time to first token" in command.output
    with tandem("stats", "--connect", address, "--json", environment={}) as command:
        assert command.finish() == 0, command.output
    told = json.loads(command.output)
    assert told["finished"] == {"length": 6, "abort": 1}
    assert told["workers"][0]["name"] == "worker"


def test_stats_watches_until_it_is_interrupted(address: str) -> None:
    with terminal("stats", "--connect", address, "--watch", "--interval", "0.1", environment={}) as command:
        command.wait_for("0 running")
        command.wait_for_more()
        command.send(signal.SIGINT)
        assert command.finish() == 0, command.output
    assert "Traceback" not in command.output


def test_stats_of_nobody_is_an_error_in_a_sentence() -> None:
    with tandem("stats", "--connect", "ipc:///nonexistent/run", environment={}) as command:
        assert command.finish() == 1
    assert command.output.startswith("tandem: nobody serves at ipc:///nonexistent/run")


def test_a_request_is_one_log_line_when_it_ends() -> None:
    lines: list[tuple[str, str]] = []

    class Lines:
        def status(self, name: str, status: Status) -> None:
            """Not of interest."""

        def output(self, name: str, line: str) -> None:
            lines.append((name, line))

    loud = {"log_level": "info", "log_format": "json"}
    with (
        embedded({"device": "cpu", "threads": 1, "name": "w", **loud}, loud, listener=Lines()) as system,
        Client(system.address) as client,
    ):
        client.generate([[5, 6, 7], [8, 9]], temperature=0, max_tokens=3, ignore_eos=True)
        with pytest.raises(RequestTimeout):
            client.generate([5, 6], temperature=0, max_tokens=4_000, ignore_eos=True, timeout=0.5)
    told = [json.loads(line) for _, line in lines]
    assert {one["process"] for one in told} == {"scheduler", "w"}
    ended = sorted((one for one in told if one["message"] == "request ended"), key=lambda one: one["request"])
    assert [one["reason"] for one in ended] == ["length", "length", "timeout"]
    for one, prompt in zip(ended[:2], (3, 2), strict=True):
        assert (one["prompt_tokens"], one["output_tokens"], one["cached_tokens"]) == (prompt, 3, 0)
        assert (one["worker"], one["attempts"], one["preemptions"], one["level"]) == ("w", 1, 0, "info")
        assert 0 <= one["queue_s"] <= one["first_token_s"] <= one["total_s"]
