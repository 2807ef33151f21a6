"""`tandem bench` as users run it, on real processes and the built-in model. Nothing here asserts a time."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.commands import gone, tandem
from support.deadlines import DEADLINE_S
from support.systems import embedded

TINY = ["--prompt-tokens", "8", "--output-tokens", "6", "--num-warmups", "2"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A running service of the built-in model, with a short context so that requests can be too long."""
    with embedded({"device": "cpu", "threads": 1, "max_model_len": 256}) as system:
        yield system.address


def report_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_serve_tells_latencies_and_goodput(address: str, tmp_path: Path, bench: Any) -> None:
    out = tmp_path / "serve.json"
    code, shown, err = bench(
        *("serve", "--connect", address, "--num-prompts", "8", *TINY, "--request-rate", "100", "--repeats", "2"),
        *("--max-concurrency", "3", "--client-processes", "2", "--goodput", "ttft:60000", "--out", str(out)),
    )
    assert code == 0, err
    assert all(name in shown for name in ("TTFT", "TPOT", "ITL", "E2EL", "8 requests completed, 0 failed"))
    report = report_of(out)
    assert report["system"] == {"connect": "ipc"}
    assert report["load"]["prompt_tokens"] == "8"
    (result,) = report["results"]
    assert result["served"]["model"] == "tandem-builtin"
    assert (result["request_rate"], result["max_concurrency"], len(result["runs"])) == (100.0, 3, 2)
    for run in result["runs"]:
        figures = run["figures"]
        assert (figures["completed"], figures["prompt_tokens"], figures["output_tokens"]) == (8, 64, 48)
        assert figures["request_goodput"] == figures["request_throughput"]
        assert 0 < figures["p50_ttft_ms"] <= figures["p99_ttft_ms"] <= figures["p99_e2el_ms"]
        assert figures["cached_tokens"] == 0  # the second run's prompts are others


def test_serve_at_a_concurrency_of_one_sends_one_after_the_other(address: str, tmp_path: Path, bench: Any) -> None:
    out = tmp_path / "serve.json"
    code, _, err = bench(
        *("serve", "--connect", address, "--num-prompts", "4", *TINY, "--max-concurrency", "1", "--out", str(out))
    )
    assert code == 0, err
    figures = report_of(out)["results"][0]["median"]
    assert 4 * figures["mean_e2el_ms"] <= 1e3 * figures["duration_s"]


def test_sweep_with_shared_prefixes_as_text(address: str, tmp_path: Path, bench: Any) -> None:
    out = tmp_path / "sweep.json"
    code, shown, err = bench(
        *("sweep", "--connect", address, "--workload", "shared-prefix", "--prefix-tokens", "64", "--num-prompts", "6"),
        *(*TINY, "--text", "--request-rate", "50", "--request-rate", "inf", "--out", str(out)),
    )
    assert code == 0, err
    assert "request_rate" in shown
    results = report_of(out)["results"]
    assert [result["request_rate"] for result in results] == [50.0, "inf"]
    for result in results:
        assert result["median"]["completed"] == 6
        assert result["median"]["cached_tokens"] > 0


def test_failed_requests_are_told_by_kind(address: str, tmp_path: Path, bench: Any) -> None:
    trace = tmp_path / "trace.jsonl"
    lines: list[dict[str, Any]] = [{"prompt_tokens": length, "output_tokens": 3} for length in (10, 400)]
    lines += [{"prompt": "What is 1 + 1?", "output_tokens": 3}]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "trace.json"
    load = ["--connect", address, "--workload", "trace", "--num-warmups", "0", "--trace-file", str(trace)]
    code, shown, err = bench("serve", *load, "--out", str(out))
    assert code == 0, err
    assert "1 failed with InvalidRequest, the first: this model's maximum context length is 256 tokens" in shown
    assert "the prompt has 400" in shown
    (run,) = report_of(out)["results"][0]["runs"]
    assert (run["figures"]["completed"], run["figures"]["failed"]) == (2, 1)
    assert run["failures"]["InvalidRequest"]["count"] == 1

    trace.write_text(json.dumps(lines[1]))
    code, shown, err = bench("offline", *load)
    assert code == 1
    assert "1 failed with InvalidRequest" in shown
    assert "no request was completed" in err


def test_http_beside_the_sdk(address: str, tmp_path: Path, bench: Any) -> None:
    out = tmp_path / "http.json"
    code, shown, err = bench(
        *("offline", "--connect", address, "--num-prompts", "8", *TINY, "--repeats", "2", "--client-processes", "2"),
        *("--backend", "sdk", "--backend", "openai", "--api-server-count", "2", "--out", str(out)),
    )
    assert code == 0, err
    assert "8 requests completed over HTTP, 0 failed" in shown
    assert "of the SDK's" in shown
    assert "HTTP: 2 gateways" in shown
    report = report_of(out)
    assert report["through"] == {"backends": ["sdk", "openai"], "api_server_count": 2}
    sdk, http = report["results"]
    assert (sdk["backend"], http["backend"]) == ("sdk", "openai")
    assert "of_first_backend" not in sdk
    assert http["of_first_backend"] == http["median"]["output_throughput"] / sdk["median"]["output_throughput"]
    for result in (sdk, http):
        assert len(result["runs"]) == 2
        for run in result["runs"]:
            figures = run["figures"]
            assert (figures["completed"], figures["failed"], figures["cached_tokens"]) == (8, 0, 0)
            assert (figures["prompt_tokens"], figures["output_tokens"]) == (64, 48)
            assert 0 < figures["p50_ttft_ms"] <= figures["p99_e2el_ms"]
    assert len(http["runs"][0]["gateway_cpu_share"]) == 2
    assert sdk["median"]["gateway_cpu_us_per_token"] is None


