"""Products by the algorithm of cublasLt's that was the fastest when it was tried on this device.

torch takes the first that the library's heuristics offer. Here, before anything is captured, all that they offer are
timed for the numbers of rows that graphs are captured for, with the model's own weights, which take turns so that none
is found in the L2 cache. One that beats torch's by `LEAST_GAIN` is used from then on, in graphs and in launches. What
was found is kept on disk for the next start, which then only asks the library whether it still holds.

Products of few rows are not this module's business (see product_kernels), nor those of 32 or 8 bits, nor
batch-invariant mode.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from .cublaslt import (
    ALIGNMENT,
    MOST_WORKSPACE,
    TILES,
    WIDE_SUMS,
    Algorithm,
    CublasLt,
    CublasLtError,
    Product,
    loaded_library,
)

log = logging.getLogger(__name__)

TUNED: bool = False
"""Whether a worker chooses algorithms when it starts. Not measured in the whole system yet."""
LEAST_GAIN: float = 0.02
"""Of torch's time, below which torch's product stays."""
LEAST_SHARE: Final = 0.75
"""Of the rows that an algorithm was chosen for, from which on it is used: fewer do not fit its tiles much better than
what the library chooses for them."""
BUDGET_S: Final = 6.0
"""For trying, at one start. What it does not suffice for is torch's until the next."""
OFFERS: Final = 32
VARIED: int = 0
"""Of what is offered, so many, the fastest, are also tried with other tiles and clusters. Whether that gains anything
has not been measured yet."""
TILES_TRIED: Final = 8
CLUSTERS_TRIED: Final = (2, 3, 5)
"""Numbers of cublasLtClusterShape_t: 1x1, 2x1 and 1x2."""
EDGE: Final = 32
"""What a row or column of a tile costs for each step of depth, in elements of a tile: a guess, to order tiles by."""
FINALISTS: Final = 3
ROUNDS: Final = 7
TIMED_US: Final = 200.0
"""Microseconds that products are timed for at once, if they are short."""
MOST_TIMED: Final = 10
"""Products timed at once."""
HEAD_START: Final = 400_000
"""Cycles of the device's clock, some 0.2 ms, in which the host launches what is timed."""
LARGEST_ERROR: Final = 0.01
"""Relative, against torch's product."""
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}

Measure = Callable[[Callable[[], None], int], float]
"""Microseconds that one of so many calls takes."""


class Case(NamedTuple):
    """rows [rows, depth] @ weight [width, depth].T"""

    rows: int
    width: int
    depth: int
    dtype: torch.dtype


@dataclass(slots=True)
class Wanted:
    """Weights of one shape and dtype, and the numbers of rows to choose algorithms for."""

    weights: list[Tensor] = field(default_factory=list)
    rows: set[int] = field(default_factory=set)

    def cases(self) -> Iterator[Case]:
        width, depth = self.weights[0].shape
        return (Case(rows, width, depth, self.weights[0].dtype) for rows in self.rows)


def wanted(
    uses: Iterable[tuple[str, Tensor, Sequence[int]]], takes: Callable[[str, int, Tensor], bool]
) -> list[Wanted]:
    """What to choose for `uses`: the operator, its weight [N, K] of 16 bits, numbers of rows. `takes` says whether an
    operator has a kernel of its own for so many rows of a weight."""
    found: dict[tuple[int, int, torch.dtype], Wanted] = {}
    for operator, weight, rows in uses:
        width, depth = weight.shape
        one = found.setdefault((width, depth, weight.dtype), Wanted())
        if all(weight.data_ptr() != other.data_ptr() for other in one.weights):
            one.weights.append(weight)
        one.rows |= {count for count in rows if count not in one.rows and not takes(operator, count, weight)}
    return list(found.values())


def variants(
    library: CublasLt, product: Product, bases: Sequence[Algorithm], rows: int, multiprocessors: int, *, tiles: int
) -> list[Algorithm]:
    """What the library takes instead of `bases` with other tiles and clusters, for so many rows: of each up to `tiles`
    tiles, those whose number should fill the multiprocessors best. Each once, without the bases."""
    found: dict[bytes, Algorithm] = {}
    for base in bases:
        tried = 0
        told = library.tiles(base) or range(1, len(TILES))
        for tile in _by_fit(told, rows, product.width, multiprocessors):
            varied = [product.varied(base, rows, tile=tile, cluster=cluster) for cluster in CLUSTERS_TRIED]
            taken = {one.data: one for one in varied if one is not None and one.workspace <= MOST_WORKSPACE}
            found |= taken
            tried += bool(taken)
            if tried == tiles:
                break
    return [one for data, one in found.items() if all(base.data != data for base in bases)]


