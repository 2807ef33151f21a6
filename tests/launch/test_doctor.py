"""`tandem doctor`: says what a worker would do, and when it would not start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.launch import doctor
from tandem.worker.config import WorkerConfig
from tandem.worker.memory import count_blocks
from tandem.worker.probe import probe

from support.commands import tandem
from support.paged import load, quiet
from support.tiny_models import save_tiny

pytestmark = pytest.mark.thorough


def said(*flags: str) -> tuple[int, dict[str, Any], dict[str, dict[str, str]]]:
    """Exit code, what the worker's code found, and the findings by topic."""
    with tandem("doctor", "--json", "--device", "cpu", *flags, environment={}) as command:
        code = command.finish(300.0)
    report = json.loads(command.output[command.output.index("{") :])
    return code, report["probe"], {one["topic"]: one for one in report["findings"]}


def test_a_machine_without_a_gpu_is_fine() -> None:
    code, found, findings = said()
    assert code == 0
    assert not [one for one in findings.values() if one["level"] == "problem"]
    assert found["device"] == "cpu"
    assert findings["model"]["says"].startswith("tandem-builtin: LlamaForCausalLM, 6 layers, float32")
    assert "it needs a CUDA device, not cpu" in findings["attention"]["says"]
    assert "10,922 blocks of 16 tokens" in findings["KV cache"]["says"]
    assert {"tandem", "packages", "processor", "GPU", "open files", "address", "/dev/shm"} <= set(findings)


def test_what_would_not_start_is_a_problem() -> None:
    code, _, findings = said("--kv-cache-memory-bytes", "100000")
    assert code == 1
    assert findings["model"]["level"] == "ok"
    assert findings["options"]["level"] == "problem"
    assert (
        "has room for 1 blocks of 16 tokens, but one request of max_model_len 4096 needs 256"
        in (findings["options"]["says"])
    )


def test_a_report_for_people_ends_with_the_verdict(tmp_path: Path) -> None:
    with tandem("doctor", "--model", str(tmp_path / "nowhere"), environment={}) as command:
        assert command.finish(300.0) == 1
    assert "1 problem: a service with these options would not start." in command.output
    assert "no such folder" in command.output
    assert "Traceback" not in command.output


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("qwen2", {"max_model_len": 100, "max_num_seqs": 3, "block_size": 8, "dtype": "bfloat16"}),
        ("qwen3_moe", {"kv_cache_memory_bytes": 3_000_000, "max_model_len": 512}),
        ("gemma2", {"num_gpu_blocks_override": 77}),
    ],
)
def test_a_probe_without_weights_finds_what_a_worker_with_them_does(
    arch: str, options: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(arch, tmp_path)
    config = WorkerConfig.model_validate({"scheduler": "ipc:///x", "model": str(tmp_path), "device": "cpu", **options})
    found = probe(config)
    assert "problem" not in found, found
    model = load(tmp_path, dtype=config.dtype)
    assert found["num_blocks"] == count_blocks(config, model, found["max_model_len"], quiet)
    assert found["block_bytes"] == model.kv_bytes_per_block(config.block_size)
    assert found["attention_backend"] == model.attention_backend == "reference"
    assert found["weight_bytes"] == sum(parameter.nbytes for parameter in model.module.parameters())
    assert (found["dtype"], found["layers"]) == (str(model.dtype).removeprefix("torch."), len(model.kv_spec))


def test_a_gpu_that_torch_cannot_use_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "visible_gpus", lambda: ["0"])
    built_without = doctor._no_gpu({"torch": "2.13.0+cpu", "cuda": None}, "580.1")
    assert (built_without.level, "built without CUDA" in built_without.says) == ("warning", True)
    old_driver = doctor._no_gpu({"torch": "2.13.0", "cuda": "13.0", "cuda_said": "too old"}, "470.2")
    assert old_driver.says.startswith("one is there, but torch 2.13.0 for CUDA 13.0 cannot use it with driver 470.2")
    assert "too old" in old_driver.says


def test_asking_for_a_gpu_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = probe(WorkerConfig(scheduler="ipc:///x", model="unused", device="cuda"))
    assert "this machine has no usable CUDA GPU" in found["problem"]
