"""Random tables of sampling features, and whether kernels do with them what plain torch does.

Run as a program under TRITON_INTERPRET=1, it tries small cases on the CPU: with `all` every combination of theirs,
without it every two values.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tandem.protocol.sampling import MAX_BAD_SEQUENCE_TOKENS
from tandem.worker.adjustments import MAX_COUNT, Adjustments
from tandem.worker.features import NOT_YET, NOTHING, StepFeatures, mask_words

from support import triton_interpreter
from support.grids import pairwise
from support.plain_sampling import plain_torch

SPARE_SLOTS: Final = 3
MASKS: Final = {"none": None, "few": 40, "half": 2, "nothing": 10**9}
"""Of how many tokens a mask lets one through."""


@dataclass(frozen=True)
class Case:
    vocab: int
    rows: int
    masks: str
    penalties: bool
    biases: int
    sequences: int

    @property
    def features(self) -> StepFeatures:
        return StepFeatures(
            draws=True,
            penalties=self.penalties,
            min_p=False,
            masks=self.masks != "none",
            biases=self.biases,
            sequences=self.sequences,
            told_rows=NOTHING,
            told_entries=NOTHING,
            prompt=None,
        )


def cases(vocabularies: tuple[int, ...], rows: int, biases: tuple[int, ...], sequences: tuple[int, ...]) -> list[Case]:
    """Every combination that adjusts anything."""
    combined = itertools.product(vocabularies, MASKS, (False, True), biases, sequences)
    return [case for one in combined if (case := Case(one[0], rows, *one[1:])).features.adjusts]


class Tried:
    """The tables of a case, filled at random; a logit in five is -inf, and the second row has one token alone."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self._random = case, torch.Generator().manual_seed(seed)
        slots, vocab = case.rows + SPARE_SLOTS, case.vocab
        self.tables = tables = Adjustments(slots, vocab, device)
        self.slots = torch.randperm(slots, generator=self._random)[: case.rows].to(device)
        self.position = self._integers(0, 50, case.rows).to(device)
        sparse = self._integers(0, 3, slots + 1, vocab) == 0
        tables._seen.copy_(self._integers(0, 8, slots + 1, vocab) * sparse)
        for column, least, most in (
            (tables._repetition, 0.5, 2.0), (tables._presence, -2.0, 2.0), (tables._frequency, -2.0, 2.0),
        ):  # fmt: skip
            column.copy_(torch.rand(slots + 1, generator=self._random) * (most - least) + least)
        tables._min_tokens.copy_(self._integers(0, 60, slots + 1))
        tables._allowed.copy_(self._mask(slots + 1))
        tables._late.copy_(self._mask(slots + 1) | self._mask(slots + 1))
        recent = self._integers(-1, 4, slots + 1, MAX_BAD_SEQUENCE_TOKENS)
        tables._recent.copy_(torch.where(recent < 0, NOT_YET, recent))
        for row, slot in enumerate(self.slots.tolist()):
            self._fill_sequences(slot, int(self.position[row]), recent[slot])
            self._fill_biases(slot)
        logits = torch.randn(case.rows, vocab, generator=self._random) * 5
        logits[self._integers(0, 5, case.rows, vocab) == 0] = float("-inf")
        logits[1] = torch.where(torch.arange(vocab) == 0, 1.0, float("-inf"))
        self.logits = logits.to(device)

    def _integers(self, least: int, end: int, *shape: int) -> Tensor:
        return torch.randint(least, end, shape, generator=self._random, dtype=torch.int32)

    def _mask(self, rows: int) -> Tensor:
        words = mask_words(self.case.vocab)
        kept = self._integers(0, MASKS[self.case.masks] or 2, rows, words, 32) == 0
        packed = (kept.to(torch.int64) << torch.arange(32)).sum(-1)
        return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)

    def _fill_sequences(self, slot: int, position: int, recent: Tensor) -> None:
        """Single tokens, sequences that end with the latest tokens, and others; some take the same token away."""
        table, length = self.tables._sequences[slot].cpu(), MAX_BAD_SEQUENCE_TOKENS
        for number in range(self.case.sequences):
            tokens = self._integers(0, self.case.vocab if number % 2 else min(4, self.case.vocab), 1 + number % 3)
            if number % 4 < 3:
                for back in range(1, len(tokens)):
                    had = int(recent[(position - back) % length])
                    tokens[-1 - back] = max(had, 0)
            table[number, length - len(tokens) :] = tokens
        self.tables._sequences[slot] = table.to(self.slots.device)

    def _fill_biases(self, slot: int) -> None:
        count = min(int(self._integers(0, self.case.biases + 1, 1)), self.case.vocab)
        tokens = torch.randperm(self.case.vocab, generator=self._random)[:count]
        self.tables._bias_token[slot, :count] = tokens.to(self.slots.device, torch.int32)
        self.tables._bias[slot, :count] = (torch.randn(count, generator=self._random) * 10).to(self.slots.device)

    def differences(self) -> Iterator[str]:
        """Where the kernels, called as they are, and plain torch part."""
        from tandem.worker import adjusting

        case, tables = self.case, self.tables
        by_kernel = adjusting.adjust(
            self.logits, self.slots, self.position, tables._tables(), masks=case.masks != "none",
            penalties=case.penalties, biases=case.biases, sequences=case.sequences,
        )  # fmt: skip
        with plain_torch():
            plain = tables.apply(case.features, self.logits, self.slots, self.position)
        if not torch.equal(by_kernel, plain):
            yield f"logits at {(by_kernel != plain).nonzero()[:5].tolist()}"
        tokens = self._integers(0, case.vocab, case.rows).to(self.slots.device, torch.int64)
        tables._seen[self.slots[0], tokens[0]] = 2 * MAX_COUNT + 1
        before = tables._seen.clone(), tables._recent.clone()
        adjusting.note(
            self.slots, self.position, tokens, tables._tables(), penalties=case.penalties,
            sequences=case.sequences > 0, most=2 * MAX_COUNT,
        )  # fmt: skip
        noted = tables._seen.clone(), tables._recent.clone()
        tables._seen.copy_(before[0])
        tables._recent.copy_(before[1])
        with plain_torch():
            tables.note(case.features, self.slots, self.position, tokens)
        if not (torch.equal(noted[0], tables._seen) and torch.equal(noted[1], tables._recent)):
            yield "what was noted"


def main() -> None:
    from tandem.worker import adjusting

    small: Any = adjusting
    small._TILE, small._LANES = 64, 16  # several of each in small cases
    tried = cases((5, 129, 300), 3, (0, 3, 40), (0, 2, 20))
    if "all" not in sys.argv:
        tried = [Case(*cell) for cell in pairwise([astuple(case) for case in tried])]
    for number, case in enumerate(tried):
        for difference in Tried(case, torch.device("cpu"), number).differences():
            raise SystemExit(f"{case}: {difference}")
    print(f"{len(tried)} cases equal, interpreted: {triton_interpreter.ON}")


if __name__ == "__main__":
    main()
