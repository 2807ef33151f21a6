"""The binding to cublasLt: what arrives at C functions of its interface, and what comes back."""

from __future__ import annotations

import gc

import pytest
import torch

from tandem.worker.cublaslt import (
    ANY_SUMS,
    TILES,
    WIDE_SUMS,
    Algorithm,
    CublasLt,
    CublasLtError,
    Product,
    loaded_library,
)

from support.host_cublaslt import FLOAT16, NOT_SUPPORTED, HostAlgorithm, HostCublasLt, Launch

WIDTH, DEPTH = 24, 16


def product(host: HostCublasLt, dtype: torch.dtype = torch.bfloat16) -> Product:
    return Product(CublasLt(host), WIDTH, DEPTH, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_products_of_any_number_of_rows(dtype: torch.dtype) -> None:
    host = HostCublasLt([HostAlgorithm(5, workspace=64)])
    made, workspace = product(host, dtype), torch.empty(64, dtype=torch.uint8)
    for count in (3, 1, 7, 7):
        (algorithm,) = made.offers(count, most=8)
        rows, weight = torch.randn(count, DEPTH).to(dtype), torch.randn(WIDTH, DEPTH).to(dtype)
        out = torch.empty(count, WIDTH, dtype=dtype)
        made.launch(algorithm, rows, weight, out, workspace, stream=0x77)
        torch.testing.assert_close(out, rows @ weight.t())
        assert host.launches[-1] == Launch(5, count, 0x77, workspace.data_ptr(), weight.data_ptr(), algorithm.data)


def test_offers_are_asked_for_with_their_limits() -> None:
    host = HostCublasLt(
        [
            HostAlgorithm(1, workspace=1 << 33),
            HostAlgorithm(2, sums=4),
            HostAlgorithm(3, sums=2, workspace=100),
            HostAlgorithm(4, state=NOT_SUPPORTED),
            HostAlgorithm(5, suits=lambda count: count > 8),
        ]
    )
    made = product(host)

    def numbers(count: int, **limits: int) -> list[int]:
        return [int.from_bytes(one.data[:8], "little") for one in made.offers(count, **limits)]

    assert numbers(8, most=9, sums=ANY_SUMS) == [2, 3]
    assert numbers(9, most=9, sums=ANY_SUMS) == [2, 3, 5]
    assert numbers(9, most=9, sums=WIDE_SUMS) == [3, 5]
    assert numbers(9, most=9, sums=ANY_SUMS, workspace=99) == [2, 5]
    assert numbers(9, most=1, workspace=1 << 34) == [1]
    assert numbers(9, most=9, workspace=0, sums=WIDE_SUMS) == [5]
    assert numbers(8, most=9, workspace=0, sums=WIDE_SUMS) == []
    (only,) = made.offers(8, most=9, sums=WIDE_SUMS)
    assert (only.workspace, only.waves) == (100, 1.5)


def test_an_algorithm_is_asked_whether_it_suits_other_rows() -> None:
    host = HostCublasLt([HostAlgorithm(1, workspace=48, suits=lambda count: count % 8 == 0)])
    made = product(host)
    (algorithm,) = made.offers(16, most=4)
    assert made.workspace_of(algorithm, 8) == 48
    assert made.workspace_of(algorithm, 9) is None
    again = Algorithm(algorithm.data, algorithm.workspace)
    assert again == algorithm
    assert made.workspace_of(again, 24) == 48


def test_tiles_have_the_numbers_of_the_library() -> None:
    """Some of cublasLt.h 13.1."""
    numbers = {
        8: (16, 32), 20: (128, 128), 24: (256, 128), 36: (8, 128), 79: (32, 768), 116: (64, 192), 167: (112, 256),
        311: (768, 64), 312: (64, 16), 393: (128, 8), 497: (256, 112), 513: (256, 256), 630: (768, 80),
        634: (512, 1024),
    }  # fmt: skip
    assert {number: TILES[number] for number in numbers} == numbers
    assert len(TILES) == 635


def test_an_algorithm_is_varied_as_far_as_the_library_takes_it() -> None:
    host = HostCublasLt([HostAlgorithm(1, workspace=8, tiles=(20, 24)), HostAlgorithm(2)])
    library = CublasLt(host)
    made = Product(library, WIDTH, DEPTH, torch.bfloat16)
    first, second = made.offers(4, most=2)
    assert library.tiles(first) == [20, 24]
    assert library.tiles(second) == []
    varied = made.varied(first, 4, tile=20, cluster=3)
    assert varied is not None
    assert varied.data == b"".join(number.to_bytes(8, "little") for number in (1, 20, 3, 0, 0, 0, 0, 0))
    assert varied.workspace == 8
    assert made.varied(first, 4, tile=21) is None
    assert made.varied(first, 4, tile=24, cluster=3) is None
    assert made.varied(first, 4, tile=24, cluster=2) is not None
    assert made.varied(first, 4, stages=3) is None
    assert first.data == HostAlgorithm(1).data


def test_attributes_that_the_library_does_not_know_are_left_out() -> None:
    library = CublasLt(HostCublasLt([HostAlgorithm(100)]))
    assert library.attributes(Algorithm(HostAlgorithm(100).data, 0)) == {
        "id": 100, "tile": 101, "split_k": 102, "reduction": 103, "swizzle": 104, "option": 105, "stages": 106,
        "cluster": 108,
    }  # fmt: skip
    assert library.version == 130101


def test_a_failure_has_the_librarys_name() -> None:
    host = HostCublasLt([HostAlgorithm(1, status=13)])
    made = product(host)
    (algorithm,) = made.offers(1, most=1)
    rows, weight, out = torch.ones(1, DEPTH), torch.ones(WIDTH, DEPTH), torch.ones(1, WIDTH)
    with pytest.raises(CublasLtError, match="cublasLtMatmul: STATUS_13"):
        made.launch(algorithm, rows, weight, out, torch.empty(0, dtype=torch.uint8), 0)


def test_what_was_made_goes_with_its_owner() -> None:
    host = HostCublasLt([])
    library = CublasLt(host)
    made = Product(library, WIDTH, DEPTH, torch.float16)
    assert len(host.alive) == 6
    assert [what.kind for what in host.alive.values() if hasattr(what, "kind")] == [FLOAT16] * 3
    del made
    gc.collect()
    assert list(host.alive.values()) == ["handle"]
    del library
    gc.collect()
    assert not host.alive


def test_a_library_without_a_function_is_refused_by_its_name() -> None:
    host = HostCublasLt([])
    del host.cublasLtMatmulAlgoCheck  # type: ignore[attr-defined]
    with pytest.raises(CublasLtError, match="has no cublasLtMatmulAlgoCheck"):
        CublasLt(host)


def test_an_algorithm_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="has 64 bytes, not 63"):
        Algorithm(bytes(63), 0)


@pytest.mark.parametrize("cuda", [None, "99.0"])
def test_without_the_library_it_says_so(cuda: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(CublasLtError, match="no CUDA|has not loaded libcublasLt.so.99"):
        loaded_library()
