"""The decode kernel against attention in float64, with contexts cut in every way, and caches in 16 and in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.worker.attention.sharing import PIECE_COLUMNS, share_out

pytestmark = pytest.mark.gpu

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 128, 700, 3001)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One query [heads, D] over key and value [T, kv_heads, D]: [heads, D] float64."""
    group = query.shape[0] // key.shape[1]
    if window is not None:
        key, value = key[-window:], value[-window:]
    keys = key.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.einsum("ht,thd->hd", scores.softmax(-1), value.double().repeat_interleave(group, dim=1))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bfloat16", "float8"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "dim", "window", "softcap"),
    [(32, 8, 128, None, None), (28, 4, 64, 100, None), (8, 8, 256, 65, 30.0), (40, 2, 96, None, 5.0)],
)
def test_attention_is_exact_however_contexts_are_cut(
    query_heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None, cache_dtype: torch.dtype
) -> None:
    from tandem.worker.attention.kernels import Scratch, attend

    torch.manual_seed(1)
    block_size, rows, lines = 16, len(LENGTHS), len(LENGTHS) + 3
    width = -(-max(LENGTHS) // block_size)
    tables = torch.randperm(lines * width, device="cuda").to(torch.int32).view(lines, width)
    keys, values = (
        torch.randn(lines * width, block_size, kv_heads, dim, device="cuda").bfloat16().to(cache_dtype)
        for _ in range(2)
    )
    query = torch.randn(rows, query_heads, dim, device="cuda").bfloat16()
    of_row = torch.randperm(lines, device="cuda")[:rows].to(torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    scale = dim**-0.5
    contexts = [tables[of_row[row].long()].long() for row in range(rows)]
    expected = torch.stack(
        [
            exact(
                query[row],
                keys[contexts[row]].flatten(0, 1)[:length].float(),
                values[contexts[row]].flatten(0, 1)[:length].float(),
                scale,
                window,
                softcap,
            )
            for row, length in enumerate(LENGTHS)
        ]
    )

    def attended(most: int | None, scratch: Scratch | None) -> Tensor:
        pieces = None
        if most is not None:
            table = share_out(np.array(LENGTHS, np.int32), most, np.empty((PIECE_COLUMNS, most), np.int32))
            pieces = torch.from_numpy(table).cuda()
        out = torch.full_like(query, float("nan"))
        attend(
            query, keys, values, tables, of_row, lengths, pieces, out, scratch,
            scale=scale, window=window, softcap=softcap,
        )  # fmt: skip
        return out

    scratch = Scratch(rows + 60, rows, kv_heads, query_heads * dim, torch.device("cuda"))
    for most in (None, rows, rows + 3, rows + 60):
        got = attended(most, scratch)
        worst = (got.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert float(worst.max()) < 1e-2, (most, worst)
        # Pieces arrive in any order and are merged in one.
        assert all(torch.equal(attended(most, scratch), got) for _ in range(5))
        assert not scratch.arrived.any()
    own_lines = torch.full_like(query, float("nan"))
    attend(
        query, keys, values, tables[of_row.long()].contiguous(), None, lengths, None, own_lines, None,
        scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    assert torch.equal(own_lines, attended(None, None))
