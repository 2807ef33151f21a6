"""cublasLt's algorithms against the one that torch takes: `python -m tandem.bench.products`, on a GPU.

For each number of rows, the products of a layer of Llama-3.1-8B in bfloat16 (and of its head, for as many rows as
choose a token in one step). Each algorithm that the library offers computes it first into memory that holds no number,
which is compared with float32; then it runs in a CUDA graph over weights that take turns, more of them than the L2
cache holds. The fastest of these, and torch's, are then measured in turns, so that a clock that changes changes all of
them. One that fails is noted and left out. Times are the device's alone.

When all products have been measured, those with the best two algorithms offered are tried with other tiles, whose
number fills the multiprocessors better by arithmetic, and with other clusters, as far as the library takes them.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from torch import Tensor

from ..worker.cublaslt import (
    ANY_SUMS,
    MOST_WORKSPACE,
    TILES,
    WIDE_SUMS,
    Algorithm,
    CublasLt,
    CublasLtError,
    Product,
)
from ..worker.product_trials import variants
from .attention import timed_us
from .machine import describe_machine

SHAPES: Final = {
    "query-key-value": (6144, 4096),
    "output": (4096, 4096),
    "gate-up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
"""Width and depth: weights are [width, depth]."""
HEAD: Final = "head"
MOST_HEAD_ROWS: Final = 512
"""Rows that choose a token in one step."""
ROWS: Final = (256, 288, 320, 384, 448, 512, 2048, 4096)
OFFERS: Final = 32
"""Asked for at once."""
WORKSPACES: Final = (0, 1 << 20, 4 << 20, MOST_WORKSPACE)
FINALISTS: Final = 4
"""Besides torch's."""
ROTATED: Final = 320 << 20
"""Bytes of weights that take turns: five times an H200's L2 cache."""
MOST_WEIGHTS: Final = 512
"""Even if that is less: of small shapes."""
GRAPH_US: Final = 400.0
"""Microseconds that a graph takes at least, or nearly."""
GUESSED_FLOPS: Final = 600e12
"""Per second, for choosing how many products a graph has."""
LEAST_US: Final = 5.0
"""Microseconds of any product."""
SCREENINGS: Final = 2
LARGEST_ERROR: Final = 0.01
"""Relative, against float32. Rounding to bfloat16 makes 0.0017; rounding parts of a sum as well, up to twice that."""
VARIED: Final = 2
"""Algorithms of each product that are varied …"""
TILES_TRIED: Final = 16
"""… by so many tiles."""
SECONDS: Final = 75.0

CLUSTERS: Final = (
    "auto 1 1x1 2x1 4x1 1x2 2x2 4x2 1x4 2x4 4x4 8x1 1x8 8x2 2x8 16x1 1x16 3x1 5x1 6x1 7x1 9x1 10x1 11x1 12x1 13x1 14x1 "
    "15x1 3x2 5x2 6x2 7x2 1x3 2x3 3x3 4x3 5x3 3x4 1x5 2x5 3x5 1x6 2x6 1x7 2x7 1x9 1x10 1x11 1x12 1x13 1x14 1x15"
).split()
"""Names of cublasLtClusterShape_t."""
SUMS: Final = {0: "", 1: " in place", 2: " in 32 bits", 4: " in 16 bits"}


def _stages() -> list[str]:
    """Names of cublasLtMatmulStages_t, steps of depth x stages, in the order of their numbers."""
    counted = [f"{step}x{stages}" for step in (16, 32, 64, 128) for stages in range(1, 7)]
    more = ["32x10", "8x4", "16x10", "8x5", "#29", "#30", "8x3"]
    return ["-", *counted, *more, *(f"{step}xAUTO" for step in (8, 16, 32, 64, 128, 256, 768))]


STAGES: Final = _stages()


@dataclass(slots=True)
class Candidate:
    """An algorithm and what became of it."""

    algorithm: str
    """Hexadecimal: cublasLtMatmulAlgo_t."""
    attributes: dict[str, int]
    described: str
    workspace: int
    """Bytes that it needs."""
    waves: float
    error: float | None = None
    """Relative, against float32; at most LARGEST_ERROR."""
    screened_us: float | None = None
    """The best of SCREENINGS."""
    us: float | None = None
    """A finalist's, the median of all rounds."""
    ratio: float | None = None
    """A finalist's to torch's, the median of all rounds."""
    failure: str | None = None


