"""What the decode kernel takes alone and in its place: `python -m tandem.bench.attention`, on a GPU.

Alone, its calls stand one behind the other, and each hides its start and its end behind its neighbours. In its place it
stands between the other kernels of a layer (norm, products, rotary embedding and writes to the KV cache, of the sizes
of Llama-3.1-8B in bfloat16): told is how much longer a CUDA graph of such layers takes than one without attention. The
floor is the bytes of keys and values at the bandwidth of a copy, measured in the same run. Rounds take the ways in
turn, so that a clock that changes changes all of them. What each way computes is compared with today's.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from torch import Tensor

from ..worker import operators
from ..worker.attention.flashinfer import DECODE, Cut, Cuts, DecodeWay, Variant
from .machine import describe_machine

TODAY: Final = "today"
WAYS: Final[dict[int, dict[str, DecodeWay]]] = {
    2: {
        TODAY: DECODE[2],
        "even-3": DecodeWay(stages=3),
        "even-1": DecodeWay(stages=1),
        "equal-2": DecodeWay(programs=2, stages=3),
        "equal-4": DecodeWay(programs=4, stages=2),
    },
    1: {
        TODAY: DECODE[1],
        "even": DecodeWay(),
        "even-3": DecodeWay(stages=3),
        "even-2-warps": DecodeWay(warps=2),
        "even-2-warps-3": DecodeWay(warps=2, stages=3),
    },
}
"""By the bytes of a cached number, then by name: how contexts are cut, and the warps or stages; see DecodeWay."""
LOADS: Final = ("32 x 4352", "256 ragged", "32 x 768")
CACHE_DTYPES: Final = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
RAGGED: Final = (128, 1072)
"""Shortest and longest context of a ragged load, in tokens: 600 in the mean."""
HIDDEN: Final = 4096
INNER: Final = 14336
GROUP: Final = Variant(query_heads=32, kv_heads=8, head_dim=128, window=None, scale=128**-0.5, softcap=None)
BLOCK_SIZE: Final = 16
LAYERS: Final = 8
"""With keys, values and weights of their own, so that none finds them in the L2 cache."""
PASSES: Final = 4
WARM_UPS: Final = 3
MOST_AT_ONCE: Final = 16
"""Programs of a multiprocessor, with four warps each."""
COPIED: Final = 1 << 30
"""Bytes."""
LARGEST_ERROR: Final = 0.02
"""Of a layer's attention from today's way, relative. Another order of sums makes some thousandths."""
HEAD_START: Final = 1_000_000
"""Cycles of the device's clock that the host has to launch a round's graph."""


@dataclass(slots=True)
class Figures:
    """Of one way under one load; times are medians."""

    way: DecodeWay
    alone_us: float
    """Microseconds a layer."""
    in_place_us: float
    floor_us: float
    layer_ratio: float
    """Of whole layers to those of today's way, the median of all rounds."""
    largest_error: float
    """Relative, of a layer's attention, against today's way."""


@dataclass(slots=True)
class LoadFigures:
    rows: int
    tokens: int
    """In all contexts."""
    rest_us: float
    """What a layer takes without its attention."""
    ways: dict[str, Figures] = field(default_factory=dict)


def read_load(text: str) -> list[int]:
    """Lengths of contexts: "32 x 4352" is 32 of 4,352 tokens; "256 ragged" 256 at random in RAGGED.

    Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+)\s*(?:[x×]\s*(\d+)|ragged)\s*", text)
    rows, tokens = (int(found[1]), int(found[2] or 1)) if found else (0, 0)
    if not found or rows < 1 or tokens < 1:
        raise ValueError(f"load {text!r} is neither 'ROWS x TOKENS' nor 'ROWS ragged', with numbers from 1 on")
    if found[2]:
        return [tokens] * rows
    rng = random.Random(0)
    return [rng.randint(*RAGGED) for _ in range(rows)]


def read_ways(text: str, cached_bytes: int = 2) -> dict[str, DecodeWay]:
    """By name, today's first. Raises ValueError for a name that there is not."""
    known = WAYS[cached_bytes]
    names = tuple(known) if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no variant {', '.join(map(repr, unknown))}; there are {', '.join(known)}, or all")
    return {name: known[name] for name in dict.fromkeys((TODAY, *names))}


