"""How long fuzzing takes: one round of examples in a normal run, as many as fit into TANDEM_FUZZ_S seconds for each
test under `make fuzz`; and values that are near what the wire takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("TANDEM_FUZZ_S", "0"))
FIRST_SEED = int(os.environ.get("TANDEM_FUZZ_SEED", "0"))

BORDERS = (0, 1, 2, 49, 50, 63, 64, 65, 127, 128, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
integers = st.one_of(st.sampled_from(BORDERS), st.sampled_from([-1, -2, -(2**31), -(2**63)]), st.integers(-10, 100))
scalars = st.one_of(
    st.none(), st.booleans(), integers, st.floats(width=64), st.text(max_size=8), st.binary(max_size=16),
    st.sampled_from(["x" * 257, "y" * 20_000, b"\0" * 4_096]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.text(max_size=8), integers), inner, max_size=5),
    ),
    max_leaves=12,
)
"""Anything that msgpack can say, as a rule small."""


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes of `data` changed, left out, put in or repeated."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(out)))
        how = draw(st.sampled_from(["change", "cut", "insert", "repeat", "truncate"]))
        if how == "change" and at < len(out):
            out[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del out[at : at + draw(st.integers(1, 8))]
        elif how == "insert":
            out[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif how == "repeat":
            out[at:at] = out[at : at + draw(st.integers(1, 32))]
        else:
            del out[at:]
    return bytes(out)


def fuzz(strategy: st.SearchStrategy[Any], examples: int, test: Callable[[Any], None]) -> None:
    """Runs `test` on `examples` of the strategy, and again with other seeds while there is time."""
    end = time.monotonic() + SECONDS
    number = FIRST_SEED
    while True:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
        one_round = settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=checks, derandomize=False
        )
        seed(number)(one_round(given(strategy)(test)))()
        number += 1
        if time.monotonic() >= end:
            return
