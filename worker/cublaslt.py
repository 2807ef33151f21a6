"""cublasLt's algorithms for products of 16-bit matrices, one by one; torch takes the first that it is offered.

The library is the one that torch has loaded, called by ctypes: its functions and constants here are those of cublasLt.h
of CUDA 13, and have had these values since CUDA 11. cublasLt's matrices are column by column, so that it sees a tensor
transposed: out [T, N] = rows [T, K] @ weight [N, K].T is to it out.T [N, T] = op(weight.T [K, N]) @ rows.T [K, T], with
op a transposition. That is how torch asks for it too.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

ANY_SUMS: Final = 7
"""Mask of cublasLtReductionScheme_t: parts of a sum may be stored in any way before they are added up."""
WIDE_SUMS: Final = 2
"""Parts of a sum are stored in 32 bits, so nothing is rounded twice."""
ALIGNMENT: Final = 256
"""Bytes that algorithms may take all addresses to be multiples of, unless they are asked for with another limit."""
MOST_WORKSPACE: Final = 32 << 20
"""Bytes, as much as torch gives cuBLAS on Hopper."""

_SUCCESS, _NOT_SUPPORTED = 0, 15
_FLOAT32, _COMPUTE_FLOAT32, _TRANSPOSED = 0, 68, 1
_DTYPES: Final = {torch.bfloat16: 14, torch.float16: 2}
_DESC_TRANSA: Final = 3
_LAYOUT_COLS: Final = 3
_PREFERENCE_WORKSPACE, _PREFERENCE_SUMS = 1, 3
_CAPABLE_TILES: Final = 6
_ATTRIBUTES: Final = {
    "id": (0, c_int32),
    "tile": (1, c_uint32),
    "split_k": (2, c_int32),
    "reduction": (3, c_uint32),
    "swizzle": (4, c_uint32),
    "option": (5, c_uint32),
    "stages": (6, c_uint32),
    "inner_shape": (7, c_uint16),
    "cluster": (8, c_uint16),
}


def _tiles() -> list[tuple[int, int]]:
    first = (
        "0x0 8x8 8x16 16x8 8x32 16x16 32x8 8x64 16x32 32x16 64x8 32x32 32x64 64x32 32x128 64x64 128x32 64x128 128x64 "
        "64x256 128x128 256x64 64x512 128x256 256x128 512x64 64x96 96x64 96x128 128x160 160x128 192x128 128x192 128x96 "
        "32x256 256x32"
    )
    listed = [(int(m), int(n)) for m, n in (name.split("x") for name in first.split())]
    by_64 = [(m, n) for m in range(8, 769, 8) for n in range(64, 769, 64) if m * n <= 64 * 768]
    by_8 = [(m, n) for m in range(64, 769, 64) for n in range(8, 769, 8) if m * n <= 256 * 256]
    return [*dict.fromkeys([*listed, *by_64, *by_8]), (256, 512), (256, 1024), (512, 512), (512, 1024)]


TILES: Final = _tiles()
"""Columns and rows of the output in a tile, by the number of cublasLtMatmulTile_t; 0: not said."""


class _Data(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = [("data", c_uint64 * 8)]


class _Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", _Data),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


_LAYOUTS: Final = [pointer] * 4
"""Of A, B, C and D."""
_PROTOTYPES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "cublasLtGetVersion": (c_size_t, []),
    "cublasLtGetStatusName": (c_char_p, [c_int]),
    "cublasLtCreate": (c_int, [POINTER(pointer)]),
    "cublasLtDestroy": (c_int, [pointer]),
    "cublasLtMatmulDescCreate": (c_int, [POINTER(pointer), c_int, c_int]),
    "cublasLtMatmulDescDestroy": (c_int, [pointer]),
    "cublasLtMatmulDescSetAttribute": (c_int, [pointer, c_int, pointer, c_size_t]),
    "cublasLtMatrixLayoutCreate": (c_int, [POINTER(pointer), c_int, c_uint64, c_uint64, c_int64]),
    "cublasLtMatrixLayoutDestroy": (c_int, [pointer]),
    "cublasLtMatrixLayoutSetAttribute": (c_int, [pointer, c_int, pointer, c_size_t]),
    "cublasLtMatmulPreferenceCreate": (c_int, [POINTER(pointer)]),
    "cublasLtMatmulPreferenceDestroy": (c_int, [pointer]),
    "cublasLtMatmulPreferenceSetAttribute": (c_int, [pointer, c_int, pointer, c_size_t]),
    "cublasLtMatmulAlgoGetHeuristic": (
        c_int,
        [pointer, pointer, *_LAYOUTS, pointer, c_int, POINTER(_Found), POINTER(c_int)],
    ),
    "cublasLtMatmulAlgoCheck": (c_int, [pointer, pointer, *_LAYOUTS, POINTER(_Data), POINTER(_Found)]),
    "cublasLtMatmulAlgoCapGetAttribute": (c_int, [POINTER(_Data), c_int, pointer, c_size_t, POINTER(c_size_t)]),
    "cublasLtMatmulAlgoConfigSetAttribute": (c_int, [POINTER(_Data), c_int, pointer, c_size_t]),
    "cublasLtMatmulAlgoConfigGetAttribute": (c_int, [POINTER(_Data), c_int, pointer, c_size_t, POINTER(c_size_t)]),
    "cublasLtMatmul": (
        c_int,
        # handle, operation, alpha, A and its layout, B …, beta, C …, D …, algorithm, workspace, its size, stream
        [*[pointer] * 12, POINTER(_Data), pointer, c_size_t, pointer],
    ),
}


class CublasLtError(RuntimeError):
    """A call of the library failed, or there is no library."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One of cublasLt's for a product of certain sizes; may suit others too (`Product.workspace_of`)."""

    data: bytes
    """64 of them, which mean the same to any process with the same version of the library."""
    workspace: int
    """Bytes that it needs."""
    waves: float = field(default=0.0, compare=False)
    """How often its programs fill the device, as the library estimates."""

    def __post_init__(self) -> None:
        if len(self.data) != ctypes.sizeof(_Data):
            raise ValueError(f"an algorithm has {ctypes.sizeof(_Data)} bytes, not {len(self.data)}")