class Layers:
    """Random weights, keys and values of LAYERS layers, and rows of a load that decode over them."""

    def __init__(self, lengths: Sequence[int], device: torch.device, cache_dtype: torch.dtype) -> None:
        from ..worker.attention.kernels import Scratch

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale

        torch.manual_seed(0)
        self.lengths = np.array(lengths, np.int32)
        self.rows = len(lengths)
        heads, dim = GROUP.query_heads, GROUP.head_dim
        per_row = -(-self.lengths // BLOCK_SIZE)
        blocks, width = int(per_row.sum()), int(per_row.max())
        self.tables = torch.zeros(self.rows, width, dtype=torch.int32, device=device)
        inside = torch.arange(width, device=device) < torch.from_numpy(per_row).to(device)[:, None]
        self.tables[inside] = torch.randperm(blocks, device=device).to(torch.int32)
        self.lines = torch.arange(self.rows, dtype=torch.int32, device=device)
        self.kv_lens = torch.from_numpy(self.lengths).to(device)
        last = self.kv_lens.long() - 1
        block = self.tables.gather(1, (last // BLOCK_SIZE)[:, None])[:, 0].long()
        self.slots = block * BLOCK_SIZE + last % BLOCK_SIZE
        cache = (blocks, BLOCK_SIZE, GROUP.kv_heads, dim)
        self.keys = [normal(*cache).to(cache_dtype) for _ in range(LAYERS)]
        self.values = [normal(*cache).to(cache_dtype) for _ in range(LAYERS)]
        scale, inner_scale = HIDDEN**-0.5, INNER**-0.5
        self.qkv = [normal((heads + 2 * GROUP.kv_heads) * dim, HIDDEN, scale=scale) for _ in range(LAYERS)]
        self.output = [normal(HIDDEN, heads * dim, scale=scale) for _ in range(LAYERS)]
        self.gate_up = [normal(2 * INNER, HIDDEN, scale=scale) for _ in range(LAYERS)]
        self.down = [normal(HIDDEN, INNER, scale=inner_scale) for _ in range(LAYERS)]
        self.norm = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
        self.cos, self.sin = normal(self.rows, dim).cos(), normal(self.rows, dim).sin()
        self.hidden = normal(self.rows, HIDDEN)
        self.query = normal(self.rows, heads, dim)
        self.outs = [torch.zeros_like(self.query) for _ in range(LAYERS)]
        """What the layers' attention gave."""
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        most = self.rows + MOST_AT_ONCE * multiprocessors
        self._scratch = Scratch(most, self.rows, GROUP.kv_heads, heads * dim, device)
        self._multiprocessors = multiprocessors
        self._cut: dict[DecodeWay, Cut] = {}
        """Captured graphs read them, and do not keep them alive."""

    @property
    def bytes_read(self) -> int:
        """Of keys and values, by the attention of one layer."""
        return int(self.lengths.sum()) * 2 * GROUP.kv_heads * GROUP.head_dim * self.keys[0].itemsize

    def cut(self, way: DecodeWay) -> Cut:
        if way not in self._cut:
            self._cut[way] = self._make_cut(way)
        return self._cut[way]

    def _make_cut(self, way: DecodeWay) -> Cut:
        from ..worker.attention import kernels

        programs = way.programs or kernels.programs_at_once(
            self.query[:1], self.keys[0], self.values[0], scale=GROUP.scale, window=None, softcap=None,
            warps=way.warps, stages=way.stages,
        )  # fmt: skip
        cuts = Cuts({GROUP: programs}, self._multiprocessors, even=way.even)
        written = np.empty(cuts.cutting.room(self.rows), np.int32)
        cuts.cutting.write(self.lengths, written)
        return cuts.of(torch.from_numpy(written).to(self.query.device), self.rows)[GROUP]

    def attend(self, layer: int, query: Tensor, way: DecodeWay, cut: Cut) -> None:
        from ..worker.attention import kernels

        kernels.attend(
            query, self.keys[layer], self.values[layer], self.tables, self.lines, self.kv_lens, cut.pieces,
            self.outs[layer], self._scratch, scale=GROUP.scale, warps=way.warps, stages=way.stages, spans=cut.spans,
        )  # fmt: skip

    def alone(self, way: DecodeWay) -> Callable[[], None]:
        """The attention of all layers, PASSES times."""
        cut = self.cut(way)

        def run() -> None:
            for layer in list(range(LAYERS)) * PASSES:
                self.attend(layer, self.query, way, cut)

        return run

    def in_place(self, way: DecodeWay | None) -> Callable[[], None]:
        """All layers; None: without their attention."""
        cut = None if way is None else self.cut(way)

        def run() -> None:
            total, hidden = self.hidden, self.hidden
            for layer in range(LAYERS):
                total, hidden = self._layer(layer, total, hidden, way, cut)

        return run

    def _layer(
        self, layer: int, total: Tensor, hidden: Tensor, way: DecodeWay | None, cut: Cut | None
    ) -> tuple[Tensor, Tensor]:
        """The sum so far and the last addend, both [rows, HIDDEN], past one layer."""
        from ..worker import kernels

        total, normed = operators.add_norm(total, hidden, self.norm, 1e-5)
        heads = GROUP.query_heads, GROUP.kv_heads, GROUP.kv_heads
        qkv = operators.product(normed, self.qkv[layer]).view(self.rows, sum(heads), GROUP.head_dim)
        query, key, value = qkv.split(heads, dim=1)
        flat = self.keys[layer].flatten(0, 1), self.values[layer].flatten(0, 1)
        query = kernels.rotate_append(query, key, value, self.cos, self.sin, self.slots, *flat)
        if way is not None and cut is not None:
            self.attend(layer, query, way, cut)
        added = operators.product(self.outs[layer].flatten(1), self.output[layer])
        total, normed = operators.add_norm(total, added, self.norm, 1e-5)
        return total, operators.product(operators.gated_product(normed, self.gate_up[layer]), self.down[layer])


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Runs it once, which compiles and allocates what a capture must not."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def timed_us(run: Callable[[], object]) -> float:
    """Microseconds of device time; the launch is over before the device begins."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes that a copy reads and writes in a second."""
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    source.zero_()
    best_us = min(timed_us(lambda: target.copy_(source)) for _ in range(10))
    return 2 * COPIED / best_us * 1e6


def errors(layers: Layers, graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """The largest relative error of any layer's attention against today's way, in their place. Each runs with another
    input right before, so that what that run left behind would be found out if it were read."""
    found = dict.fromkeys(graphs, 0.0)
    for _ in range(3):
        given, other = torch.randn_like(layers.hidden), torch.randn_like(layers.hidden)
        exact: list[Tensor] = []
        for name, graph in graphs.items():
            for hidden in (other, given):
                layers.hidden.copy_(hidden)
                graph.replay()
            exact = exact or [out.float() for out in layers.outs]
            error = max(
                float((out.float() - right).norm() / right.norm())
                for out, right in zip(layers.outs, exact, strict=True)
            )
            found[name] = max(found[name], error) if error == error else math.inf
    return found


def measure(
    lengths: Sequence[int], ways: dict[str, DecodeWay], rounds: int, bandwidth: float, cache_dtype: torch.dtype
) -> LoadFigures:
    """`ways`: today's first. Raises RuntimeError if a way computes something else than today's."""
    layers = Layers(lengths, torch.device("cuda"), cache_dtype)
    placed = {name: captured(layers.in_place(way)) for name, way in ways.items()}
    wrong = errors(layers, placed)
    for name, error in wrong.items():
        if error > LARGEST_ERROR:
            raise RuntimeError(f"{name} computes something else than today's way: relative error {error:.3g}")
    graphs = {("rest", ""): captured(layers.in_place(None))}
    graphs |= {("placed", name): graph for name, graph in placed.items()}
    graphs |= {("alone", name): captured(layers.alone(way)) for name, way in ways.items()}
    took: dict[tuple[str, str], list[float]] = {key: [] for key in graphs}
    for turn in range(WARM_UPS + rounds):
        for key, graph in graphs.items():
            us = timed_us(graph.replay)
            if turn >= WARM_UPS:
                took[key].append(us)
    rest_us = statistics.median(took["rest", ""]) / LAYERS
    found = LoadFigures(len(lengths), sum(lengths), rest_us)
    for name, way in ways.items():
        ratios = [us / today for us, today in zip(took["placed", name], took["placed", TODAY], strict=True)]
        found.ways[name] = Figures(
            way=way,
            alone_us=statistics.median(took["alone", name]) / (LAYERS * PASSES),
            in_place_us=statistics.median(took["placed", name]) / LAYERS - rest_us,
            floor_us=layers.bytes_read / bandwidth * 1e6,
            layer_ratio=statistics.median(ratios),
            largest_error=wrong[name],
        )
    return found


def lines_of(load: str, found: LoadFigures) -> list[str]:
    """What is printed of a load."""
    today = found.ways[TODAY]
    lines = [
        f"{load}: {found.rows} rows, {found.tokens} tokens; floor {today.floor_us:.1f} us a layer, the rest of a layer "
        f"{found.rest_us:.1f} us",
        f"{'':<16}{'alone us':>10}{'of floor':>10}{'in place':>10}{'of floor':>10}{'/ today':>9}{'layer / today':>15}"
        f"{'error':>9}",
    ]
    for name, one in found.ways.items():
        lines.append(
            f"{name:<16}{one.alone_us:>10.1f}{one.floor_us / one.alone_us:>10.1%}{one.in_place_us:>10.1f}"
            f"{one.floor_us / one.in_place_us:>10.1%}{one.in_place_us / today.in_place_us:>9.3f}"
            f"{one.layer_ratio:>15.3f}{one.largest_error:>9.1e}"
        )
    return lines


app = typer.Typer(add_completion=False)


@app.command()
def main(
    variants: Annotated[
        str,
        typer.Option(
            help=f"Names, with commas, of {', '.join(WAYS[2])}, or with a cache in fp8 of {', '.join(WAYS[1])}; "
            "or all. Today's is always measured."
        ),
    ] = "all",
    load: Annotated[
        list[str], typer.Option(help="'ROWS x TOKENS' or 'ROWS ragged'; may be given more than once.")
    ] = list(LOADS),  # noqa: B006 - typer copies it
    rounds: Annotated[int, typer.Option(min=1, help="Medians are shown.")] = 40,
    kv_cache_dtype: Annotated[str, typer.Option(help="bfloat16 or fp8.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measures the decode kernel back to back and in its place in a layer, in several ways."""
    try:
        if kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"--kv-cache-dtype is {kv_cache_dtype!r}; it can be {' or '.join(CACHE_DTYPES)}")
        cache_dtype = CACHE_DTYPES[kv_cache_dtype]
        ways, lengths = read_ways(variants, cache_dtype.itemsize), {one: read_load(one) for one in load}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not torch.cuda.is_available():
        print("tandem.bench.attention needs a CUDA device: the decode kernel runs on no other", file=sys.stderr)
        raise typer.Exit(2)
    found: dict[str, LoadFigures] = {}
    with torch.inference_mode():
        bandwidth = copy_bandwidth(torch.device("cuda"))
        print(f"a copy moves {bandwidth / 1e12:.2f} TB/s; medians of {rounds} rounds")
        for name, contexts in lengths.items():
            found[name] = measure(contexts, ways, rounds, bandwidth, cache_dtype)
            print("\n".join(lines_of(name, found[name])))
            torch.cuda.empty_cache()
    if out is not None:
        report: dict[str, Any] = {
            "rounds": rounds,
            "kv_cache_dtype": kv_cache_dtype,
            "layers": LAYERS,
            "copy_bytes_per_second": bandwidth,
            "loads": {name: asdict(figures) for name, figures in found.items()},
            "machine": describe_machine(),
        }
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    app()
