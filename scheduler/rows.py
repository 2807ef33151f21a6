"""The rows of one worker's device batch as columns, indexed by slot.

A slot is FREE, or owned by one request that is in one of three phases:

    PREFILL   some known tokens are not planned yet
    DECODE    every step computes one more token
    ENDING    its last token is planned; the slot is freed when that token is committed

For an owned slot:  0 ≤ planned, prompt_length ≤ known ≤ last + 1;  planned ≤ room = len(blocks) · block_size.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .blocks import BYTES_PER_TOKEN, Place, root
from .events import IntColumn, LongColumn, WorkerLimits
from .requests import Request

FREE, PREFILL, DECODE, ENDING = range(4)
ONE = np.ones(1, np.int32)
"""Constants that columns are computed with are columns of one: with numbers it takes NumPy up to twice as long."""

FEW_STOP_TOKENS = 4
"""So many are compared with a step's tokens; if there are more, each of its tokens is looked up."""
FALSE_ALARMS = 64
"""When so many tokens for each slot were looked at in vain, the stop tokens of rows that are gone are forgotten."""
ATTEMPT_BITS = 16
"""Of an attempt, in an identity."""
ATTEMPT_MASK = (1 << ATTEMPT_BITS) - 1


def identity_of(request: Request) -> int:
    """Request number and attempt as one number. Of the attempt it holds the last ATTEMPT_BITS: results are told apart
    by it while a few steps are in flight, and an attempt is at least a step."""
    return request.number << ATTEMPT_BITS | request.attempt & ATTEMPT_MASK


class Cells(NamedTuple):
    """Columns of Rows, the same memory: to read or store a single number takes half of what it takes through NumPy."""

    client: memoryview
    ticket: memoryview
    prompt_length: memoryview
    known: memoryview
    planned: memoryview
    last: memoryview
    room: memoryview
    phase: memoryview