def loaded_library() -> ctypes.CDLL:
    """The library that torch has loaded. Raises CublasLtError if it has none."""
    cuda = torch.version.cuda
    if cuda is None:
        raise CublasLtError("this build of torch has no CUDA, and so no cublasLt")
    name = f"libcublasLt.so.{cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError as error:
        raise CublasLtError(f"torch has not loaded {name}: {error}") from error


class CublasLt:
    """A handle of the library for the current CUDA device. It and what it makes belong to one thread at a time."""

    def __init__(self, library: Any = None) -> None:
        """`library`: functions by their names, those of `loaded_library` unless given. Raises CublasLtError."""
        self._library = loaded_library() if library is None else library
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise CublasLtError(f"this version of cublasLt has no {name}")
            function.restype, function.argtypes = result, arguments
        self.version: int = self._library.cublasLtGetVersion()
        """130101 is 13.1.1."""
        self.handle = self.create("cublasLtCreate", "cublasLtDestroy", self)

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CublasLtError with the library's name of what went wrong."""
        status = getattr(self._library, name)(*arguments)
        if status != _SUCCESS:
            raise CublasLtError(f"{name}: {self.name_of(status)}")

    def status_of(self, name: str, *arguments: Any) -> int:
        status: int = getattr(self._library, name)(*arguments)
        return status

    def name_of(self, status: int) -> str:
        name = self._library.cublasLtGetStatusName(status)
        return name.decode() if name else f"status {status}"

    def create(self, by: str, destroyed_by: str, owner: object, *arguments: Any) -> pointer:
        """Something of the library's, which goes with its owner, unless the process ends with it."""
        made = pointer()
        self.call(by, byref(made), *arguments)
        weakref.finalize(owner, getattr(self._library, destroyed_by), pointer(made.value)).atexit = False
        return made

    def set_attribute(self, kind: str, of: pointer, attribute: int, value: Any) -> None:
        self.call(f"cublasLt{kind}SetAttribute", of, attribute, byref(value), ctypes.sizeof(value))

    def attributes(self, algorithm: Algorithm) -> dict[str, int]:
        """What the library tells of an algorithm, by the names of `_ATTRIBUTES`; what it does not know is left out."""
        data, written, found = _Data.from_buffer_copy(algorithm.data), c_size_t(), {}
        for name, (attribute, kind) in _ATTRIBUTES.items():
            value = kind()
            arguments = byref(data), attribute, byref(value), ctypes.sizeof(value), byref(written)
            if self.status_of("cublasLtMatmulAlgoConfigGetAttribute", *arguments) == _SUCCESS:
                found[name] = value.value
        return found

    def tiles(self, algorithm: Algorithm) -> list[int]:
        """Numbers of all tiles that algorithms of this one's id may have; whether for some sizes, `Product.varied`
        tells. Empty if the library does not say."""
        data, size = _Data.from_buffer_copy(algorithm.data), c_size_t()
        name = "cublasLtMatmulAlgoCapGetAttribute"
        if self.status_of(name, byref(data), _CAPABLE_TILES, None, 0, byref(size)) != _SUCCESS:
            return []
        tiles = (c_uint32 * (size.value // ctypes.sizeof(c_uint32)))()
        self.call(name, byref(data), _CAPABLE_TILES, tiles, size.value, byref(size))
        return list(tiles)


class Product:
    """rows [T, depth] @ weight [width, depth].T: [T, width] for any T, all of one dtype of 16 bits, sums in float32."""

    def __init__(self, library: CublasLt, width: int, depth: int, dtype: torch.dtype) -> None:
        self._library = library
        self.width, self.depth, self.dtype = width, depth, dtype
        kind = _DTYPES[dtype]
        self._operation = library.create(
            "cublasLtMatmulDescCreate", "cublasLtMatmulDescDestroy", self, _COMPUTE_FLOAT32, _FLOAT32
        )
        library.set_attribute("MatmulDesc", self._operation, _DESC_TRANSA, c_int32(_TRANSPOSED))
        self._weight, self._rows, self._out = (
            library.create(
                "cublasLtMatrixLayoutCreate", "cublasLtMatrixLayoutDestroy", self, kind, height, columns, height
            )
            for height, columns in ((depth, width), (depth, 1), (width, 1))
        )
        self._preference = library.create("cublasLtMatmulPreferenceCreate", "cublasLtMatmulPreferenceDestroy", self)
        self._count = 1
        self._one, self._zero = c_float(1.0), c_float(0.0)

    def _layouts(self, count: int) -> tuple[pointer, pointer, pointer, pointer]:
        """Of A, B, C and D for so many rows."""
        if count != self._count:
            self._count = 0  # unless both succeed
            for layout in (self._rows, self._out):
                self._library.set_attribute("MatrixLayout", layout, _LAYOUT_COLS, c_uint64(count))
            self._count = count
        return self._weight, self._rows, self._out, self._out

    def offers(
        self, count: int, *, most: int, workspace: int = MOST_WORKSPACE, sums: int = ANY_SUMS
    ) -> list[Algorithm]:
        """Up to `most` algorithms for `count` rows and so many bytes of workspace, what the library takes for the best
        first. Raises CublasLtError."""
        library, preference = self._library, self._preference
        library.set_attribute("MatmulPreference", preference, _PREFERENCE_WORKSPACE, c_uint64(workspace))
        library.set_attribute("MatmulPreference", preference, _PREFERENCE_SUMS, c_uint32(sums))
        results, many = (_Found * most)(), c_int()
        name = "cublasLtMatmulAlgoGetHeuristic"
        arguments = (self._operation, *self._layouts(count), preference, most, results, byref(many))
        status = library.status_of(name, library.handle, *arguments)
        if status == _NOT_SUPPORTED:
            return []
        if status != _SUCCESS:
            raise CublasLtError(f"{name}: {library.name_of(status)}")
        return [
            Algorithm(bytes(result.algorithm), result.workspace, result.waves)
            for result in results[: many.value]
            if result.state == _SUCCESS
        ]

    def workspace_of(self, algorithm: Algorithm, count: int) -> int | None:
        """Bytes of workspace that an algorithm needs for `count` rows; None: it cannot compute that."""
        data, result = _Data.from_buffer_copy(algorithm.data), _Found()
        arguments = (self._operation, *self._layouts(count), byref(data), byref(result))
        status = self._library.status_of("cublasLtMatmulAlgoCheck", self._library.handle, *arguments)
        return result.workspace if status == _SUCCESS and result.state == _SUCCESS else None

    def varied(self, algorithm: Algorithm, count: int, **attributes: int) -> Algorithm | None:
        """The algorithm with other attributes (names of `_ATTRIBUTES`) for `count` rows; None: there is no such."""
        data = _Data.from_buffer_copy(algorithm.data)
        for name, number in attributes.items():
            attribute, kind = _ATTRIBUTES[name]
            value = kind(number)
            arguments = byref(data), attribute, byref(value), ctypes.sizeof(value)
            if self._library.status_of("cublasLtMatmulAlgoConfigSetAttribute", *arguments) != _SUCCESS:
                return None
        found = Algorithm(bytes(data), 0)
        workspace = self.workspace_of(found, count)
        return None if workspace is None else Algorithm(found.data, workspace)

    def launch(
        self, algorithm: Algorithm, rows: Tensor, weight: Tensor, out: Tensor, workspace: Tensor, stream: int
    ) -> None:
        """Computes it into `out` on a CUDA stream. All are contiguous, and their addresses multiples of ALIGNMENT; no
        other stream may use the workspace meanwhile, and a graph that the stream captures keeps its address.

        Raises CublasLtError, and may then have written nothing.
        """
        weight_layout, rows_layout, out_layout, _ = self._layouts(rows.shape[0])
        self._library.call(
            "cublasLtMatmul", self._library.handle, self._operation,
            byref(self._one), weight.data_ptr(), weight_layout, rows.data_ptr(), rows_layout,
            byref(self._zero), out.data_ptr(), out_layout, out.data_ptr(), out_layout,
            byref(_Data.from_buffer_copy(algorithm.data)), workspace.data_ptr(), workspace.nbytes,
            stream,
        )  # fmt: skip
