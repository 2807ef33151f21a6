"""The rows of one worker's device batch as columns, indexed by slot.

A slot is FREE, or owned by one request that is in one of three phases:

    PREFILL   some known tokens are not planned yet
    DECODE    every step computes one more token
    ENDING    its last token is planned; the slot is freed when that token is committed

For an owned slot:  0 ≤ planned, prompt_length ≤ known ≤ limit;  blocks hold tokens [0, num_blocks · block_size).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .blocks import Place, root
from .events import BoolColumn, IntColumn, LongColumn, WorkerLimits
from .requests import Request

FREE, PREFILL, DECODE, ENDING = range(4)

NO_TOKEN = -1
"""Fills `stops` beyond a row's own stop tokens: no sampled token equals it."""
STOP_COLUMNS = 8
"""Stop tokens of a row that are compared for all rows at once; a row with more keeps them in a set of its own."""


@lru_cache(maxsize=256)
def _stop_row(stops: tuple[int, ...]) -> IntColumn:
    """A row of `stops`, int32[STOP_COLUMNS], read-only: none of them if they do not all fit. Most requests have the
    same."""
    row: IntColumn = np.full(STOP_COLUMNS, NO_TOKEN, np.int32)
    if len(stops) <= STOP_COLUMNS:
        row[: len(stops)] = stops
    row.flags.writeable = False
    return row


class Rows:
    """Columns of int32 (int64 for identities), one entry a slot, and matrices with one row a slot."""

    def __init__(self, limits: WorkerLimits) -> None:
        slots = limits.max_num_seqs
        self.slots = slots
        self.phase = np.zeros(slots, np.uint8)
        self.number = np.full(slots, -1, np.int64)
        self.attempt = np.zeros(slots, np.int32)
        self.client = np.zeros(slots, np.int64)
        self.ticket = np.zeros(slots, np.int64)
        self.prompt_length = np.zeros(slots, np.int32)
        self.known = np.zeros(slots, np.int32)
        """Committed tokens: prompt and output."""
        self.planned = np.zeros(slots, np.int32)
        """Tokens whose keys and values are computed once every plan sent so far is done."""
        self.limit = np.zeros(slots, np.int32)
        self.priority = np.zeros(slots, np.int32)
        self.num_blocks = np.zeros(slots, np.int32)
        self.table = np.zeros((slots, -(-limits.max_model_len // limits.block_size)), np.int32)
        """[slot, i]: id of the block that holds tokens i · block_size and following."""
        self.history = np.empty((slots, limits.max_model_len), np.int32)
        """[slot, position]: committed tokens. Pages of it are touched only as rows grow."""
        self.stops = np.full((STOP_COLUMNS, slots), NO_TOKEN, np.int32)
        self.more_stops: dict[int, frozenset[int]] = {}
        """By slot: all stop tokens of a row that has over STOP_COLUMNS."""
        self._stop_columns = 0
        """Columns of `stops` that any row has used."""
        self.entered = np.zeros(slots, np.int32)
        """Tokens that were known when the row got its slot."""
        self.filed = [0] * slots
        """By slot: leading blocks whose contents the prefix cache knows, here or in another block."""
        self.place: list[Place] = [root("")] * slots
        """By slot: where in the prefix cache the last of them stands."""
        self.entries = np.zeros(slots, np.int32)
        """Log-probabilities that each token of the row comes with; 0 if they are not asked for."""
        self.telling = 0
        """Rows that have them."""
        self.prompt_entries: dict[int, int] = {}
        """By slot: log-probabilities to be told of each token of the prompt."""
        self.request: list[Request | None] = [None] * slots
        self._free = list(range(slots))

    @property
    def owned(self) -> int:
        """Slots that are not FREE."""
        return self.slots - len(self._free)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free)

    def open(self, request: Request, blocks: list[int], computed: int) -> int:
        """Gives the lowest free slot to a request in PREFILL, `computed` of whose tokens stand in its blocks already;
        returns the slot. There must be one. If it raises, the slot is still free."""
        slot = self._free[0]
        length = len(request.known)
        self.number[slot] = request.number
        self.attempt[slot] = request.attempt
        self.client[slot] = request.client
        self.ticket[slot] = request.ticket
        self.prompt_length[slot] = request.prompt_length
        self.known[slot] = length
        self.planned[slot] = computed
        self.limit[slot] = request.limit
        self.priority[slot] = request.priority
        self.num_blocks[slot] = len(blocks)
        self.table[slot, : len(blocks)] = blocks
        self.history[slot, :length] = request.known
        self.entered[slot] = length
        self.stops[:, slot] = _stop_row(request.stops)
        if len(request.stops) <= STOP_COLUMNS:
            self._stop_columns = max(self._stop_columns, len(request.stops))
        else:
            self.more_stops[slot] = frozenset(request.stops)
        self.entries[slot] = 0
        if request.sampling.logprobs is not None:
            self.entries[slot] = request.sampling.logprobs + 1
            self.telling += 1
        if request.tells_prompt and request.sampling.prompt_logprobs is not None:
            self.prompt_entries[slot] = request.sampling.prompt_logprobs + 1
        self.request[slot] = request
        self.phase[slot] = PREFILL
        return heapq.heappop(self._free)

    def owners(self, slots: Sequence[int]) -> list[Request]:
        """Whose slots these are. Raises RuntimeError if one is FREE."""
        found = [request for slot in slots if (request := self.request[slot]) is not None]
        if len(found) < len(slots):
            raise RuntimeError(f"of slots {slots} only {len(found)} have an owner")
        return found

    def blocks(self, slots: Sequence[int]) -> list[IntColumn]:
        """The blocks of each of these rows, in order."""
        table, counts = self.table, self.num_blocks[slots].tolist()
        return [table[slot, :count] for slot, count in zip(slots, counts, strict=True)]

    def close(self, slots: Sequence[int]) -> None:
        """Frees slots; their blocks are the caller's to give back."""
        columns = np.array(slots)
        self.phase[columns] = FREE
        self.number[columns] = -1
        self.num_blocks[columns] = 0
        if self.telling:
            self.telling -= int(np.count_nonzero(self.entries[columns]))
            self.entries[columns] = 0
        for slot in slots:
            self.request[slot] = None
            heapq.heappush(self._free, slot)
            if self.more_stops:
                self.more_stops.pop(slot, None)
            if self.prompt_entries:
                self.prompt_entries.pop(slot, None)

    def stopped(self, slots: LongColumn, tokens: IntColumn) -> BoolColumn:
        """Which of these rows got one of their stop tokens, bool like `slots`."""
        stopped: BoolColumn = np.zeros(len(slots), np.bool_)
        for column in self.stops[: self._stop_columns]:
            stopped |= column[slots] == tokens
        for slot, more in self.more_stops.items():
            at = np.flatnonzero(slots == slot)
            if len(at):
                stopped[at[0]] = int(tokens[at[0]]) in more
        return stopped

    def tokens(self, slot: int) -> IntColumn:
        """A copy of the committed tokens, int32[known]."""
        return self.history[slot, : self.known[slot]].copy()
