"""cublasLt's interface over memory of the host: what the binding hands over arrives as C functions get it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 7, 15
BFLOAT16, FLOAT16 = 14, 2
WHOLE = c_uint64 * 8


class Result(ctypes.Structure):
    _fields_ = [("data", WHOLE), ("workspace", c_uint64), ("state", c_int), ("waves", ctypes.c_float), ("_", c_int * 4)]


@dataclass
class HostAlgorithm:
    """One that the library offers, in this order."""

    number: int
    workspace: int = 0
    suits: Callable[[int], bool] = lambda _count: True
    """Whether it can compute so many rows."""
    status: int = SUCCESS
    """Of launching it."""
    factor: float = 1.0
    """Of what it computes."""
    state: int = SUCCESS
    """As offered."""
    sums: int = 0
    """How parts of sums are stored: a bit of the mask, or 0."""
    tiles: tuple[int, ...] = ()
    """That it may have instead of its own; the last of them in no other cluster than 2."""

    @property
    def data(self) -> bytes:
        """Its number; a tile and a cluster if it was varied; and nothing."""
        return self.number.to_bytes(8, "little") + bytes(56)


@dataclass
class Layout:
    kind: int
    height: int
    width: int
    stride: int

    def read(self, address: int) -> Tensor:
        """[height, width], of memory that holds it column by column."""
        kind = torch.bfloat16 if self.kind == BFLOAT16 else torch.float16
        raw = (ctypes.c_uint16 * (self.stride * self.width)).from_address(address)
        return torch.frombuffer(raw, dtype=kind).view(self.width, self.stride)[:, : self.height].t()


@dataclass
class Launch:
    number: int
    count: int
    stream: int
    workspace: int
    weight: int
    """Addresses."""
    data: bytes
    """The algorithm's."""


