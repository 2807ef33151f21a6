"""Which device a worker takes, and what it promises there."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import pytest
import torch

from tandem.protocol.errors import ConfigurationError
from tandem.worker.config import WorkerConfig
from tandem.worker.model import choose_backend
from tandem.worker.process import choose_device
from tandem.worker.sources import LoadError


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_batch_invariance_on_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options: dict[str, Any] = {"scheduler": "ipc:///nowhere", "model": "none", "batch_invariant": True}
    with pytest.raises(ConfigurationError, match="--batch-invariant on a GPU needs the package triton"):
        choose_device(WorkerConfig.model_validate({**options, "device": device}))
    assert choose_device(WorkerConfig.model_validate({**options, "device": "cpu"})) == torch.device("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_device(WorkerConfig.model_validate({**options, "device": device})) == torch.device("cuda", 0)


def test_batch_invariance_on_a_gpu_has_attention_of_its_own() -> None:
    cuda, dtype = torch.device("cuda"), torch.bfloat16
    assert choose_backend("auto", (), dtype, cuda, batch_invariant=True) == "invariant"
    assert choose_backend("auto", (), dtype, torch.device("cpu"), batch_invariant=True) == "reference"
    others: list[Literal["flashinfer", "reference"]] = ["flashinfer", "reference"]
    for wanted in others:
        with pytest.raises(LoadError, match=f"'{wanted}' cannot be used: it is not batch-invariant on CUDA"):
            choose_backend(wanted, (), dtype, cuda, batch_invariant=True)
