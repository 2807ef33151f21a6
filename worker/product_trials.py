"""Which algorithm of cublasLt's computes a product the fastest, found by trying on the device.

All that the library offers are timed for one number of rows (a `Case`), with the model's own weights, which take turns
so that none is found in the L2 cache; the fastest are then timed in turns with torch's.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .cublaslt import MOST_WORKSPACE, TILES, WIDE_SUMS, Algorithm, CublasLt, CublasLtError, Product

log = logging.getLogger(__name__)

LEAST_GAIN: float = 0.02
"""Of torch's time, below which torch's product stays."""
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
LARGEST_ERROR: Final = 0.01
"""Relative, against torch's product."""

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


class Trial:
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

    def fastest(self, measure: Measure, varied: Callable[[Sequence[Algorithm]], list[Algorithm]]) -> Algorithm | None:
        """The fastest, or None if torch's is, or nearly. `varied`: what else to try, going by the fastest offered."""
        times = min(MOST_TIMED, max(2, round(TIMED_US / measure(self.by_torch, 2))))
        limit = measure(self.by_torch, times) * (1 - LEAST_GAIN / 2)  # each is timed only once here
        screened = self.screened(self.offers(), measure, times)
        if VARIED:
            bases = [algorithm for _, algorithm in screened[:VARIED]]
            screened = sorted([*screened, *self.screened(varied(bases), measure, times)], key=_us)
        finalists = [
            algorithm for us, algorithm in screened[:FINALISTS] if us < limit and self.error(algorithm) <= LARGEST_ERROR
        ]
        if not finalists:
            return None
        runs = [self.by_torch, *(self.by(algorithm) for algorithm in finalists)]
        rounds = [[measure(run, times) for run in runs] for _ in range(ROUNDS)]  # a clock that changes changes all
        baseline, *medians = (statistics.median(us_of_run) for us_of_run in zip(*rounds, strict=True))
        least = min(medians)
        return finalists[medians.index(least)] if least <= baseline * (1 - LEAST_GAIN) else None

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


def _us(timed: tuple[float, Algorithm]) -> float:
    return timed[0]


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
