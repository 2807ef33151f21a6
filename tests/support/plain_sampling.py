"""Sampling in plain torch, whatever the switch says: what kernels are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tandem.worker import sampler


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within, `sampler.BY_KERNELS` is off."""
    before = sampler.BY_KERNELS
    sampler.BY_KERNELS = False
    try:
        yield
    finally:
        sampler.BY_KERNELS = before
