"""Where a model comes from, as far as it can be told without torch, which takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from ..protocol.errors import ConfigurationError


class LoadError(ConfigurationError):
    """A model cannot be served; the message names what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from. `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` hold for hub ids."""

    model: str
    """A folder with config.json, or a hub id."""
    revision: str | None = None
    trust_remote_code: bool = False
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    seed: int = 0
    """Seed of dummy weights."""


def folder_here(source: ModelSource) -> Path | None:
    """The folder that was named, or None if a hub id was. Raises LoadError for a folder that is none, or no model's."""
    try:
        folder = Path(source.model).expanduser()
        found = folder.is_dir()
    except (OSError, RuntimeError) as error:  # of a name that is too long, a folder that is not open, ~nobody
        raise LoadError(f"--model {source.model} cannot be looked up: {error}") from error
    if found:
        if not (folder / "config.json").is_file():
            raise LoadError(f"{folder} holds no config.json, so it is not a transformers model")
        if source.revision is not None:
            raise LoadError(
                f"--revision {source.revision} chooses among the versions of a hub model, but --model {source.model} "
                "is a folder, which has one; leave --revision out"
            )
        return folder
    if source.model.startswith((".", "/", "~")) or source.model.count("/") > 1:
        raise LoadError(f"no such folder: {source.model}{alike(source.model)}")
    return None


def alike(model: str) -> str:
    """What folder may have been meant, as the end of a sentence; empty if none is named nearly so."""
    path = Path(model)
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    found = get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"; did you mean {path.parent / found[0]}?" if found else ""
