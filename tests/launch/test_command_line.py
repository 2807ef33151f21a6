"""Flags, configuration files and their errors. Nothing is started here: whatever is wrong is found before."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.launch import cli
from tandem.launch.config import build, merged, read_file
from tandem.launch.generate import as_line, read_prompts
from tandem.launch.system import place_workers, visible_gpus
from tandem.protocol.errors import ConfigurationError
from tandem.scheduler.config import SchedulerConfig
from tandem.worker.config import WorkerConfig

from support.deadlines import DEADLINE_S


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `tandem arguments…`, within this process."""
    monkeypatch.setattr(sys, "argv", ["tandem", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int | None)
    return code or 0, captured.out, captured.err


@pytest.mark.parametrize(
    ("command", "models"),
    [
        ("serve", [SchedulerConfig, WorkerConfig]),
        ("scheduler", [SchedulerConfig]),
        ("worker", [WorkerConfig]),
    ],
)
def test_every_option_of_a_process_is_a_flag_with_its_description(
    command: str,
    models: list[type[SchedulerConfig] | type[WorkerConfig]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, _ = run(capsys, monkeypatch, command, "--help")
    assert code == 0
    words = " ".join(out.split())
    for model in models:
        for name, field in model.model_fields.items():
            if (command, name) == ("serve", "scheduler"):
                continue  # the launcher decides where its own scheduler is
            assert f"--{name.replace('_', '-')} " in words
            assert field.description
            assert len(models) > 1 or field.description.removesuffix(".") in words


@pytest.mark.parametrize("command", ["generate", "chat", "complete", "demo", "serve", "scheduler", "worker"])
def test_help_of_every_command(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: tandem {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs: input should be greater than or equal to 1, not 0"),
        (["serve", "--device", "tpu"], "--device: input should be 'auto', 'cuda' or 'cpu', not 'tpu'"),
        (["serve", "--block-size", "7"], "--block-size: input should be 8, 16, 32, 64 or 128, not 7"),
        (["serve", "--max-num-batched-tokens", "8"], "max_num_batched_tokens (8) must be at least max_num_seqs (256)"),
        (["serve", "--data-parallel-size", "0"], "--data-parallel-size: must be at least 1, not 0"),
        (["serve", "--address", "tcp://127.0.0.1:7000"], "--insecure"),
        (["serve", "--address", "http://x"], "expected ipc:///directory or tcp://host:port"),
        (["serve", "--name", "scheduler"], "--name: 'scheduler' names the scheduler already"),
        (["generate"], "no prompt was given"),
        (["generate", "--raw", "--system", "x", "hello"], "--system is part of a chat"),
        (["generate", "--n", "0", "hello"], "--n: 0, must be a whole number of at least 1"),
        (
            ["generate", "--n", "3", "--temperature", "0", "hello"],
            "--n: 3 samples at temperature 0 would all be the same",
        ),
        (["generate", "--priority", "-1001", "hello"], "--priority: -1001, must be a whole number of at least -1000"),
        (["generate", "--timeout", "-1", "hello"], "--timeout: expected seconds, at least 0"),
        (["generate", "--timeout", "0", "hello"], "--timeout: 0 s leave no time for an answer"),
        (["chat", "--cache-salt", "x" * 257], "--cache-salt: 257 characters, over the limit of 256"),
        (
            ["generate", "--regex", "a", "--choice", "b", "hello"],
            "--regex and --choice each say what answers look like",
        ),
        (
            ["generate", "--json-schema", "/nonexistent/schema", "hello"],
            "--json-schema: cannot read /nonexistent/schema",
        ),
        (["generate", "--json-schema", "/dev/null", "hello"], "--json-schema: a schema is JSON, and this is not"),
        (["generate", "--file", "/nonexistent/prompts", "x"], "cannot read the prompts in /nonexistent/prompts"),
        (
            ["generate", "--connect", "ipc:///x", "--model", "m", "hello"],
            "--connect names a running service, and --model",
        ),
        (["generate", "--connect", "tcp://127.0.0.1:7000", "hello"], "--insecure"),
        (["chat", "--max-num-seqs", "0"], "--max-num-seqs: input should be greater than or equal to 1, not 0"),
        (["serve", "a/b", "--model", "c/d"], "MODEL and --model name two models, a/b and c/d"),
        (["serve", "a/b", "--max-num-seqs", "0"], "--max-num-seqs: input should be greater than or equal to 1"),
        (["complete", "--timeout", "0"], "--timeout: 0 s leave no time for an answer"),
        (["demo", "--config", "/nonexistent.yaml"], "cannot read the configuration file /nonexistent.yaml"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(
    arguments: list[str],
    message: str,
    runtime: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("tandem: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("named_by", ["flag", "environment"])
def test_a_service_that_is_not_there_is_told_at_once(
    named_by: str, runtime: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"ipc://{runtime}/none"
    arguments = ["--connect", address] if named_by == "flag" else []
    if named_by == "environment":
        monkeypatch.setenv("TANDEM_ADDRESS", address)
    code, out, err = run(capsys, monkeypatch, "generate", *arguments, "hello")
    assert (code, out) == (1, "")
    assert f"nobody serves at {address}; start a service there with: tandem serve --address {address}" in err


def test_nobody_at_a_tcp_address_is_told_at_once(
    runtime: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound, but not listening: refuses connections
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = run(capsys, monkeypatch, "generate", "--connect", address, "--insecure", "hello")
    assert (code, out) == (1, "")
    assert f"nobody serves at {address}; start a service there with: tandem serve --address {address} --insecure" in err


def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, monkeypatch, "serve", "--max-num-seq", "3")
    assert code == 2
    assert "--max-num-seqs" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-num-seq: 3", "unknown option 'max-num-seq'; did you mean 'max-num-seqs'?"),
        ("qqqq: 3", "unknown option 'qqqq'; known are block-size, dtype"),
        ("dtype: [", "is not valid YAML"),
        ("- dtype", "must hold options as `name: value`, not a list"),
        ("dtype: float32\ndtype: auto", "'dtype' is given twice"),
        ("block-size: 8\nblock_size: 16", "'block_size' is given twice"),
        ("dtype: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("? [a]\n: 2", "a name must be text"),
    ],
)
def test_bad_configuration_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        read_file(path, ["dtype", "max_num_seqs", "block_size"])
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("max-num-seqs: 8\nblock_size: 32\nrevision: null\n")
    file = read_file(path, list(WorkerConfig.model_fields))
    options = merged({"max_num_seqs": 4, "lookahead": None, "enforce": None}, file)
    config = build(WorkerConfig, options, scheduler="ipc:///x", model="m")
    assert (config.max_num_seqs, config.block_size, config.lookahead, config.revision) == (4, 32, 1, None)


def test_an_empty_configuration_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("# nothing\n")
    assert read_file(path, ["dtype"]) == {}


def test_yaml_booleans_are_no_numbers() -> None:
    with pytest.raises(ConfigurationError, match="--max-num-seqs: true is not a value it can have"):
        build(WorkerConfig, {"max_num_seqs": True}, scheduler="ipc:///x", model="m")


def test_all_bad_options_are_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as refused:
        build(WorkerConfig, {"max_num_seqs": 0, "dtype": "int3"}, scheduler="ipc:///x", model="m")
    assert "--max-num-seqs" in str(refused.value)
    assert "--dtype" in str(refused.value)


def test_the_builtin_model_is_the_default_and_has_a_name() -> None:
    (place,) = place_workers({}, 1, "ipc:///x")
    assert Path(place.config.model).parts[-3:] == ("launch", "builtin", "model")
    assert (place.config.served_model_name, place.config.name) == ("tandem-builtin", "worker")
    (place,) = place_workers({"model": "org/other", "name": "w"}, 1, "ipc:///x")
    assert (place.config.model, place.config.served_model_name, place.config.name) == ("org/other", None, "w")


def test_each_worker_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,7")
    places = place_workers({}, 2, "ipc:///x")
    assert [(place.config.name, dict(place.environment)) for place in places] == [
        ("worker-0", {"CUDA_VISIBLE_DEVICES": "3"}),
        ("worker-1", {"CUDA_VISIBLE_DEVICES": "5"}),
    ]
    with pytest.raises(ConfigurationError, match="each worker needs a GPU of its own, and 3 are visible"):
        place_workers({}, 4, "ipc:///x")
    assert [place.environment for place in place_workers({"device": "cpu"}, 4, "ipc:///x")] == [{}] * 4


def test_visible_gpus_are_counted_from_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus(tmp_path) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus(tmp_path) == []


def test_prompts_are_lines_and_nothing_else_divides_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes("\ufeffone\r\n\n  \ntwo\u2028still two\x0c\x85\nthree".encode())
    assert read_prompts(path) == ["one", "two\u2028still two\x0c\x85", "three"]
    path.write_bytes(b"\xff\n")
    with pytest.raises(ConfigurationError, match="are not UTF-8 text"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("text", "encoding", "line"),
    [
        ("é", "utf-8", '{"text": "é"}'),
        ("é", "ascii", '{"text": "\\u00e9"}'),
        ("a\udce9", "utf-8", '{"text": "a\\udce9"}'),
    ],
)
def test_json_lines_are_json_in_every_encoding(
    text: str, encoding: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert as_line({"text": text}) == line


def test_closed_streams_are_no_traceback() -> None:
    def close() -> None:
        os.closerange(0, 3)

    ended = subprocess.run(
        [sys.executable, "-P", "-m", "tandem.launch.cli", "--version"], preexec_fn=close, timeout=DEADLINE_S
    )
    assert ended.returncode == 0


def test_a_full_disk_is_told_in_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "tandem.launch.cli", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert (ended.returncode, ended.stderr) == (1, "tandem: cannot write the output: No space left on device\n")
