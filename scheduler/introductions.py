"""What a worker's next plan must say of rows that join its batch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from ..protocol.structured import StructuredOutputsParams
from .joining import rare_bytes, rare_columns
from .records import IntColumn
from .requests import Request
from .rows import Rows

MAX_JOINING_BYTES = 8 * 1024 * 1024
"""A plan introduces no further request once the known tokens, grammars, bad words and the like of those that join take
so much. Rows that share a cached prefix all name it, so without this a plan could be larger than a message may be."""


_JOINING = np.dtype(
    [
        ("join_number", "<i8"), ("join_seed", "<i8"), ("join_slot", "<i4"), ("join_attempt", "<i4"),
        ("join_prompt_length", "<i4"), ("join_length", "<i4"), ("join_computed", "<i4"), ("join_num_blocks", "<i4"),
        ("join_top_k", "<i4"), ("join_temperature", "<f4"), ("join_top_p", "<f4"),
    ]
)  # fmt: skip
"""What a plan says of each joining row, in columns named as its fields."""
_JOINED = _JOINING.names or ()
_pack_joining = struct.Struct("<qqiiiiiiiff").pack
"""One of these. To pack all of a row's numbers at once costs a third of making a column of each for a few rows."""

_Joining: TypeAlias = tuple[int, bytes, bytes]
"""About how many bytes a joining row brings; its numbers, one of _JOINING; its known tokens, int32."""


class Introductions:
    """Rows that no plan has introduced to the worker yet, in the order in which they joined."""

    def __init__(self, rows: Rows, vocab_size: int) -> None:
        self._rows = rows
        self._vocab_size = vocab_size
        self._joining: dict[int, _Joining] = {}
        """By slot."""
        self._bytes = 0
        """What they bring, all of them."""
        self._rare = False
        """One of them brings more than its numbers and tokens."""

    @property
    def full(self) -> bool:
        """The plan's message has no room for another row."""
        return self._bytes >= MAX_JOINING_BYTES

    def add(self, request: Request, slot: int, tokens: bytes, num_blocks: int, computed: int) -> None:
        """A request has got a slot: `computed` of its known tokens (`tokens`: int32, as bytes) stand in its blocks."""
        sampling = request.sampling
        brings = len(tokens)
        if sampling.structured_outputs is not None:
            brings += sampling.structured_outputs.size
            self._rare = True
        if request.rare:
            brings += rare_bytes(request, self._vocab_size)
            self._rare = True
        numbers = _pack_joining(
            request.number,
            request.seed,
            slot,
            request.attempt,
            request.prompt_length,
            request.length,
            computed,
            num_blocks,
            sampling.top_k if sampling.top_k > 0 else 0,  # noqa: FURB136 - max and min cost ten times as much
            sampling.temperature,
            sampling.top_p,
        )
        self._joining[slot] = (brings, numbers, tokens)
        self._bytes += brings

    def drop(self, slot: int) -> bool:
        """The owner of a slot has left; False if the worker has heard of it."""
        joining = self._joining.pop(slot, None)
        if joining is None:
            return False
        self._bytes -= joining[0]
        return True

    def columns(self) -> dict[str, Any]:
        """Those of a plan, which thereby introduces all of them."""
        if not self._joining:
            return {}
        slots, joining = list(self._joining), self._joining.values()
        blocks = list(chain.from_iterable([self._rows.blocks[slot] for slot in slots]))
        numbers = np.frombuffer(b"".join([numbers for _, numbers, _ in joining]), _JOINING)
        columns: dict[str, Any] = {name: numbers[name] for name in _JOINED}
        columns["join_token"] = np.frombuffer(b"".join([tokens for _, _, tokens in joining]), np.int32)
        columns["join_block"] = ints(blocks)
        if self._rare:
            requests = self._rows.owners(slots)
            columns |= _join_grammars(requests) | rare_columns(slots, requests, self._vocab_size)
        self._joining, self._bytes, self._rare = {}, 0, False
        return columns


def ints(values: Sequence[int]) -> IntColumn:
    """A column of these, which nobody writes to. NumPy takes twice as long for each to find out that it is a number."""
    return np.frombuffer(struct.pack(f"<{len(values)}i", *values), np.int32)


def _join_grammars(requests: Sequence[Request]) -> dict[str, Any]:
    """The grammars of joining rows, each one once, and which is whose; nothing if none has one."""
    index: dict[StructuredOutputsParams, int] = {}
    which = [
        -1 if grammar is None else index.setdefault(grammar, len(index))
        for grammar in (request.sampling.structured_outputs for request in requests)
    ]
    return {"grammars": tuple(index), "join_grammar": np.array(which, np.int32)} if index else {}
