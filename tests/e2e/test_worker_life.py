"""A worker process from its options to its end: asked to stop at any moment, told what cannot work, left by its
scheduler."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tandem import Client
from tandem.protocol.status import StatusPipe
from tandem.worker.config import WorkerConfig
from tandem.worker.describe import SAMPLE_BYTES, SAMPLES, default_name, fingerprint
from tandem.worker.loading import local_folder
from tandem.worker.main import _explain
from tandem.worker.sources import LoadError, ModelSource

from support.deadlines import DEADLINE_S
from support.tiny_models import save_tiny


class Process:
    """`python -m tandem.<module>` with what it says on its status pipe."""

    def __init__(self, module: str, options: dict[str, Any], stderr: Path) -> None:
        self._statuses, write_end = os.pipe()
        self._unread = b""
        self._stderr = stderr
        with stderr.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"tandem.{module}", "--config-json", json.dumps(options)]
                + ["--status-fd", str(write_end)],
                pass_fds=(write_end,),
                stdin=subprocess.DEVNULL,
                stderr=file,
            )
        os.close(write_end)

    def statuses(self) -> Iterator[dict[str, Any]]:
        """What it says, line by line, until it ends."""
        end = time.monotonic() + DEADLINE_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._statuses, selectors.EVENT_READ)
            while True:
                line, newline, rest = self._unread.partition(b"\n")
                if newline:
                    self._unread = rest
                    yield json.loads(line)
                    continue
                assert selector.select(max(0.0, end - time.monotonic())), "it says nothing and does not end"
                data = os.read(self._statuses, 65_536)
                if not data:
                    return
                self._unread += data

    def wait_for(self, word: str) -> None:
        """Until a status mentions `word`."""
        seen = []
        for status in self.statuses():
            seen.append(status)
            if word in json.dumps(status):
                return
        pytest.fail(f"ended without {word!r}, after {seen}: {self.words()}")

    def words(self) -> str:
        return self._stderr.read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._statuses)


class Place:
    """A directory for sockets, a model, and the processes that a test starts."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.address = f"ipc://{folder}/run"
        self.options = {
            "model": str(model),
            "device": "cpu",
            "threads": 1,
            "max_model_len": 256,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
        }
        self.started: list[Process] = []

    def _start(self, module: str, options: dict[str, Any]) -> Process:
        self.started.append(Process(module, options, self.folder / f"stderr-{len(self.started)}"))
        return self.started[-1]

    def worker(self, **changes: Any) -> Process:
        return self._start("worker.main", {"scheduler": self.address, **self.options, **changes})

    def scheduler(self) -> Process:
        made = self._start("scheduler.main", {"address": self.address})
        made.wait_for("ready")
        return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    return folder


@pytest.fixture
def place(model: Path) -> Iterator[Place]:
    made = Place(Path(tempfile.mkdtemp(prefix="tw-")), model)
    yield made
    for process in made.started:
        process.close()
    shutil.rmtree(made.folder)


@pytest.mark.parametrize(
    ("moment", "number"),
    [("importing", signal.SIGTERM), ("importing", signal.SIGINT), ("reading the config", signal.SIGTERM)],
)
def test_a_worker_ends_whenever_it_is_asked_to(moment: str, number: signal.Signals, place: Place) -> None:
    worker = place.worker()
    worker.wait_for(moment)
    worker.process.send_signal(number)
    assert worker.process.wait(DEADLINE_S) == 0
    assert worker.words() == ""