@dataclass(slots=True)
class Figures:
    """Of one product; times are of one, in microseconds."""

    rows: int
    shape: str
    width: int
    depth: int
    weights: int
    """That take turns."""
    products: int
    """In a graph."""
    torch_us: float = math.nan
    torch_error: float = math.nan
    complete: bool = True
    """All that were offered have been tried: there was time."""
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def best(self) -> Candidate | None:
        finalists = [candidate for candidate in self.candidates if candidate.ratio is not None]
        return min(finalists, key=lambda candidate: candidate.ratio or math.inf, default=None)

    @property
    def least_us(self) -> float:
        """With the best, or with torch's if there is no better."""
        best = self.best
        return self.torch_us * min(1.0, 1.0 if best is None or best.ratio is None else best.ratio)

    def rate(self, us: float) -> float:
        """TFLOP/s."""
        return 2 * self.rows * self.width * self.depth / us / 1e6


def read_shapes(text: str) -> dict[str, tuple[int, int]]:
    """Width and depth by name: names of SHAPES, or WIDTHxDEPTH. Raises ValueError for anything else."""
    found = {}
    for name in (part.strip() for part in text.split(",")):
        sizes = name.split("x")
        if name in SHAPES:
            found[name] = SHAPES[name]
        elif len(sizes) == 2 and all(size.isdecimal() and int(size) > 0 and int(size) % 8 == 0 for size in sizes):
            found[name] = int(sizes[0]), int(sizes[1])
        else:
            raise ValueError(
                f"there is no shape {name!r}; there are {', '.join(SHAPES)}, or WIDTHxDEPTH in multiples of 8"
            )
    return found


def problems_of(shapes: dict[str, tuple[int, int]], rows: list[int]) -> list[Figures]:
    """What is to be measured, in order."""
    return [
        sized(count, name, *shapes[name])
        for count in rows
        for name in shapes
        if name != HEAD or count <= MOST_HEAD_ROWS
    ]


