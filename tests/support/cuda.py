"""What GPU tests share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from tandem.worker.inspection import make_batch
from tandem.worker.model import PagedModel

from support.paged import random_tokens
from support.tiny_models import VOCAB

ASLEEP: Final = 5_000_000_000
"""Cycles of the device: more than two seconds."""


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Of the normal distribution, times `scale`, on the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises as far as torch notices. So does anything else at the end: the
    device sleeps first, and what only has been queued meanwhile is done before it wakes up. Whatever is compiled or
    allocated on first use must have been used."""
    torch.cuda.synchronize()
    torch.cuda._sleep(ASLEEP)
    awake = torch.cuda.Event()
    awake.record()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not awake.query(), "the host has waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(model: PagedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """A step of two decoding rows of one sequence, captured once and replayed with other lengths and blocks: its
    logits, and those of an ordinary step. The model's vocabulary is VOCAB."""
    model.allocate_kv_cache(40, 16)
    tokens = torch.tensor(random_tokens(300, VOCAB, 0), device="cuda")
    table = list(range(20))
    model.hidden(make_batch([(tokens, table, 0, 290)], 0, 16, 40, model.device))
    static, *batches = [
        make_batch([(tokens, table, at, at + 1), (tokens, table, at + 1, at + 2)], 2, 16, 40, model.device)
        for at in (250, 3, 140, 250)
    ]
    expected = [model.logits(model.hidden(batch)) for batch in batches]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.logits(model.hidden(static))
    for batch, wanted in zip(batches, expected, strict=True):
        for name in ("token_ids", "positions", "kv_slots", "row_of_token", "block_tables", "kv_lens"):
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        yield captured, wanted