def test_a_process_that_cannot_end_by_itself_is_ended() -> None:
    """Whatever keeps the interrupted main thread busy: a device that hangs, a library that swallows exceptions."""
    code = (
        "import threading, tandem.worker.stopping as stopping\n"
        "stopping.LAST_RESORT_S = 0.1\n"
        "stopping.StopSignals(lambda: None)\n"
        "print('up', flush=True)\n"
        "threading.Event().wait()\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            process.terminate()
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


def test_a_worker_lives_through_its_scheduler_and_ends_when_asked_to(place: Place) -> None:
    """It waits for a scheduler whose directory does not exist yet; kill -9 takes that away, and another comes."""
    worker = place.worker()
    worker.wait_for('"ready"')
    first = place.scheduler()
    answers = [answer(place.address)]
    first.process.kill()
    first.process.wait()
    place.scheduler()
    answers.append(answer(place.address))
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in worker.words()


def answer(address: str) -> list[int]:
    with Client(address) as client:
        return list(client.generate([5, 6, 7], temperature=0.0, max_tokens=8, ignore_eos=True).token_ids)


@pytest.mark.parametrize(
    ("changes", "story"),
    [
        ({"scheduler": "tcp://*:5", "insecure": True}, "cannot connect"),
        ({"scheduler": "tcp://127.0.0.1:5"}, "--insecure"),
        ({"seed": 3}, "seed (3)"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_loaded(changes: dict[str, Any], story: str, place: Place) -> None:
    worker = place.worker(**changes)
    (status,) = worker.statuses()
    assert status["event"] == "error"
    assert story in status["message"]
    assert worker.process.wait(DEADLINE_S) == 2
    assert "Traceback" not in worker.words()


def test_a_python_without_docstrings_is_refused() -> None:
    config = '{"scheduler": "ipc:///tmp/nobody", "model": "x"}'
    command = [sys.executable, "-OO", "-P", "-m", "tandem.worker.main", "--config-json", config]
    run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "use -O" in run.stderr


def test_a_directory_of_others_is_refused(place: Place) -> None:
    run = place.folder / "run"
    run.mkdir()
    run.chmod(0o755)
    worker = place.worker()
    (status,) = worker.statuses()
    assert "other users may enter it" in status["message"]
    assert worker.process.wait(DEADLINE_S) == 2


def test_what_nobody_foresaw_is_one_line_and_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    read_end, write_end = os.pipe()
    try:
        assert _explain(RuntimeError("CUDA error: an illegal memory access\nmore of it"), StatusPipe(write_end)) == 1
        told = json.loads(os.read(read_end, 65_536))
    finally:
        os.close(read_end)
        os.close(write_end)
    assert told == {"event": "error", "message": "RuntimeError: CUDA error: an illegal memory access"}
    words = capfd.readouterr().err
    assert "more of it" in words
    assert words.endswith("tandem worker: RuntimeError: CUDA error: an illegal memory access\n")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"seed": 0}, ["seed", "load_format"]),
        ({"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": 10**9}, ["gpu_memory_util", "kv_cache_memory"]),
        ({"gpu_memory_utilization": 0.9, "num_gpu_blocks_override": 9}, ["gpu_memory_utilization", "num_gpu_blocks"]),
        ({"kv_cache_memory_bytes": 10**9, "num_gpu_blocks_override": 9}, ["kv_cache_memory_bytes", "num_gpu_blocks"]),
        ({"gpu_memory_utilization": 0.9, "device": "cpu"}, ["gpu_memory_utilization", "device"]),
        ({"max_cudagraph_capture_size": 8, "enforce_eager": True}, ["max_cudagraph_capture_size (8)", "enforce_eager"]),
        ({"max_cudagraph_capture_size": 8, "device": "cpu"}, ["max_cudagraph_capture_size (8)", "device"]),
        ({"max_cudagraph_capture_size": 999, "max_num_seqs": 9}, ["max_cudagraph_capture_size (999)", "(9)"]),
    ],
)
def test_options_of_which_one_would_be_ignored_are_refused(options: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        WorkerConfig(scheduler="ipc:///x", model="m", **options)
    for name in names:
        assert name in str(caught.value)


def test_a_config_that_travels_as_json_says_the_same() -> None:
    config = WorkerConfig(scheduler="ipc:///x", model="m", device="cpu", kv_cache_memory_bytes=10**9)
    assert WorkerConfig.model_validate_json(config.model_dump_json()) == config


def test_a_folder_has_no_revisions(model: Path) -> None:
    with pytest.raises(LoadError, match=r"--revision main .* is a folder"):
        local_folder(ModelSource(str(model), revision="main"))


def test_a_hub_model_is_served_under_its_full_id_and_a_folder_under_its_last_part(model: Path) -> None:
    assert default_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert default_name(str(model)) == default_name(f"{model}/") == model.name


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_fine_tunes_have_fingerprints_of_their_own(where: float, tmp_path: Path) -> None:
    """Equal sizes and names, and the file too large to be hashed in full: a long part of it differs."""
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    long = torch.zeros(4 * SAMPLES * SAMPLE_BYTES, dtype=torch.uint8)
    save_file({**tensors, "more": long}, path)
    before = fingerprint(ModelSource(str(tmp_path)))
    assert before == fingerprint(ModelSource(str(tmp_path)))
    size = len(long) // 10
    start = int(where * (len(long) - size))
    long[start : start + size] = 1
    save_file({**tensors, "more": long}, path)
    assert fingerprint(ModelSource(str(tmp_path))) != before