def sized(rows: int, shape: str, width: int, depth: int) -> Figures:
    """How many weights take turns, and how many products a graph has: each weight equally often."""
    weights = min(MOST_WEIGHTS, -(-ROTATED // (2 * width * depth)))
    expected_us = max(LEAST_US, 2 * rows * width * depth / GUESSED_FLOPS * 1e6)
    turns = max(1, round(GRAPH_US / expected_us / weights))
    return Figures(rows, shape, width, depth, weights, weights * turns)


def described(attributes: dict[str, int], workspace: int) -> str:
    """An algorithm in words: tile (columns x rows of the output), steps of depth and stages, cluster, …"""

    def named(names: list[str], key: str) -> str:
        number = attributes.get(key, 0)
        return names[number] if number < len(names) else f"#{number}"

    split = attributes.get("split_k", 1)
    parts = [
        f"tile {named([f'{m}x{n}' for m, n in TILES], 'tile')}",
        f"stages {named(STAGES, 'stages')}",
        f"cluster {named(CLUSTERS, 'cluster')}",
        f"split {split}{SUMS.get(attributes.get('reduction', 0), ' ?') if split != 1 else ''}",
        f"swizzle {attributes.get('swizzle', 0)}",
        f"option {attributes.get('option', 0)}",
        f"id {attributes.get('id', -1)}",
    ]
    return ", ".join(parts) + (f", workspace {workspace / 2**20:.1f} MiB" if workspace else "")


def offered(product: Product, rows: int) -> list[Algorithm]:
    """All that the library offers for any of WORKSPACES, each once, in its order."""
    found: dict[bytes, Algorithm] = {}
    for workspace in WORKSPACES:
        for sums in (ANY_SUMS, WIDE_SUMS):
            for algorithm in product.offers(rows, most=OFFERS, workspace=workspace, sums=sums):
                found.setdefault(algorithm.data, algorithm)
    return list(found.values())


class Bench:
    """The tensors of one product. Graphs that were captured read them, so they stay as long as this."""

    def __init__(self, library: CublasLt, figures: Figures) -> None:
        device = torch.device("cuda")
        width, depth = figures.width, figures.depth
        self.figures = figures
        self._library = library
        self._product = Product(library, width, depth, torch.bfloat16)
        self._weights = [
            torch.randn(width, depth, device=device, dtype=torch.bfloat16).mul_(depth**-0.5)
            for _ in range(figures.weights)
        ]
        self._rows = torch.randn(figures.rows, depth, device=device, dtype=torch.bfloat16)
        self._out = torch.empty(figures.rows, width, device=device, dtype=torch.bfloat16)
        self._workspace = torch.empty(MOST_WORKSPACE, device=device, dtype=torch.uint8)
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._exact = self._rows.float() @ self._weights[0].float().t()

    def run(self, rounds: int, deadline: float) -> None:
        """Fills the figures in, of what is offered. Raises what stops all of it, which one algorithm that fails does
        not."""
        self._measure(offered(self._product, self.figures.rows), rounds, deadline)

    def run_variants(self, of: Figures, rounds: int, deadline: float) -> None:
        """The same of variants of the best that were measured before."""
        tried = sorted(
            (candidate for candidate in of.candidates if candidate.screened_us is not None),
            key=lambda candidate: candidate.screened_us or math.inf,
        )
        bases = [Algorithm(bytes.fromhex(one.algorithm), one.workspace, one.waves) for one in tried[:VARIED]]
        many = torch.cuda.get_device_properties(self._out.device).multi_processor_count
        varied = variants(self._library, self._product, bases, of.rows, many, tiles=TILES_TRIED)
        self._measure([*bases, *varied], rounds, deadline)

    def _measure(self, algorithms: list[Algorithm], rounds: int, deadline: float) -> None:
        figures = self.figures
        reference = self._captured(self._torch)
        figures.torch_error = self._error(self._torch)
        runs: list[tuple[Candidate, torch.cuda.CUDAGraph]] = []
        for algorithm in algorithms:
            if time.monotonic() > deadline:
                figures.complete = False
                break
            attributes = self._library.attributes(algorithm)
            words = described(attributes, algorithm.workspace)
            candidate = Candidate(algorithm.data.hex(), attributes, words, algorithm.workspace, algorithm.waves)
            figures.candidates.append(candidate)
            try:
                graph = self._screen(candidate, algorithm)
            except RuntimeError as error:  # torch's and CublasLtError
                candidate.failure = (str(error).splitlines() or [type(error).__name__])[0]
                continue
            if graph is not None:
                runs.append((candidate, graph))
        runs.sort(key=lambda run: run[0].screened_us or math.inf)
        self._compare(reference, runs[:FINALISTS], rounds)

    def _screen(self, candidate: Candidate, algorithm: Algorithm) -> torch.cuda.CUDAGraph | None:
        """Checks and times one; its graph, unless it computes something else."""

        def launch(weight: Tensor) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            self._product.launch(algorithm, self._rows, weight, self._out, self._workspace, stream)

        error = self._error(launch)
        if not error <= LARGEST_ERROR:
            candidate.failure = f"its result is wrong: relative error {error:.2g}"
            return None
        candidate.error = error
        graph = self._captured(launch)
        graph.replay()
        candidate.screened_us = min(timed_us(graph.replay) for _ in range(SCREENINGS)) / self.figures.products
        return graph

    def _torch(self, weight: Tensor) -> None:
        torch.mm(self._rows, weight.t(), out=self._out)

    def _captured(self, launch: Callable[[Tensor], None]) -> torch.cuda.CUDAGraph:
        """Products by all weights in turn. By hand: torch's own way waits and empties its cache each time."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            launch(self._weights[0])  # allocates what a capture must not
            torch.cuda.synchronize()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                for index in range(self.figures.products):
                    launch(self._weights[index % len(self._weights)])
            finally:
                graph.capture_end()
        return graph

    def _error(self, launch: Callable[[Tensor], None]) -> float:
        """Relative, of a product by the first weight, against float32. Not a number, or infinite: it wrote none."""
        self._out.fill_(math.nan)
        launch(self._weights[0])
        return float((self._out.float() - self._exact).norm() / self._exact.norm())

    def _compare(
        self, reference: torch.cuda.CUDAGraph, runs: list[tuple[Candidate, torch.cuda.CUDAGraph]], rounds: int
    ) -> None:
        """Torch's graph and the others, in turns."""
        reference.replay()
        baseline: list[float] = []
        took: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            baseline.append(timed_us(reference.replay))
            for times, (_, graph) in zip(took, runs, strict=True):
                times.append(timed_us(graph.replay))
        self.figures.torch_us = statistics.median(baseline) / self.figures.products
        for times, (candidate, _) in zip(took, runs, strict=True):
            candidate.us = statistics.median(times) / self.figures.products
            candidate.ratio = statistics.median(us / base for us, base in zip(times, baseline, strict=True))


def heading() -> str:
    return (
        f"{'rows':>5} {'shape':<16}{'torch us':>9}{'TFLOP/s':>9}{'best us':>9}{'TFLOP/s':>9}{'/ torch':>9}{'tried':>7}"
        f"{'failed':>7}  best"
    )


def line_of(figures: Figures) -> str:
    """What is printed of one product."""
    best, failed = figures.best, sum(candidate.failure is not None for candidate in figures.candidates)
    line = f"{figures.rows:>5} {figures.shape:<16}{figures.torch_us:>9.1f}{figures.rate(figures.torch_us):>9.0f}"
    if best is None or best.us is None or best.ratio is None:
        return f"{line}{'-':>9}{'-':>9}{'-':>9}{len(figures.candidates):>7}{failed:>7}  none could be measured"
    line += f"{best.us:>9.1f}{figures.rate(best.us):>9.0f}{best.ratio:>9.3f}{len(figures.candidates):>7}{failed:>7}"
    return f"{line}  {best.described}; error {best.error:.1e}, torch's {figures.torch_error:.1e}" + (
        "" if figures.complete else "; not all were tried"
    )


def sums_of(measured: list[Figures]) -> Iterator[str]:
    """For each number of rows that was measured in all of a layer's shapes, a layer with torch's and with the better
    of torch's and the best."""
    layer = [name for name in SHAPES if name != HEAD]
    for rows in dict.fromkeys(figures.rows for figures in measured):
        found = {figures.shape: figures for figures in measured if figures.rows == rows}
        if not all(name in found for name in layer):
            continue
        before = sum(found[name].torch_us for name in layer)
        after = sum(found[name].least_us for name in layer)
        yield f"{rows} rows, a layer's four products: torch {before:.1f} us, best {after:.1f} us ({after / before:.3f})"


app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[list[int], typer.Option(min=1, help="May be given more than once.")] = list(ROWS),  # noqa: B006
    shapes: Annotated[
        str, typer.Option(help=f"Names, with commas, of {', '.join(SHAPES)}; or WIDTHxDEPTH.")
    ] = ",".join(SHAPES),
    rounds: Annotated[int, typer.Option(min=1, help="Of the comparison with torch's; medians are shown.")] = 15,
    seconds: Annotated[
        float, typer.Option(min=1, help="After which no more is tried. What was not reached is said.")
    ] = SECONDS,
    vary: Annotated[bool, typer.Option(help="Try other tiles and clusters than offered, after all else.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, anew after each product.")] = None,
) -> None:
    """Measures the products of a layer with each algorithm that cublasLt offers, and with torch's."""
    deadline = time.monotonic() + seconds
    try:
        todo = problems_of(read_shapes(shapes), rows)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not torch.cuda.is_available():
        print("tandem.bench.products needs a CUDA device: cublasLt runs on no other", file=sys.stderr)
        raise typer.Exit(2)
    torch.zeros(1, device="cuda")  # makes the device's context current, which a handle is for
    try:
        library = CublasLt()
    except CublasLtError as error:
        print(f"tandem.bench.products: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    print(f"cublasLt {library.version}, torch {torch.__version__}; medians of {rounds} rounds\n{heading()}")
    run = Run(library, rounds, seconds, deadline, out)
    run.offers(todo)
    if vary and run.measured:
        print("With other tiles and clusters:")
        run.variants()
    print("\n".join(f"{name}: {failure}" for name, failure in run.failures.items()))
    run.write()
    if not run.measured:
        raise typer.Exit(1)


class Run:
    """Measures one product after the other, until the time is over, and writes down what there is after each."""

    def __init__(self, library: CublasLt, rounds: int, seconds: float, deadline: float, out: Path | None) -> None:
        self._library, self._rounds, self._seconds, self._deadline = library, rounds, seconds, deadline
        self._out = out
        self._machine = describe_machine()
        self.measured: list[Figures] = []
        self.varied: list[Figures] = []
        self.failures: dict[str, str] = {}

    def offers(self, todo: list[Figures]) -> None:
        for figures in todo:
            name = f"{figures.rows} x {figures.shape}"
            run = partial(self._offers_of, figures)
            if self._attempt(name, run):
                self.measured.append(figures)
                self._tell(figures)
        print("\n".join(sums_of(self.measured)), flush=True)

    def variants(self) -> None:
        for before in self.measured:
            figures = sized(before.rows, before.shape, before.width, before.depth)
            run = partial(self._variants_of, figures, before)
            if self._attempt(f"variants of {before.rows} x {before.shape}", run):
                self.varied.append(figures)
                self._tell(figures)

    def _offers_of(self, figures: Figures) -> None:
        Bench(self._library, figures).run(self._rounds, self._deadline)

    def _variants_of(self, figures: Figures, before: Figures) -> None:
        Bench(self._library, figures).run_variants(before, self._rounds, self._deadline)

    def _attempt(self, name: str, run: Callable[[], None]) -> bool:
        if time.monotonic() > self._deadline:
            self.failures[name] = f"not reached within {self._seconds:g} seconds"
            return False
        try:
            torch.cuda.empty_cache()
            with torch.inference_mode():
                run()
        except RuntimeError as error:  # out of memory too
            self.failures[name] = (str(error).splitlines() or [type(error).__name__])[0]
            return False
        return True

    def _tell(self, figures: Figures) -> None:
        print(line_of(figures), flush=True)
        self.write()

    def write(self) -> None:
        if self._out is None:
            return
        report = {
            "cublaslt": self._library.version,
            "rotated_bytes": ROTATED,
            "products": [asdict(figures) for figures in self.measured],
            "variants": [asdict(figures) for figures in self.varied],
            "failures": self.failures,
            "machine": self._machine,
        }
        self._out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    app()
