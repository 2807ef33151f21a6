"""Which device a worker takes, and what it promises there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tandem.protocol.errors import ConfigurationError
from tandem.worker.config import WorkerConfig
from tandem.worker.process import choose_device


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_batch_invariance_is_refused_where_it_is_not_shown(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options: dict[str, Any] = {"scheduler": "ipc:///nowhere", "model": "none", "batch_invariant": True}
    with pytest.raises(ConfigurationError, match="--batch-invariant"):
        choose_device(WorkerConfig.model_validate({**options, "device": device}))
    assert choose_device(WorkerConfig.model_validate({**options, "device": "cpu"})) == torch.device("cpu")