@dataclass
class HostCublasLt:
    """The functions are attributes, as ctypes' libraries have them."""

    algorithms: list[HostAlgorithm]
    version: int = 130101
    launches: list[Launch] = field(default_factory=list)
    alive: dict[int, Any] = field(default_factory=dict)
    """What was made and not destroyed, by its handle."""

    def __post_init__(self) -> None:
        self._next = 0x1000
        handle, out_handle, size = c_void_p, POINTER(c_void_p), c_size_t
        functions: dict[str, tuple[Callable[..., Any], Any, list[Any]]] = {
            "cublasLtGetVersion": (lambda: self.version, size, []),
            "cublasLtGetStatusName": (self._name, c_void_p, [c_int]),
            "cublasLtCreate": (lambda out: self._make(out, "handle"), c_int, [out_handle]),
            "cublasLtMatmulDescCreate": (self._make_operation, c_int, [out_handle, c_int, c_int]),
            "cublasLtMatrixLayoutCreate": (
                lambda out, kind, height, width, stride: self._make(out, Layout(kind, height, width, stride)),
                c_int,
                [out_handle, c_int, c_uint64, c_uint64, c_int64],
            ),
            "cublasLtMatmulPreferenceCreate": (lambda out: self._make(out, {}), c_int, [out_handle]),
            "cublasLtMatmulAlgoGetHeuristic": (
                self._offer,
                c_int,
                [*[handle] * 7, c_int, POINTER(Result), POINTER(c_int)],
            ),
            "cublasLtMatmulAlgoCheck": (self._check, c_int, [*[handle] * 6, POINTER(WHOLE), POINTER(Result)]),
            "cublasLtMatmulAlgoConfigGetAttribute": (
                self._attribute,
                c_int,
                [POINTER(WHOLE), c_int, c_void_p, size, POINTER(size)],
            ),
            "cublasLtMatmulAlgoConfigSetAttribute": (
                self._vary,
                c_int,
                [POINTER(WHOLE), c_int, c_void_p, size],
            ),
            "cublasLtMatmulAlgoCapGetAttribute": (
                self._capability,
                c_int,
                [POINTER(WHOLE), c_int, c_void_p, size, POINTER(size)],
            ),
            "cublasLtMatmul": (self._multiply, c_int, [*[handle] * 12, POINTER(WHOLE), c_void_p, size, c_void_p]),
        }
        for kind in ("", "MatmulDesc", "MatrixLayout", "MatmulPreference"):
            functions[f"cublasLt{kind}Destroy"] = (self._destroy, c_int, [handle])
        for kind in ("MatmulDesc", "MatrixLayout", "MatmulPreference"):
            functions[f"cublasLt{kind}SetAttribute"] = (self._set, c_int, [handle, c_int, c_void_p, size])
        self._names = {status: c_char_p(f"STATUS_{status}".encode()) for status in range(20)}
        for name, (function, result, arguments) in functions.items():
            setattr(self, name, CFUNCTYPE(result, *arguments)(function))

    def _name(self, status: int) -> int | None:
        return ctypes.cast(self._names[status], c_void_p).value

    def _make(self, out: Any, what: Any) -> int:
        out[0] = self._next
        self.alive[self._next] = what
        self._next += 16
        return SUCCESS

    def _make_operation(self, out: Any, compute: int, scale: int) -> int:
        if (compute, scale) != (68, 0):  # CUBLAS_COMPUTE_32F, CUDA_R_32F
            return NOT_SUPPORTED
        return self._make(out, {})

    def _destroy(self, handle: int) -> int:
        del self.alive[handle]
        return SUCCESS

    def _set(self, handle: int, attribute: int, value: int, size: int) -> int:
        number = int.from_bytes(ctypes.string_at(value, size), "little")
        what = self.alive[handle]
        if isinstance(what, Layout):
            if (attribute, size) != (3, 8):  # CUBLASLT_MATRIX_LAYOUT_COLS
                return INVALID_VALUE
            what.width = number
        else:
            what[attribute, size] = number
        return SUCCESS

    def _shapes(self, operation: int, *layouts: int) -> int | None:
        """The number of rows, if it is the product that it should be: A transposed."""
        weight, rows, c, d = (self.alive[layout] for layout in layouts)
        right = self.alive[operation] == {(3, 4): 1} and c == d and rows.height == weight.height
        return rows.width if right and (d.height, d.width) == (weight.width, rows.width) else None

    def _offer(
        self, _h: int, operation: int, a: int, b: int, c: int, d: int, preference: int, most: int, out: Any, many: Any
    ) -> int:
        count, asked = self._shapes(operation, a, b, c, d), self.alive[preference]
        if count is None:
            return INVALID_VALUE
        workspace, sums = asked[1, 8], asked[3, 4]
        fitting = [
            one
            for one in self.algorithms
            if one.suits(count) and one.workspace <= workspace and (not one.sums or one.sums & sums)
        ]
        if not fitting:
            return NOT_SUPPORTED
        many[0] = min(most, len(fitting))
        for index, one in enumerate(fitting[:most]):
            self._write(out[index], one)
            out[index].state = one.state
        return SUCCESS

    def _write(self, result: Result, algorithm: HostAlgorithm) -> None:
        result.data[0], result.workspace, result.state, result.waves = algorithm.number, algorithm.workspace, 0, 1.5

    def _of(self, data: Any) -> HostAlgorithm:
        return next(one for one in self.algorithms if one.number == data[0][0])

    def _check(self, _h: int, operation: int, a: int, b: int, c: int, d: int, data: Any, out: Any) -> int:
        count = self._shapes(operation, a, b, c, d)
        algorithm = self._of(data)
        _, tile, cluster, *_ = data[0]
        if tile and (tile not in algorithm.tiles or (tile == algorithm.tiles[-1] and cluster != 2)):
            return NOT_SUPPORTED
        if count is None or not algorithm.suits(count):
            return NOT_SUPPORTED
        self._write(out[0], algorithm)
        return SUCCESS

    def _attribute(self, data: Any, attribute: int, value: int, size: int, written: Any) -> int:
        if size != {7: 2, 8: 2}.get(attribute, 4):
            return INVALID_VALUE
        if attribute == 7:
            return NOT_SUPPORTED
        ctypes.memmove(value, (self._of(data).number + attribute).to_bytes(size, "little"), size)
        written[0] = size
        return SUCCESS

    def _vary(self, data: Any, attribute: int, value: int, size: int) -> int:
        place = {(1, 4): 1, (8, 2): 2}.get((attribute, size))  # tile, cluster
        if place is None:
            return INVALID_VALUE
        data[0][place] = int.from_bytes(ctypes.string_at(value, size), "little")
        return SUCCESS

    def _capability(self, data: Any, attribute: int, value: int | None, size: int, written: Any) -> int:
        tiles = self._of(data).tiles
        if attribute != 6 or size not in (0, 4 * len(tiles)):
            return INVALID_VALUE
        written[0] = 4 * len(tiles)
        if size and value:
            ctypes.memmove(value, b"".join(tile.to_bytes(4, "little") for tile in tiles), size)
        return SUCCESS

    def _multiply(
        self, _h: int, operation: int, alpha: int, a: int, a_layout: int, b: int, b_layout: int, beta: int,
        c: int, c_layout: int, d: int, d_layout: int, data: Any, workspace: int, size: int, stream: int,
    ) -> int:  # fmt: skip
        count = self._shapes(operation, a_layout, b_layout, c_layout, d_layout)
        one, zero = (ctypes.c_float.from_address(at).value for at in (alpha, beta))
        algorithm = self._of(data)
        if count is None or (one, zero) != (1.0, 0.0) or c != d or size < algorithm.workspace:
            return INVALID_VALUE
        if algorithm.status != SUCCESS:
            return algorithm.status
        weight, rows, out = (
            self.alive[layout].read(at) for at, layout in ((a, a_layout), (b, b_layout), (d, d_layout))
        )
        out.copy_(weight.t().float() @ rows.float() * algorithm.factor)
        self.launches.append(Launch(algorithm.number, count, stream or 0, workspace, a, bytes(data[0])))
        return SUCCESS
