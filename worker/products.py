"""Products by the algorithm of cublasLt's that was the fastest when it was tried on this device.

torch takes the first that the library's heuristics offer. Here, before anything is captured, all that they offer are
tried for the numbers of rows that graphs are captured for (product_trials.py). One that beats torch's is used from then
on, in graphs and in launches. What was found is kept on disk for the next start (product_store.py), which then only
asks the library whether it still holds.

Products of few rows are not this module's business (see product_kernels), nor those of 32 or 8 bits, nor
batch-invariant mode.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from . import product_trials
from .cublaslt import ALIGNMENT, MOST_WORKSPACE, Algorithm, CublasLt, CublasLtError, Product, loaded_library
from .product_store import Store
from .product_trials import TILES_TRIED, Case, Measure, Trial, Wanted, variants, wanted

log = logging.getLogger(__name__)

TUNED: bool = False
"""Whether a worker chooses algorithms when it starts. Off: it gains under 1 % of the whole (docs/performance.md),
for which two workers of one service would compute by different ones."""
LEAST_SHARE: Final = 0.75
"""Of the rows that an algorithm was chosen for, from which on it is used: fewer do not fit its tiles much better than
what the library chooses for them."""
BUDGET_S: Final = 6.0
"""For trying, at one start. What it does not suffice for is torch's until the next."""
HEAD_START: Final = 400_000
"""Cycles of the device's clock, some 0.2 ms, in which the host launches what is timed."""


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
        product = self._product_of(case)

        def varied(bases: Sequence[Algorithm]) -> list[Algorithm]:
            return variants(self._library, product, bases, case.rows, self._multiprocessors, tiles=TILES_TRIED)

        return Trial(product, case, weights, self._workspace, self._stream).fastest(measure, varied)


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
        "varied": product_trials.VARIED,
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