def _by_fit(tiles: Iterable[int], rows: int, width: int, multiprocessors: int) -> list[int]:
    """Numbers of tiles whose sizes are known, by what a product should take with them: waves of whole tiles."""

    def cost(tile: int) -> float:
        m, n = TILES[tile]
        waves = math.ceil(math.ceil(width / m) * math.ceil(rows / n) / multiprocessors)
        return waves * (m * n + EDGE * (m + n))

    return sorted((tile for tile in tiles if 0 < tile < len(TILES)), key=cost)


class Store:
    """Choices on disk. They hold for one kind of device and one version of the library and of torch."""

    def __init__(self, folder: Path, made_on: dict[str, Any]) -> None:
        """`made_on`: what they hold for, of JSON's types."""
        name = "-".join(
            "".join(c if c.isalnum() or c in ".+_" else "_" for c in str(part)) for part in made_on.values()
        )
        self.path = folder / f"{name}.json"
        self._made_on = made_on

    def read(self) -> dict[Case, Algorithm | None]:
        """None: torch's is the best. Empty if there are none, or none that can be read."""
        try:
            content = json.loads(self.path.read_text())
            if content["made_on"] != self._made_on:
                return {}
            return dict(self._entry(entry) for entry in content["choices"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be used, and products are tried anew: %s", self.path, error)
            return {}

    def _entry(self, entry: dict[str, Any]) -> tuple[Case, Algorithm | None]:
        case = Case(int(entry["rows"]), int(entry["width"]), int(entry["depth"]), _DTYPES[entry["dtype"]])
        data = entry["algorithm"]
        return case, None if data is None else Algorithm(bytes.fromhex(data), int(entry["workspace"]))

    def write(self, choices: dict[Case, Algorithm | None]) -> None:
        """In one piece, whoever reads or writes meanwhile. A failure is only told: the next start tries anew."""
        entries = [
            {
                "rows": case.rows,
                "width": case.width,
                "depth": case.depth,
                "dtype": _NAMES[case.dtype],
                "algorithm": None if algorithm is None else algorithm.data.hex(),
                "workspace": 0 if algorithm is None else algorithm.workspace,
            }
            for case, algorithm in choices.items()
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"made_on": self._made_on, "choices": entries}, file, indent=1)
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            log.warning("which products are the fastest cannot be kept: %s", error)


class TunedProducts:
    """Products by chosen algorithms on one device, one after the other on the stream that is current."""

    def __init__(
        self, library: CublasLt, device: torch.device, stream: Callable[[], int], multiprocessors: int
    ) -> None:
        """`stream` gives the handle of the current one. What captured graphs read lives as long as this."""
        self._library = library
        self.version = library.version
        self._multiprocessors = multiprocessors
        self._stream = stream
        self._workspace = torch.empty(MOST_WORKSPACE, dtype=torch.uint8, device=device)
        self._products: dict[tuple[int, int, torch.dtype], Product] = {}
        self._chosen: dict[Case, Algorithm | None] = {}
        self._found: dict[Case, tuple[Product, Algorithm] | None] = {}
        """For each number of rows that came; None: torch's."""

    def product(self, rows: Tensor, weight: Tensor) -> Tensor | None:
        """rows [T, K] @ weight [N, K].T: [T, N]; None if torch is to compute it."""
        count = rows.shape[0]
        case = Case(count, weight.shape[0], weight.shape[1], weight.dtype)
        try:
            found = self._found[case]
        except KeyError:
            found = self._found[case] = self._find(case)
        if found is None or not (rows.is_contiguous() and weight.is_contiguous()):
            return None
        if (rows.data_ptr() | weight.data_ptr()) % ALIGNMENT:
            return None
        product, algorithm = found
        out = rows.new_empty((count, case.width))
        try:
            product.launch(algorithm, rows, weight, out, self._workspace, self._stream())
        except CublasLtError as error:
            log.warning("%d rows by a weight of %d x %d are torch's again: %s", *case[:3], error)
            self._found[case] = None
            return None
        return out

    def _find(self, case: Case) -> tuple[Product, Algorithm] | None:
        """By what was chosen for the next larger number of rows, if that is near and its algorithm can compute it."""
        sizes = (other.rows for other in self._chosen if other[1:] == case[1:] and other.rows >= case.rows)
        size = min(sizes, default=0)
        if case.rows < LEAST_SHARE * size or not case.rows:
            return None
        algorithm = self._chosen.get(case._replace(rows=size))
        if algorithm is None:
            return None
        product = self._product_of(case)
        return (product, algorithm) if self._suits(product, algorithm, case.rows) else None

    def _product_of(self, case: Case) -> Product:
        key = case[1:]
        if key not in self._products:
            self._products[key] = Product(self._library, *key)
        return self._products[key]

    def _suits(self, product: Product, algorithm: Algorithm, rows: int) -> bool:
        needed = product.workspace_of(algorithm, rows)
        return needed is not None and needed <= self._workspace.nbytes

    @torch.no_grad()
    def tune(
        self,
        wanted: Sequence[Wanted],
        store: Store,
        measure: Measure,
        *,
        budget_s: float = BUDGET_S,
        clock: Callable[[], float] = time.monotonic,
        progress: Callable[[str, float], None] = lambda _phrase, _share: None,
    ) -> None:
        """Chooses for all that is wanted: by what the store has, and else by trying, the most rows first, within the
        budget. Nothing else may run on the device."""
        deadline = clock() + budget_s
        cases = {case: one for one in wanted for case in one.cases()}
        kept = store.read()
        for case in cases:
            algorithm = kept.get(case)
            if case in kept and (algorithm is None or self._suits(self._product_of(case), algorithm, case.rows)):
                self._chosen[case] = algorithm
        tried = sorted((case for case in cases if case not in self._chosen), key=lambda case: -case.rows)
        left = 0
        for index, case in enumerate(tried):
            if clock() > deadline:
                left = len(tried) - index
                break
            progress("trying products", index / len(tried))
            self._chosen[case] = self._choose(case, cases[case].weights, measure)
        if left < len(tried):
            store.write({**kept, **self._chosen})
        self._found.clear()
        gained = sum(self._chosen.get(case) is not None for case in cases)
        log.info(
            "%d of %d products are faster than torch's; %d were tried now, and %d are left for the next start",
            gained, len(cases), len(tried) - left, left,
        )  # fmt: skip

    def _choose(self, case: Case, weights: Sequence[Tensor], measure: Measure) -> Algorithm | None:
        """The fastest, or None if torch's is, or nearly."""
        trial = _Trial(self._product_of(case), case, weights, self._workspace, self._stream)
        times = min(MOST_TIMED, max(2, round(TIMED_US / measure(trial.by_torch, 2))))
        limit = measure(trial.by_torch, times) * (1 - LEAST_GAIN / 2)  # each is timed only once here
        screened = trial.screened(trial.offers(), measure, times)
        if VARIED:
            bases, product = [algorithm for _, algorithm in screened[:VARIED]], self._product_of(case)
            varied = variants(self._library, product, bases, case.rows, self._multiprocessors, tiles=TILES_TRIED)
            screened = sorted([*screened, *trial.screened(varied, measure, times)], key=_us)
        finalists = [
            algorithm
            for us, algorithm in screened[:FINALISTS]
            if us < limit and trial.error(algorithm) <= LARGEST_ERROR
        ]
        if not finalists:
            return None
        runs = [trial.by_torch, *(trial.by(algorithm) for algorithm in finalists)]
        rounds = [[measure(run, times) for run in runs] for _ in range(ROUNDS)]  # a clock that changes changes all
        baseline, *medians = (statistics.median(us_of_run) for us_of_run in zip(*rounds, strict=True))
        least = min(medians)
        return finalists[medians.index(least)] if least <= baseline * (1 - LEAST_GAIN) else None


def _us(timed: tuple[float, Algorithm]) -> float:
    return timed[0]


class _Trial:
    """The tensors of a case, and ways to compute it once by the next weight."""

    def __init__(
        self, product: Product, case: Case, weights: Sequence[Tensor], workspace: Tensor, stream: Callable[[], int]
    ) -> None:
        device = weights[0].device
        self._product = product
        self._weights = weights
        self._turns: Iterator[Tensor] = itertools.cycle(weights)
        self._rows = torch.randn(case.rows, case.depth, dtype=case.dtype, device=device)
        self._out = torch.empty(case.rows, case.width, dtype=case.dtype, device=device)
        self._workspace = workspace
        self._stream = stream

    def offers(self) -> list[Algorithm]:
        """Those that add up in 32 bits; none if the library refuses."""
        try:
            return self._product.offers(
                self._rows.shape[0], most=OFFERS, workspace=self._workspace.nbytes, sums=WIDE_SUMS
            )
        except CublasLtError as error:
            log.warning("%s", error)
            return []

    def screened(self, algorithms: Iterable[Algorithm], measure: Measure, times: int) -> list[tuple[float, Algorithm]]:
        """What one product takes with each, in microseconds, the fastest first; without those that fail."""
        timed = []
        for algorithm in algorithms:
            try:
                timed.append((measure(self.by(algorithm), times), algorithm))
            except CublasLtError:
                continue
        return sorted(timed, key=_us)

    def by_torch(self) -> None:
        torch.mm(self._rows, next(self._turns).t(), out=self._out)

    def by(self, algorithm: Algorithm) -> Callable[[], None]:
        return lambda: self._launch(algorithm, next(self._turns))

    def _launch(self, algorithm: Algorithm, weight: Tensor) -> None:
        self._product.launch(algorithm, self._rows, weight, self._out, self._workspace, self._stream())

    def error(self, algorithm: Algorithm) -> float:
        """Relative, against torch's product by the first weight; infinite if the algorithm leaves out anything."""
        exact = (self._rows @ self._weights[0].t()).float()
        self._out.fill_(math.nan)
        self._launch(algorithm, self._weights[0])
        error = float((self._out.float() - exact).norm() / exact.norm())
        return error if error == error else math.inf


_in_use: dict[torch.device, TunedProducts] = {}


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [T, K] @ weight [N, K].T: [T, N], by an algorithm that was chosen (see `prepare`) or as torch does it."""
    tuned = _in_use.get(rows.device)
    out = None if tuned is None else tuned.product(rows, weight)
    return rows @ weight.t() if out is None else out


def prepare(
    uses: Iterable[tuple[str, Tensor, Sequence[int]]],
    device: torch.device,
    folder: Path,
    progress: Callable[[str, float], None],
) -> None:
    """Has `product` compute by the fastest algorithms on a CUDA device from now on; what is chosen is kept in `folder`.
    `uses` as in `wanted`. Without a library to ask, a warning says so, and torch goes on. Nothing else may run on the
    device, and no graph may have been captured yet that is to gain by it."""
    device = torch.empty(0, device=device).device  # with its index
    try:
        if device not in _in_use:
            library = loaded_library()
            with torch.cuda.device(device):
                _in_use[device] = TunedProducts(
                    CublasLt(library),
                    device,
                    lambda: torch.cuda.current_stream(device).cuda_stream,
                    torch.cuda.get_device_properties(device).multi_processor_count,
                )
        tuned = _in_use[device]
        tuned.tune(wanted(uses, _takes), _store(tuned, device, folder), _device_us, progress=progress)
    except CublasLtError as error:
        log.warning("products are computed as torch chooses: %s", error)


def _store(tuned: TunedProducts, device: torch.device, folder: Path) -> Store:
    properties = torch.cuda.get_device_properties(device)
    made_on = {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cublaslt": tuned.version,
        "torch": str(torch.__version__),
        "varied": VARIED,
    }
    return Store(folder, made_on)


def _takes(operator: str, rows: int, weight: Tensor) -> bool:
    from . import product_kernels

    takes = {
        "product": product_kernels.takes_product,
        "gated_product": product_kernels.takes_gated_product,
        "likeliest": product_kernels.takes_likeliest,
    }
    return takes[operator](torch.empty((rows, weight.shape[1]), dtype=weight.dtype, device=weight.device), weight)


def _device_us(launch: Callable[[], None], times: int) -> float:
    """Of device time; the first launch of all is not counted, and the others are over before the device begins."""
    launch()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    for _ in range(times):
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / times
