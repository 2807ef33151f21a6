"""What the scheduler's data are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypeVar, dataclass_transform

import numpy as np
import numpy.typing as npt

IntColumn: TypeAlias = npt.NDArray[np.int32]
LongColumn: TypeAlias = npt.NDArray[np.int64]
FloatColumn: TypeAlias = npt.NDArray[np.float32]
BoolColumn: TypeAlias = npt.NDArray[np.bool_]

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def record(cls: type[_T]) -> type[_T]:
    """Makes a dataclass whose fields nobody assigns to. The type checker sees to that: at run time a frozen class takes
    three times as long to make."""
    return dataclass(slots=True)(cls)
