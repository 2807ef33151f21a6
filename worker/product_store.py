"""Which algorithms were found the fastest, kept on disk from start to start."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from .cublaslt import Algorithm
from .product_trials import Case

log = logging.getLogger(__name__)

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


class Store:
    """Choices on disk. They hold for one kind of device and one version of the library and of torch."""

    def __init__(self, folder: Path, made_on: dict[str, Any]) -> None:
        """`made_on`: what they hold for, of JSON's types."""
        name = "-".join(
            "".join(c if c.isalnum() or c in ".+_" else "_" for c in str(part)) for part in made_on.values()
        )
        self.path = folder / f"{name}.json"
        self._made_on = made_on

    def read(self) -> dict[Case, Algorithm | None]:
        """None: torch's is the best. Empty if there are none, or none that can be read."""
        try:
            content = json.loads(self.path.read_text())
            if content["made_on"] != self._made_on:
                return {}
            return dict(self._entry(entry) for entry in content["choices"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be used, and products are tried anew: %s", self.path, error)
            return {}

    def _entry(self, entry: dict[str, Any]) -> tuple[Case, Algorithm | None]:
        case = Case(int(entry["rows"]), int(entry["width"]), int(entry["depth"]), _DTYPES[entry["dtype"]])
        data = entry["algorithm"]
        return case, None if data is None else Algorithm(bytes.fromhex(data), int(entry["workspace"]))

    def write(self, choices: dict[Case, Algorithm | None]) -> None:
        """In one piece, whoever reads or writes meanwhile. A failure is only told: the next start tries anew."""
        entries = [
            {
                "rows": case.rows,
                "width": case.width,
                "depth": case.depth,
                "dtype": _NAMES[case.dtype],
                "algorithm": None if algorithm is None else algorithm.data.hex(),
                "workspace": 0 if algorithm is None else algorithm.workspace,
            }
            for case, algorithm in choices.items()
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"made_on": self._made_on, "choices": entries}, file, indent=1)
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            log.warning("which products are the fastest cannot be kept: %s", error)
