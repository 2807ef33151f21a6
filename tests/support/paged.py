"""Driving a PagedModel by hand: sequences with scattered blocks, computed in any pieces, in any company."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.worker.inspection import make_batch
from tandem.worker.model import PagedModel, load_model
from tandem.worker.sources import ModelSource

from support.tiny_models import VOCAB, save_tiny


def quiet(_what: str, _share: float) -> None:
    """Progress that nobody watches."""


def load(folder: Path | str, **changes: Any) -> PagedModel:
    """`load_model` of a folder on the CPU in its own dtype, with changes."""
    options: dict[str, Any] = {
        "dtype": "auto",
        "device": "cpu",
        "attention_backend": "auto",
        "batch_invariant": False,
        "lanes": 2,
        "progress": quiet,
    }
    source = ModelSource(str(folder), trust_remote_code=changes.pop("trust_remote_code", False))
    return load_model(source, **{**options, **changes})


def load_tiny(arch: str, folder: Path, **changes: Any) -> tuple[PagedModel, PreTrainedModel]:
    """A tiny model twice: ours, and transformers' own."""
    own = save_tiny(arch, folder)
    return load(folder, **changes), own


class Sequences:
    """Sequences of one model, each over blocks taken at random, computed as far as `done` says."""

    def __init__(
        self, model: PagedModel, *, num_blocks: int = 96, block_size: int = 8, seed: int = 0, in_pieces: bool = False
    ) -> None:
        """`in_pieces`: by captured graphs where the model has captured such steps."""
        model.allocate_kv_cache(num_blocks, block_size)
        self.model = model
        self.in_pieces = in_pieces
        self.block_size = block_size
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.tokens: list[list[int]] = []
        self.tables: list[list[int]] = []
        self.done: list[int] = []
        self.lane = 0

    def add(self, tokens: Sequence[int]) -> int:
        """A new sequence; returns its number."""
        self.tokens.append(list(tokens))
        self.tables.append([])
        self.done.append(0)
        return len(self.tokens) - 1

    def forget(self, sequence: int) -> None:
        """What a preemption does: its blocks are given away, its tokens stay."""
        self.free.extend(self.tables[sequence])
        self.tables[sequence] = []
        self.done[sequence] = 0

    def step(self, pieces: Sequence[tuple[int, int]]) -> dict[int, Tensor]:
        """Compute (sequence, number of tokens) pieces in one batch, single tokens first: logits of each piece."""
        ordered = sorted(pieces, key=lambda piece: piece[1] != 1)
        rows = []
        for sequence, count in ordered:
            start, end = self.done[sequence], self.done[sequence] + count
            table = self.tables[sequence]
            while len(table) * self.block_size < end:
                table.append(self.free.pop())
            rows.append((torch.tensor(self.tokens[sequence], device=self.model.device), table, start, end))
            self.done[sequence] = end
        decode_rows = sum(count == 1 for _, count in ordered)
        self.lane = (self.lane + 1) % self.model.lanes
        batch = make_batch(
            rows, decode_rows, self.block_size, self.model.scratch_block, self.model.device, lane=self.lane
        )
        hidden = self.model.hidden(batch, in_pieces=self.in_pieces)
        lengths = [count for _, count in ordered]
        logits = self.model.logits(hidden).split(lengths)
        return {sequence: part for (sequence, _), part in zip(ordered, logits, strict=True)}


def random_tokens(count: int, vocab: int, seed: int) -> list[int]:
    """Ordinary token ids (the first four are special)."""
    rng = random.Random(seed)
    return [rng.randrange(4, vocab) for _ in range(count)]


def compute_randomly(sequences: Sequences, seed: int, forget: float = 0.0) -> list[Tensor]:
    """All sequences to their ends in random pieces and company, some forgotten on the way: [length, vocab] each."""
    rng = random.Random(seed)
    found: list[dict[int, Tensor]] = [{} for _ in sequences.tokens]
    while open_ones := [s for s, tokens in enumerate(sequences.tokens) if sequences.done[s] < len(tokens)]:
        for sequence in open_ones:
            if rng.random() < forget:
                sequences.forget(sequence)
        chosen = rng.sample(open_ones, rng.randint(1, len(open_ones)))
        pieces = []
        for sequence in chosen:
            left = len(sequences.tokens[sequence]) - sequences.done[sequence]
            pieces.append((sequence, 1 if rng.random() < 0.4 else rng.randint(1, min(left, 40))))
        starts = list(sequences.done)
        for sequence, logits in sequences.step(pieces).items():
            for offset, row in enumerate(logits):
                found[sequence][starts[sequence] + offset] = row
    return [torch.stack([rows[at] for at in range(len(rows))]) for rows in found]


def check_any_batch(model: PagedModel, own: PreTrainedModel, tolerance: float | None) -> None:
    """In batch-invariant mode: whole prompts in turn, token by token, and in random pieces and company with some
    forgotten on the way, over blocks of 8 and of 16: the same bits; and, but for the tolerance, what transformers' own
    model gives (None: not compared)."""
    prompts = [random_tokens(length, VOCAB, number) for number, length in enumerate((1, 2, 15, 16, 17, 41, 140))]

    def sequences(block_size: int) -> Sequences:
        made = Sequences(model, block_size=block_size, seed=block_size)
        for prompt in prompts:
            made.add(prompt)
        return made

    alone = sequences(16)
    expected = [alone.step([(s, len(prompt))])[s] for s, prompt in enumerate(prompts)]
    for prompt, logits in zip(prompts, expected, strict=True):
        if tolerance is not None:
            with torch.no_grad():
                exact = own(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(logits.cpu(), exact, rtol=tolerance, atol=tolerance)
    one_by_one = sequences(8)
    tokens = [one_by_one.step([(5, 1)])[5] for _ in prompts[5]]
    assert torch.equal(torch.cat(tokens), expected[5])
    for block_size in (8, 16):
        mixed = compute_randomly(sequences(block_size), seed=block_size, forget=0.05)
        for logits, wanted in zip(mixed, expected, strict=True):
            assert torch.equal(logits, wanted)