class Rows:
    """Columns of int32 (int64 for clients and tickets), one entry a slot, and matrices with one row a slot."""

    def __init__(self, limits: WorkerLimits) -> None:
        slots = limits.max_num_seqs
        self.slots = slots
        self.phase = np.zeros(slots, np.uint8)
        self.client = np.zeros(slots, np.int64)
        self.ticket = np.zeros(slots, np.int64)
        self.prompt_length = np.zeros(slots, np.int32)
        self.known = np.zeros(slots, np.int32)
        """Committed tokens: prompt and output."""
        self.planned = np.zeros(slots, np.int32)
        """Tokens whose keys and values are computed once every plan sent so far is done."""
        self.last = np.zeros(slots, np.int32)
        """With so many tokens planned a row is ENDING: what is sampled then brings it to its limit."""
        self.room = np.zeros(slots, np.int32)
        """Tokens that its blocks can hold."""
        self.blocks: list[list[int]] = [[] for _ in range(slots)]
        """By slot: ids of its blocks, in order. Lists, because rows come, grow and go by a few blocks each."""
        self.history = np.empty((slots, limits.max_model_len), np.int32)
        """[slot, position]: committed tokens. Pages of it are touched only as rows grow."""
        self._flat_history = self.history.reshape(-1)
        self._history_bytes = self._flat_history.data.cast("B")
        self._max_model_len = limits.max_model_len
        self._stride = np.array([limits.max_model_len], np.int64)
        self._stop_tokens: set[int] = set()
        """Of all rows here, and of some that were: only a row that samples one is looked at …"""
        self._few_stop_tokens: list[IntColumn] = []
        """… the same while they are few, each as a column of one …"""
        self._is_stop_token = np.zeros(limits.vocab_size, np.bool_)
        """… and by token, whether it is one of them."""
        self._false_alarms = 0
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
        self._block_size = limits.block_size
        self.cells = Cells(*(getattr(self, name).data for name in Cells._fields))
        self._cells = tuple(self.cells)  # which is unpacked in half of the time
        self.free = list(range(slots))
        """FREE slots, a heap."""

    @property
    def owned(self) -> int:
        """Slots that are not FREE."""
        return self.slots - len(self.free)

    @property
    def share(self) -> float:
        """Of the slots, those that are not FREE."""
        return 1.0 - len(self.free) / self.slots

    def open(self, request: Request, tokens: bytes, blocks: list[int], computed: int) -> int:
        """Gives the lowest free slot to a request in PREFILL, `computed` of whose known tokens (`tokens`: int32, as
        bytes) stand in its blocks already; returns the slot. There must be one. If it raises, the slot is still
        free."""
        slot, length = self.free[0], len(tokens) // BYTES_PER_TOKEN
        if length > self._max_model_len:
            raise ValueError(f"{length} tokens are over the worker's context of {self._max_model_len}")
        begin = slot * self._max_model_len * BYTES_PER_TOKEN
        self._history_bytes[begin : begin + len(tokens)] = tokens
        client, ticket, prompt_length, known, planned, last, room, phase = self._cells
        client[slot] = request.client
        ticket[slot] = request.ticket
        prompt_length[slot] = request.prompt_length
        known[slot] = length
        planned[slot] = computed
        last[slot] = request.limit - 1
        room[slot] = len(blocks) * self._block_size
        self.blocks[slot] = blocks
        if not request.stops <= self._stop_tokens:
            self._heed(request.stops)
        if request.rare:
            self._open_logprobs(request, slot)
        self.request[slot] = request
        request.slot = slot
        phase[slot] = PREFILL
        return heapq.heappop(self.free)

    def _open_logprobs(self, request: Request, slot: int) -> None:
        sampling = request.sampling
        if sampling.logprobs is not None:
            self.entries[slot] = sampling.logprobs + 1
            self.telling += 1
        if sampling.prompt_logprobs is not None and request.tells_prompt:
            self.prompt_entries[slot] = sampling.prompt_logprobs + 1

    def owners(self, slots: Sequence[int]) -> list[Request]:
        """Whose slots these are. Raises RuntimeError if one is FREE."""
        found = [request for slot in slots if (request := self.request[slot]) is not None]
        if len(found) < len(slots):
            raise RuntimeError(f"of slots {slots} only {len(found)} have an owner")
        return found

    def oldest_first(self) -> list[int]:
        """Slots that are not FREE, in the order in which their requests were accepted."""
        found = [(request.number, slot) for slot, request in enumerate(self.request) if request is not None]
        return [slot for _, slot in sorted(found)]

    def close(self, slots: Sequence[int]) -> None:
        """Frees slots; their blocks are the caller's to give back."""
        phase = self.cells.phase
        requests, blocks, free = self.request, self.blocks, self.free
        for slot in slots:
            phase[slot] = FREE
            requests[slot] = None
            blocks[slot] = []
            heapq.heappush(free, slot)
        if self.telling:
            self.telling -= int(np.count_nonzero(self.entries[slots]))
            self.entries[slots] = 0
        if self.prompt_entries:
            for slot in slots:
                self.prompt_entries.pop(slot, None)

    def _heed(self, stops: frozenset[int]) -> None:
        """Enters stop tokens; those outside the vocabulary are never sampled."""
        self._stop_tokens |= stops
        vocab_size = len(self._is_stop_token)
        self._is_stop_token[[token for token in stops if 0 <= token < vocab_size]] = True
        if len(self._stop_tokens) <= FEW_STOP_TOKENS:
            sampled = [token for token in self._stop_tokens if 0 <= token < vocab_size]
            self._few_stop_tokens = [np.array([token], np.int32) for token in sampled]

    def stopped(self, slots: LongColumn, tokens: IntColumn) -> list[int]:
        """At which places of these columns a row got one of its stop tokens."""
        if len(self._stop_tokens) > FEW_STOP_TOKENS:
            suspected = self._is_stop_token[tokens]
        elif not self._few_stop_tokens:
            return []
        else:
            suspected = tokens == self._few_stop_tokens[0]
            for token in self._few_stop_tokens[1:]:
                suspected |= tokens == token
        suspects = suspected.nonzero()[0]
        if not len(suspects):
            return []
        owners = self.owners(slots[suspects].tolist())
        found = zip(suspects.tolist(), tokens[suspects].tolist(), owners, strict=True)
        stopped = [at for at, token, owner in found if token in owner.stops]
        self._false_alarms += len(suspects) - len(stopped)
        if self._false_alarms > FALSE_ALARMS * self.slots:
            self._forget_stop_tokens()
        return stopped

    def _forget_stop_tokens(self) -> None:
        """Of rows that are gone. Else whoever had named every token once would have all rows looked at for ever."""
        self._false_alarms = 0
        self._stop_tokens.clear()
        self._few_stop_tokens = []
        self._is_stop_token[:] = False
        for stops in {request.stops for request in self.request if request is not None}:
            self._heed(stops)

    def append(self, slots: LongColumn, tokens: IntColumn) -> IntColumn:
        """Each of these rows knows one more token; returns its position."""
        position: IntColumn = self.known.take(slots)  # for many it takes a tenth less than by index
        self._flat_history[slots * self._stride + position] = tokens
        self.known[slots] = position + ONE
        return position

    def packed(self, slot: int, begin: int, end: int) -> bytes:
        """Committed tokens `begin` to `end` (exclusive) as bytes, int32."""
        first = BYTES_PER_TOKEN * (slot * self._max_model_len + begin)
        return self._history_bytes[first : first + BYTES_PER_TOKEN * (end - begin)].tobytes()

    def tokens(self, slot: int) -> IntColumn:
        """A copy of the committed tokens, int32[known]."""
        return self.history[slot, : self.known[slot]].copy()