def test_chats_over_http_take_the_same_tokens(address: str, tmp_path: Path, bench: Any) -> None:
    out = tmp_path / "chat.json"
    code, _, err = bench(
        *("serve", "--connect", address, "--num-prompts", "4", *TINY, "--chat", "--max-concurrency", "2"),
        *("--backend", "openai", "--backend", "sdk", "--out", str(out)),
    )
    assert code == 0, err
    http, sdk = report_of(out)["results"]
    assert http["median"]["completed"] == sdk["median"]["completed"] == 4
    assert http["median"]["output_tokens"] == sdk["median"]["output_tokens"] == 24
    assert http["median"]["prompt_tokens"] > 4 * 8  # the template's come on top


def test_http_that_is_not_there_fails_every_request(address: str, bench: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, shown, err = bench(
        *("offline", "--connect", address, "--num-prompts", "3", *TINY, "--backend", "openai"),
        *("--base-url", f"http://127.0.0.1:{port}"),
    )
    assert code == 1
    assert f"3 failed with NotConnected, the first: 127.0.0.1 port {port}" in shown
    assert "no request was completed" in err


def test_ctrl_c_ends_the_clients_too(address: str) -> None:
    load = "--num-prompts 40 --max-concurrency 1 --prompt-tokens 8 --output-tokens 240 --num-warmups 0".split()
    with tandem("bench", "serve", "--connect", address, *load, environment={}) as command:
        command.wait_for("of 40 prompts answered")
        processes = command.descendants()
        assert processes
        command.send(signal.SIGINT)
        assert command.finish() == 130, command.output
    assert gone(processes)
    assert command.output.endswith("Interrupted.\n")


@pytest.mark.parametrize("command", ["offline", "serve", "sweep"])
def test_help_of_every_benchmark(command: str, bench: Any) -> None:
    code, out, err = bench(command, "--help")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    flags = ("--workload", "--seed", "--repeats", "--client-processes", "--lookahead", "--max-num-seqs", "--watermark")
    assert all(f"{flag} " in words for flag in flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["offline", "--max-num-seqs", "0"], "--max-num-seqs: input should be greater than or equal to 1, not 0"),
        (["offline", "--lookahead", "9"], "--lookahead: "),
        (
            ["serve", "--connect", "ipc:///x", "--model", "m", "--data-parallel-size", "2"],
            "these are for starting one: --data-parallel-size, --model",
        ),
        (["offline", "--connect", "ipc:///x", "--lookahead", "1"], "these are for starting one: --lookahead"),
        (["serve", "--goodput", "itl:5"], "--goodput: expected one of"),
        (["serve", "--request-rate", "0"], "--request-rate: "),
        (["serve", "--burstiness", "-1"], "--burstiness: "),
        (["serve", "--num-prompts", "2", "--client-processes", "3"], "there are only 2 requests to share"),
        (["serve", "--max-concurrency", "2", "--client-processes", "3"], "less than --client-processes 3"),
        (["serve", "--workload", "trace", "--trace-file", "/nonexistent"], "--trace-file: cannot read /nonexistent"),
        (["serve", "--out", "/proc/nothing/x.json"], "--out: there is no folder /proc/nothing"),
        (["sweep"], "nothing to sweep over"),
        (
            [*"sweep --request-rate 1 --request-rate 2 --max-concurrency 1 --max-concurrency 2".split()],
            "sweep over one of them",
        ),
        (["offline", "--config", "/nonexistent.yaml"], "cannot read the configuration file"),
        (["serve", "--backend", "vllm"], "--backend: must be sdk or openai, not 'vllm'"),
        (["serve", "--backend", "sdk", "--backend", "sdk"], "--backend: sdk is given twice"),
        (["serve", "--base-url", "http://x"], "--base-url: only with --backend openai"),
        (["serve", "--api-server-count", "2"], "--api-server-count: only with --backend openai"),
        (["serve", "--backend", "openai", "--base-url", "http://x"], "--base-url: needs --connect"),
        (["serve", "--data-parallel-size", "0"], "--data-parallel-size: must be at least 1, not 0"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(arguments: list[str], message: str, bench: Any) -> None:
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tandem: ")
    assert message in err


def test_a_trace_keeps_its_own_rate(tmp_path: Path, bench: Any) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt_tokens": 1, "output_tokens": 1}')
    code, _, err = bench("serve", "--workload", "trace", "--trace-file", str(trace), "--request-rate", "3")
    assert code == 2
    assert "--request-rate: a trace has its own times of arrival" in err


def test_a_picture_needs_matplotlib_before_anything_is_measured(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tandem.bench.report.find_spec", lambda _name: None)
    code, _, err = bench("sweep", "--request-rate", "1", "--plot", str(tmp_path / "x.png"))
    assert code == 2
    assert "--plot needs matplotlib" in err


def test_a_picture_of_a_sweep(tmp_path: Path) -> None:
    code = (  # in a process of its own, because matplotlib keeps its fonts open
        "from tandem.bench.report import plot\n"
        "names = [f'p{percent}_{name}_ms' for percent in (50, 90, 99) for name in ('ttft', 'itl')]\n"
        "points = ((1.0, 5.0), ('inf', None))\n"
        "results = [{'rate': rate, 'median': dict.fromkeys(names, value)} for rate, value in points]\n"
        "plot('sweep.png', 'rate', results)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, timeout=DEADLINE_S, check=True)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_other_commands_do_not_import_the_benchmarks() -> None:
    code = (
        "import sys\n"
        "from tandem.launch import cli\n"
        "sys.argv = ['tandem', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(*[name for name in sys.modules if name.startswith('tandem.bench')], file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert "bench" in run.stdout
    assert run.stderr.strip() == ""
