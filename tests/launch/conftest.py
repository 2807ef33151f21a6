"""A private runtime directory, so that tests neither meet the user's own service nor leave anything in its place."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.model_folder import write_model_folder


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """$XDG_RUNTIME_DIR of this process and of those that it starts. Short: a socket's path has 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="td-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.delenv("TANDEM_ADDRESS", raising=False)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, a tokenizer and a chat template."""
    return write_model_folder(tmp_path_factory.mktemp("model"), max_model_len=8192)


@pytest.fixture
def engine(model_folder: Path) -> list[str]:
    """Flags that start that model on the CPU."""
    return ["--model", str(model_folder), "--load-format", "dummy", "--device", "cpu", "--threads", "1"]
