"""A worker without a model: follows plans to the letter and keeps, as its KV cache, the tokens themselves.

The token that follows a sequence is a hash of all tokens before it, *read back from the cache through the block table*.
So a stale block table, a block whose contents were not what the scheduler took them for, or a token computed twice or
never shows as a wrong token. Blocks may be shared, but a shared one is never written. A row that joins with computed
tokens must find exactly these in its blocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tandem.protocol.messages import StepPlan

HOLE = -7
"""What a cache position holds before anything was written there."""


def next_token(sequence: list[int], vocab: int, seed: int = 0) -> int:
    """The token that follows: any function of the seed and the whole sequence will do."""
    value = 1469598103934665603 ^ seed
    for token in sequence:
        value = ((value ^ (token + 1)) * 1099511628211) & (2**64 - 1)
    return (value >> 20) % vocab


def continuation(
    prompt: list[int], limit: int, stops: frozenset[int], vocab: int, seed: int = 0
) -> tuple[list[int], str]:
    """What an undisturbed request receives, and why it ends; `limit` counts the prompt too."""
    sequence = list(prompt)
    while len(sequence) < limit:
        sequence.append(next_token(sequence, vocab, seed))
        if sequence[-1] in stops:
            return sequence[len(prompt) :], "stop"
    return sequence[len(prompt) :], "length"


@dataclass
class SimulatedRow:
    tokens: list[int]
    computed: int
    blocks: list[int]
    seed: int = 0
    decoding: bool = False


@dataclass
class SimulatedWorker:
    """Takes plans at once and computes them when asked, in order, as a device would."""

    num_blocks: int
    block_size: int
    slots: int
    max_tokens: int
    vocab: int
    plans: deque[StepPlan] = field(default_factory=deque)
    rows: dict[int, SimulatedRow] = field(default_factory=dict)
    sampled: int = 0
    """Tokens sampled so far, wanted or not."""
    chunk_tokens: int = 0
    """Known tokens computed so far, those of prompts and of earlier attempts."""
    largest_step: int = 0
    touched: list[list[int]] = field(default_factory=list)
    """Known tokens of the rows that the last step computed, as they were before it."""

    def __post_init__(self) -> None:
        self.cache = np.full((self.num_blocks, self.block_size), HOLE, np.int64)

    def compute(self) -> tuple[int, list[int]]:
        """Executes the oldest plan; returns its step and tokens."""
        plan = self.plans.popleft()
        self._apply(plan)
        decoding = sorted(slot for slot, row in self.rows.items() if row.decoding)
        total = len(decoding) + int(plan.chunk_length.sum())
        assert 0 < total <= self.max_tokens, f"plan {plan.step} has {total} tokens"
        self.largest_step = max(self.largest_step, total)
        self.touched = [list(self.rows[slot].tokens) for slot in (*decoding, *plan.chunk_slot.tolist())]
        sampling = [self.rows[slot] for slot in decoding]
        for row in sampling:
            self._write(row, 1)
        for slot, length in zip(plan.chunk_slot.tolist(), plan.chunk_length.tolist(), strict=True):
            row = self.rows[slot]
            assert not row.decoding
            assert 0 < length <= len(row.tokens) - row.computed
            self._write(row, length)
            self.chunk_tokens += length
            if row.computed == len(row.tokens):
                row.decoding = True
                sampling.append(row)
        tokens = [self._sample(row) for row in sampling]
        self.sampled += len(tokens)
        return plan.step, tokens

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.leave.tolist():
            del self.rows[slot]
        starts = np.concatenate([[0], np.cumsum(plan.join_length)])
        block_starts = np.concatenate([[0], np.cumsum(plan.join_num_blocks)])
        for index, slot in enumerate(plan.join_slot.tolist()):
            assert slot not in self.rows, f"slot {slot} joins twice"
            assert 0 <= slot < self.slots
            row = self.rows[slot] = SimulatedRow(
                tokens=plan.join_token[starts[index] : starts[index + 1]].tolist(),
                computed=int(plan.join_computed[index]),
                blocks=plan.join_block[block_starts[index] : block_starts[index + 1]].tolist(),
                seed=int(plan.join_seed[index]),
            )
            assert row.computed < len(row.tokens), f"slot {slot} joins with nothing to compute"
            assert self._cached(row) == row.tokens[: row.computed], f"slot {slot} joins with blocks of other contents"
        for slot, block in zip(plan.grow_slot.tolist(), plan.grow_block.tolist(), strict=True):
            self.rows[slot].blocks.append(block)

    def _write(self, row: SimulatedRow, length: int) -> None:
        first, last = row.computed // self.block_size, (row.computed + length - 1) // self.block_size
        for block in row.blocks[first : last + 1]:
            owners = sum(block in other.blocks for other in self.rows.values())
            assert owners == 1, f"block {block} is written, and {owners} rows own it"
        for position in range(row.computed, row.computed + length):
            self.cache[row.blocks[position // self.block_size], position % self.block_size] = row.tokens[position]
        row.computed += length

    def _cached(self, row: SimulatedRow) -> list[int]:
        """What the cache holds where the row's computed tokens should stand."""
        positions = range(row.computed)
        return [int(self.cache[row.blocks[p // self.block_size], p % self.block_size]) for p in positions]

    def _sample(self, row: SimulatedRow) -> int:
        row.tokens.append(next_token(self._cached(row), self.vocab, row.seed))
        return row.tokens[-1]
