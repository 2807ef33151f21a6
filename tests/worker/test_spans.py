"""All tiles of all contexts lie in one line, which is cut into spans that differ by a tile at most."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tandem.worker.attention.sharing import PIECE_COLUMNS, TILE, EqualPieces, share_out
from tandem.worker.attention.spans import EvenSpans, SpanKind, even_spans

CONTEXTS = st.lists(st.one_of(st.just(0), st.just(1), st.integers(1, 40_000)), min_size=1, max_size=256)
WINDOWS = st.one_of(st.none(), st.integers(1, 5_000))


def cut(lengths: list[int], kind: SpanKind) -> tuple[list[list[int]], list[int]]:
    """Pieces (row, first, end, part, parts), and where the spans begin among them and end."""
    pieces = np.full((PIECE_COLUMNS, kind.pieces(len(lengths))), 77, np.int32)
    spans = np.full(kind.spans + 1, 77, np.int32)
    even_spans(np.array(lengths, np.int32), kind, pieces, spans)
    count = int(spans[-1])
    assert (pieces[0, count:] == -1).all()
    return pieces[:, :count].T.tolist(), spans.tolist()


@given(CONTEXTS, st.integers(1, 400), WINDOWS)
def test_every_tile_that_is_seen_is_in_one_piece_of_one_span(
    lengths: list[int], count: int, window: int | None
) -> None:
    pieces, spans = cut(lengths, SpanKind(count, window))
    assert (spans[0], spans[-1]) == (0, len(pieces))
    assert spans == sorted(spans)
    of_row: list[list[list[int]]] = [[] for _ in lengths]
    for piece in pieces:
        of_row[piece[0]].append(piece)
    assert [piece[0] for piece in pieces] == sorted(piece[0] for piece in pieces)
    for length, own in zip(lengths, of_row, strict=True):
        lowest = 0 if window is None else max(0, length - window)
        tiles = [tile for _, first, end, _, _ in own for tile in range(first // TILE, -(-end // TILE))]
        assert tiles == list(range(lowest // TILE, -(-length // TILE)))
        assert all(first % TILE == 0 and first < end for _, first, end, _, _ in own)
        assert all(end % TILE == 0 for _, _, end, _, _ in own[:-1])
        assert not own or own[-1][2] == length
        assert [piece[3:] for piece in own] == [[part, len(own)] for part in range(len(own))]
    work = [
        sum(-(-end // TILE) - first // TILE for _, first, end, _, _ in pieces[begin:stop])
        for begin, stop in pairwise(spans)
    ]
    assert max(work) - min(work) <= 1


@given(st.lists(st.integers(1, 3_000), min_size=1, max_size=40), st.lists(WINDOWS, min_size=1, max_size=3, unique=True))
def test_kinds_of_layers_have_places_of_their_own(lengths: list[int], windows: list[int | None]) -> None:
    kv_lens, rows = np.array(lengths, np.int32), len(lengths)
    cutting = EvenSpans(tuple(SpanKind(7 + number, window) for number, window in enumerate(windows)))
    written = np.full(cutting.room(rows), 77, np.int32)
    cutting.write(kv_lens, written)
    end = 0
    for kind in cutting.kinds:
        pieces, spans = cutting.places(kind, rows)
        assert (pieces.start, spans.start) == (end, pieces.stop)
        end = spans.stop
        alone = np.empty((PIECE_COLUMNS, kind.pieces(rows)), np.int32), np.empty(kind.spans + 1, np.int32)
        even_spans(kv_lens, kind, *alone)
        assert (written[pieces] == alone[0].reshape(-1)).all()
        assert (written[spans] == alone[1]).all()
    assert end == len(written)
    assert cutting.room(rows + 1) > cutting.room(rows)


def test_equal_pieces_are_those_of_share_out() -> None:
    kv_lens = np.array([1, 700, 64], np.int32)
    cutting = EqualPieces(4)
    written = np.empty(cutting.room(3), np.int32)
    cutting.write(kv_lens, written)
    assert (written.reshape(PIECE_COLUMNS, 7) == share_out(kv_lens, 7, np.empty((PIECE_COLUMNS, 7), np.int32))).all()


def test_rows_may_be_longer_together_than_a_32_bit_product() -> None:
    lengths = [1_000_000] * 300
    pieces, spans = cut(lengths, SpanKind(500, None))
    assert spans[-1] == len(pieces)
    assert sum(end - first for _, first, end, _, _ in pieces) == sum(lengths)
