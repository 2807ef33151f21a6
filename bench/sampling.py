"""What choosing tokens costs: `python -m tandem.bench.sampling`, a model's last product and what follows, for one step.

The least is the product and the search for the likeliest token, as greedy rows have it. Beside it, on the same rows in
the same run: temperature alone, top-p alone, and every feature of sampling on in every row. On CUDA all of it is
measured with plain torch and with the kernels (`worker/drawing/`), and their tokens must be the same. Rounds take the
cases in turn, so that a clock that changes changes all of them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from torch import Tensor

from ..worker import operators, sampler
from ..worker.adjustments import Adjustments
from ..worker.features import StepFeatures
from ..worker.sampler import SamplingColumns, sample
from .machine import describe_machine

BIASES: Final = 16
"""Of each row."""
BAD_WORDS: Final = 8
"""Sequences of each row."""
SPREAD: Final = 2.5
"""Standard deviation of the logits."""
WARM_UPS: Final = 2
FORWARD_CYCLES: Final = 10_000_000
"""Of the device's clock: some 5 ms, as long as a forward pass of 8 billion weights."""


@dataclass(slots=True)
class Load:
    """Rows to choose a token for."""

    hidden: Tensor
    """[rows, hidden]"""
    head: Tensor
    """[vocab, hidden]"""
    slots: Tensor
    position: Tensor
    adjustments: Adjustments

    def greedy(self) -> Tensor:
        return operators.likeliest(self.hidden, self.head)

    def logits(self) -> Tensor:
        return (self.hidden @ self.head.t()).float()

    def drawn(self, *, top_k: int = 0, top_p: float = 1.0, min_p: float | None = None) -> Tensor:
        return sample(self.logits(), self._columns(top_k, top_p, min_p))

    def everything(self) -> Tensor:
        """Masks, bad words, biases, the three penalties; temperature, min-p, top-k, top-p. The tables are as a slot has
        them that uses none: the work is the same, and no round changes what the next one chooses."""
        features = StepFeatures(
            draws=True,
            penalties=True,
            min_p=True,
            masks=True,
            biases=BIASES,
            sequences=BAD_WORDS,
            told_rows=np.empty(0, np.int32),
            told_entries=np.empty(0, np.int32),
            prompt=None,
        )
        logits = self.adjustments.apply(features, self.logits(), self.slots, self.position)
        tokens = sample(logits, self._columns(50, 0.9, 0.02))
        self.adjustments.note(features, self.slots, self.position, tokens)
        return tokens

    def _columns(self, top_k: int, top_p: float, min_p: float | None) -> SamplingColumns:
        rows, device = len(self.slots), self.slots.device
        return SamplingColumns(
            temperature=torch.full((rows,), 0.8, device=device),
            top_k=torch.full((rows,), top_k, dtype=torch.int32, device=device),
            top_p=torch.full((rows,), top_p, device=device),
            seed=self.slots,
            sample_index=torch.zeros(rows, dtype=torch.int32, device=device),
            position=self.position,
            min_p=None if min_p is None else torch.full((rows,), min_p, device=device),
            any_top_k=top_k > 0,
            any_top_p=top_p < 1.0,
        )


def make_load(rows: int, vocab: int, hidden: int, device: torch.device) -> Load:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return Load(
        hidden=normal(rows, hidden),
        head=normal(vocab, hidden) * (SPREAD / hidden**0.5),
        slots=torch.arange(rows, device=device),
        position=torch.full((rows,), 100, dtype=torch.int32, device=device),
        adjustments=Adjustments(rows, vocab, device),
    )


def ways(device: torch.device) -> tuple[str, ...]:
    return ("plain", "kernel") if device.type == "cuda" else ("plain",)


def cases_of(load: Load) -> dict[str, Callable[[], Tensor]]:
    """What is measured, by name: each chooses a token for every row."""
    return {
        "temperature": load.drawn,
        "top-p 0.9": lambda: load.drawn(top_p=0.9),
        "top-k 50, top-p 0.9": lambda: load.drawn(top_k=50, top_p=0.9),
        "everything": load.everything,
    }


def measure(load: Load, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by case and way; "greedy" and "product" have one way. Raises RuntimeError if the kernels draw
    other tokens than plain torch."""
    device, cases = load.slots.device, cases_of(load)
    runs: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("product", "plain"): load.logits,
        ("greedy", "plain"): load.greedy,
        **{(name, way): case for name, case in cases.items() for way in ways(device)},
    }
    took: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    chosen: dict[tuple[str, str], Tensor] = {}
    before = sampler.BY_KERNELS
    try:
        for turn in range(WARM_UPS + repeats):
            for (name, way), run in runs.items():
                sampler.BY_KERNELS = way == "kernel"
                seconds, chosen[name, way] = _timed(run, device)
                if turn >= WARM_UPS:
                    took[name, way].append(seconds * 1e3)
    finally:
        sampler.BY_KERNELS = before
    for name in cases:
        if ("kernel" in ways(device)) and not torch.equal(chosen[name, "kernel"], chosen[name, "plain"]):
            raise RuntimeError(f"{name}: the kernels draw other tokens than plain torch")
    found: dict[str, dict[str, float]] = {}
    for (name, way), values in took.items():
        found.setdefault(name, {})[way] = statistics.median(values)
    return found


def _timed(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds that the device takes. On CUDA it is kept busy while `run` launches, as by the forward pass of a step, so
    that the host's launches do not count unless they take longer than that."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result
    torch.cuda.synchronize(device)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(FORWARD_CYCLES)
    start_event.record()
    result = run()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1e3, result


app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[int, typer.Option(min=1, help="Requests in the step.")] = 256,
    vocab: Annotated[int, typer.Option(min=1, help="Tokens in the vocabulary.")] = 128_256,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 4_096,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 20,
    device: Annotated[str, typer.Option(help="cuda, cpu; by default the GPU if there is one.")] = "",
    step_ms: Annotated[
        float | None,
        typer.Option(min=0.001, help="A greedy step of the whole model: shows each case's cost as part of it."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measures what choosing tokens costs, against greedy."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.inference_mode():
        found = measure(make_load(rows, vocab, hidden, chosen), repeats)
    greedy = found["greedy"]["plain"]
    print(f"{rows} rows x {vocab} tokens, hidden {hidden}, {chosen}; medians of {repeats}, ms")
    print(
        f"{'':<22}{'way':<8}{'ms':>9}{'/ greedy':>10}{'- greedy':>10}"
        + ("" if step_ms is None else f"{'of a step':>11}")
    )
    for name, by_way in found.items():
        for way, ms in by_way.items():
            share = "" if step_ms is None else f"{(ms - greedy) / step_ms:>11.1%}"
            print(f"{name:<22}{way:<8}{ms:>9.3f}{ms / greedy:>10.2f}{ms - greedy:>10.3f}{share}")
    if out is not None:
        results: dict[str, Any] = {
            "rows": rows,
            "vocab": vocab,
            "hidden": hidden,
            "device": str(chosen),
            "repeats": repeats,
            "ms": found,
            "machine": describe_machine(),
        }
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app()
