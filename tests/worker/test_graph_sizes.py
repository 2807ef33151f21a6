"""Which numbers of rows are captured."""

from __future__ import annotations

from bisect import bisect_left

import pytest

from tandem.worker.graphs import graph_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 32, 40, 100, 256, 257, 512, 3_000])
def test_every_number_of_rows_finds_a_graph_that_is_not_much_larger(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        size = sizes[bisect_left(sizes, rows)]
        assert rows <= size <= max(rows + 7, 4 * rows // 3)
    assert len(sizes) < 40
