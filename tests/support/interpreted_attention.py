"""The decode kernel in Triton's interpreter, on a CPU: `TRITON_INTERPRET=1 python -P -m support.interpreted_attention`.

Kernels overlap here in the worst way: for each program anew, what the kernel before writes (the query, the step's new
keys and values) is NaN until `gdc_wait`. So a program that reads any of it too early shows.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from triton.runtime import interpreter

from support import triton_interpreter
from support.decode_cases import BLOCK_SIZE, WAYS, DecodeCase, Shape, make_case, worst_error

kernels: Any = importlib.import_module("tandem.worker.attention.kernels")
LENGTHS = (1, 64, 65, 300)
CASES: tuple[tuple[Shape, torch.dtype], ...] = (
    ((8, 2, 64, None, None), torch.float16),  # the interpreter multiplies no bfloat16
    ((6, 2, 96, 100, 5.0), torch.float8_e4m3fn),
)
CUTS = (None, 1, 5, 20)


class KernelBefore:
    """Stands for the kernel that is launched right before."""

    def __init__(self, case: DecodeCase) -> None:
        self._case = case
        newest = [
            case.blocks(row)[(length - 1) // BLOCK_SIZE] * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
            for row, length in enumerate(case.lengths)
        ]
        self._newest = torch.stack(newest)
        # Bytes, since float8 knows no indexing.
        self._places = [cache.view(torch.uint8).flatten(0, 1) for cache in (case.keys, case.values)]
        self._written = [place[self._newest].clone() for place in self._places]
        self._query = case.query.clone()
        self.ended = self.next_let_in = False

    def end(self) -> None:
        assert not self.ended, "a program waits once"
        self.ended = True
        self._case.query.copy_(self._query)
        for place, written in zip(self._places, self._written, strict=True):
            place[self._newest] = written

    def let_next_in(self) -> None:
        assert self.ended, "the next kernel is let in before this one has waited"
        assert not self.next_let_in, "the next kernel is let in before the program's last piece"
        self.next_let_in = True

    def begin(self) -> None:
        """Another program begins: nothing is written yet."""
        self.ended = self.next_let_in = False
        self._case.query.fill_(float("nan"))
        for place in self._places:
            place[self._newest] = 255  # a NaN in 16 and in 8 bits


def run(shape: Shape, dtype: torch.dtype, name: str) -> None:
    way = WAYS[name]
    case = make_case(LENGTHS, shape, dtype, torch.device("cpu"), 20, torch.float16)
    expected = case.expected()
    before = KernelBefore(case)
    kernels.gdc_wait, kernels.gdc_launch_dependents = before.end, before.let_next_in
    place = type(interpreter.interpreter_builder).set_grid_idx

    def begin_program(*index: int) -> None:
        before.begin()
        place(interpreter.interpreter_builder, *index)

    interpreter.interpreter_builder.set_grid_idx = begin_program
    for cut in CUTS:
        pieces = cut if cut is None or way.even else cut + len(LENGTHS)
        found = case.attended(way, pieces)
        error = worst_error(found, expected)
        assert error < 1e-2, f"{shape} {dtype} {name} cut {cut}: relative error {error}"
        assert not case.scratch.arrived.any(), "a counter of arrivals was left behind"


def main() -> None:
    assert triton_interpreter.ON, "needs TRITON_INTERPRET=1"
    kernels.overlap_options = lambda _device: {"OVERLAP": True}
    for shape, dtype in CASES:
        for name in ("equal", "even"):  # stages are nothing to the interpreter
            run(shape, dtype, name)
            print(*shape, dtype, name, "exact")


if __name__ == "__main__":
    main()
