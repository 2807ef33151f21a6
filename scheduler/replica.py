"""One worker as the scheduler sees it: its rows, its free blocks, and the steps that it has not answered yet.

A plan is made in four passes, each of which only touches rows that change:

    grow      decoding rows that fill their last block get one more; if none is left, the newest rows of the lowest
              class are preempted
    decode    every row in DECODE computes one token
    chunks    rows in PREFILL, in the order of their admission, share what is left of the step's token budget
    leave     rows that the plan before last finished, and preempted ones, are named once

Blocks and slots of a row that leaves may be given away in the same plan: the worker applies plans in order on one
stream. For the same reason a block is in the prefix cache as soon as a plan computes its last token, if that token is
known by then: those of prompts with their chunk, generated ones when their row leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ..protocol.errors import ProtocolError
from ..protocol.messages import NO_INTS, SUSPICIONS, StepPlan
from .blocks import BYTES_PER_TOKEN, BlockPool, Match
from .events import BoolColumn, IntColumn, LongColumn, WorkerLimits, record
from .introductions import Introductions, ints
from .logprobs import NOTHING_TOLD, Logprobs, PromptLogprobs, PromptPart, StepLogprobs
from .pace import Pace
from .policy import Policy
from .requests import Request
from .rows import DECODE, ENDING, FREE, PREFILL, Rows, identity_of

HUGE_SHARE = 0.75
"""Of the tokens left in a step, what a prompt gets that does not fit in: those behind it shall not wait for its end."""
_DECODE = np.array([DECODE], np.uint8)
"""A column of one; see `rows.ONE`."""


@record
class Flight:
    """A step without a result yet: which row each of its sampled tokens belongs to."""

    step: int
    slot: LongColumn
    """Those of rows that decode, then those whose chunk ends their known tokens."""
    ending: list[int]
    """Where in `slot` stand rows that are at their limit with this token …"""
    ending_slot: list[int]
    """… and these rows."""
    decode_rows: int
    chunk_tokens: int
    entries: IntColumn | None
    """Log-probabilities that each token comes with; None if none does."""
    prompts: list[PromptPart]
    chunk_slot: list[int]
    """Slots whose known tokens it computes."""
    lost: dict[int, int]
    """Slots whose owners have left since, and the numbers of these requests."""


@record
class Commit:
    """What a result added: one entry for each token that still has an owner."""

    slot: LongColumn
    client: LongColumn
    ticket: LongColumn
    offset: IntColumn
    token: IntColumn
    first: list[int]
    """Slots that got their first token since they were admitted."""
    stopped: list[int]
    """Slots that sampled one of their stop tokens; still owned."""
    exhausted: list[int]
    """Slots that reached their limit without one; still owned."""
    failed: tuple[tuple[int, str], ...]
    """Slots whose grammar cannot be followed any further, and why; still owned. They have got no token."""
    logprobs: Logprobs | None
    """Of these tokens; None if nobody asked."""
    prompts: tuple[PromptLogprobs, ...]

    @property
    def finishes(self) -> bool:
        """Rows are at their end."""
        return bool(self.stopped or self.exhausted or self.failed)


class Replica:
    """The scheduler's books of one worker. Everything here is plain bookkeeping: no clock, no policy across workers."""

    def __init__(self, worker: int, limits: WorkerLimits, epoch: int, policy: Policy) -> None:
        self.worker = worker
        self.limits = limits
        self.rows = Rows(limits)
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self._block_size = np.array([limits.block_size], np.int32)
        self._epoch = epoch
        self._watermark = int(policy.watermark * limits.num_blocks)
        self._caching = policy.enable_prefix_caching
        self._pace = Pace(policy.mixed_step_target_s)
        self._flights: deque[Flight] = deque()
        self._next_step = 0
        self._idle = True
        self.committed_at = 0.0
        """When the last result was entered, as the core says. Every row that decodes got a token then."""
        self._prefilling: dict[int, int] = {}
        """By slot in PREFILL, in the order of their admission: its known tokens that no plan covers yet."""
        self.backlog = 0
        """Their sum: prompt tokens that others here still wait for."""
        self.long_prompts: set[int] = set()
        """Of these slots, those that had more to compute than a step can take."""
        self._introductions = Introductions(self.rows, limits.vocab_size)
        """What the next plan must introduce to the worker."""
        self._leaving: list[int] = []
        """Slots that the worker still takes for owned and the next plan must name."""
        self.draining = False
        """Nobody joins, and its requests move to others as there is room."""
        self.reserved = False
        """Nobody joins: it is kept for a request that must run alone."""
        self.alone: Request | None = None
        """The request that runs here, and nobody joins it."""
        self.alone_since = 0.0

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def awaited_step(self) -> int | None:
        """The step whose result is due; None if nothing is in flight."""
        return self._flights[0].step if self._flights else None

    @property
    def newest_step_tokens(self) -> int:
        """Tokens that the step planned last computes; there must be one in flight."""
        flight = self._flights[-1]
        return flight.decode_rows + flight.chunk_tokens

    @property
    def load(self) -> float:
        """Share of slots or blocks in use, whichever is larger."""
        return max(self.rows.share, 1.0 - self.pool.available / self.pool.total)

    def accepts(self, steps: int = 1) -> bool:
        """It is open to all, there is a free slot and room in the next plan's message, and the prompts that are being
        computed leave room for more of them in so many steps.

        The oldest prompt does not count, however huge: the others get their share beside it.
        """
        if self.draining or self.reserved or self.alone is not None or not self.rows.free:
            return False
        if self._introductions.full:
            return False
        backlog, most = self.backlog, self.limits.max_num_batched_tokens
        if backlog < most:
            return True
        most *= steps
        return backlog < most or backlog - next(iter(self._prefilling.values()), 0) < most

    @property
    def expected_step_s(self) -> float | None:
        """How long the oldest step in flight should take, going by those before; None if nothing is known of such."""
        if not self._flights:
            return None
        flight = self._flights[0]
        return self._pace.step_s(flight.decode_rows, flight.chunk_tokens)

    def launched(self) -> set[int]:
        """Numbers of the requests that the steps in flight compute."""
        numbers: set[int] = set()
        for flight in self._flights:
            computed = {*flight.slot.tolist(), *flight.chunk_slot}
            numbers.update(flight.lost[slot] for slot in computed.intersection(flight.lost))
            numbers.update(one.number for one in self.rows.owners(list(computed.difference(flight.lost))))
        return numbers

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    def offer(self, request: Request, steps: int = 1) -> Match | None:
        """What the request would find here, or None without room for all its known tokens beside the others, with the
        watermark left free; alone, it always fits. `steps`: see `accepts`."""
        if not self.accepts(steps):
            return None
        if request.probes:
            former = request.probes.get(self.worker)
            if former is not None and not former[1].pending and not self._fits(request, former[1]):
                return None  # as a rule nothing that would help was cached since, and looking costs more than waiting
        match = self.match(request)
        if self._fits(request, match):
            return match
        self.remember(request, match)
        return None

    def remember(self, request: Request, match: Match) -> None:
        """Keeps what a request that goes on waiting would find here, until that may have changed."""
        request.packed = None
        if request.probes is None:
            request.probes = {}
        request.probes[self.worker] = self.pool.generation, match

    def cost(self, request: Request, match: Match) -> float:
        """What it would mean to run a request here that finds `match`: tokens to compute before its first one, those of
        others included, and a penalty for load; lower is better."""
        to_compute = request.length - len(match.blocks) * self.limits.block_size
        return to_compute + self.backlog + self.load * self.limits.max_num_batched_tokens

    def _fits(self, request: Request, match: Match) -> bool:
        found, pool, rows = match.blocks, self.pool, self.rows
        needed = -(-request.length // pool.block_size)
        if found:
            needed += pool.idle_among(found) - len(found)
        if len(rows.free) < rows.slots:
            needed += self._watermark
        return pool.available >= needed

    def match(self, request: Request) -> Match:
        """What the prefix cache holds of it: never all, since its last token must be computed to get the next one."""
        pool = self.pool
        if not self._caching or (request.rare and request.tells_prompt):
            return Match([], request.root)
        if request.probes:
            probe = request.probes.get(self.worker)
            if probe is not None and probe[0] == pool.generation:
                return probe[1]
        request.packed = packed = request.known.tobytes()
        return pool.match(packed, request.root, (request.length - 1) // pool.block_size)

    # --- requests come and go --------------------------------------------------------------------------------------

    def admit(self, request: Request, match: Match) -> None:
        """Gives a request a slot and blocks for its known tokens; its `offer` said that there is room, and `match` came
        from it. Changes nothing if it raises."""
        pool, length = self.pool, request.length
        block_size = pool.block_size
        tokens = request.packed or request.known.tobytes()
        request.packed = request.probes = None
        shared = len(match.blocks)
        if shared:
            pool.share(match.blocks)
        own = pool.take(-(-length // block_size) - shared)
        blocks, computed = match.blocks + own, shared * block_size
        try:
            slot = self.rows.open(request, tokens, blocks, computed)
        except BaseException:
            pool.give(blocks)
            raise
        self._prefilling[slot] = left = length - computed
        self.backlog += left
        if left > self.limits.max_num_batched_tokens:
            self.long_prompts.add(slot)
        self._introductions.add(request, slot, tokens, len(blocks), computed)
        if self._caching:
            full = self.rows.filed[slot] = length // block_size
            of_blocks = tokens[computed * BYTES_PER_TOKEN : full * block_size * BYTES_PER_TOKEN]
            # What the match says has been true until now: since then blocks were given away, and none was entered.
            enter = pool.file if match.ends else pool.enter
            self.rows.place[slot] = enter(of_blocks, match.place, own[: full - shared], False)
            if request.cached_tokens is None:
                prompt = request.prompt_length
                request.cached_tokens = computed if computed < prompt else prompt  # noqa: FURB136 - as above

    def release(self, slots: Sequence[int], over: Sequence[int] = ()) -> None:
        """Frees slots and their blocks, whatever their phases and with any step in flight: results on their way lose
        their owners. `over`: more slots, whose last token was committed just now, so that nothing is on its way."""
        rows = self.rows
        phase = rows.cells.phase
        for slot, request in zip(slots, rows.owners(slots), strict=True):
            for flight in self._flights:
                flight.lost.setdefault(slot, request.number)
            if phase[slot] == ENDING:
                continue  # it was named as leaving when its last token was planned
            if slot in self._prefilling:
                self.backlog -= self._prefilling.pop(slot)
                self.long_prompts.discard(slot)
            if not self._introductions.drop(slot):
                self._leaving.append(slot)
        slots = [*slots, *over]
        blocks = [rows.blocks[slot] for slot in slots]
        if self._caching:
            self._file_generated(slots, blocks)
        rows.close(slots)
        self.pool.give(*blocks)

    def _file_generated(self, slots: Sequence[int], blocks: list[list[int]]) -> None:
        """Enters the blocks that have become full of committed tokens since the rows got their slots."""
        rows, block_size, enter = self.rows, self.limits.block_size, self.pool.enter
        known, planned, filed, place = rows.cells.known, rows.cells.planned, rows.filed, rows.place
        for slot, of_row in zip(slots, blocks, strict=True):
            certain, computed, begin = known[slot], planned[slot], filed[slot]
            end = (certain if certain < computed else computed) // block_size  # noqa: FURB136 - as above
            if end > begin:
                tokens = rows.packed(slot, begin * block_size, end * block_size)
                enter(tokens, place[slot], of_row[begin:end], True)

    def slot_of(self, request: Request) -> int | None:
        """Where a request runs here, or None."""
        runs = request.worker == self.worker and self.rows.request[request.slot] is request
        return request.slot if runs else None

    def evict(self, slot: int) -> Request:
        """Takes a running request back with all its committed tokens, for another attempt."""
        request = self.rows.request[slot]
        if request is None:
            raise ValueError(f"slot {slot} is free")
        before = request.length
        request.learn(self.rows.tokens(slot))
        if request.length > before:
            request.last_token_at = self.committed_at
        request.attempt += 1
        self.release([slot])
        return request

    def evict_all(self) -> list[Request]:
        """Takes all its requests back, oldest first."""
        return [self.evict(slot) for slot in self.rows.oldest_first()]

    # --- steps -----------------------------------------------------------------------------------------------------

    def plan(self) -> tuple[StepPlan | None, list[Request]]:
        """The next step, and the requests that had to be preempted for it; (None, …) if there is nothing to compute
        now.

        The plan counts as sent: rows advance, and its result is awaited.
        """
        preempted: list[Request] = []
        growth = self._grow(preempted)
        if growth is None:
            return None, preempted
        decodes, grown, added = growth
        decoding = decodes.nonzero()[0]
        chunk_slot: list[int] = []
        chunk_length: list[int] = []
        if self._prefilling:
            budget = self.limits.max_num_batched_tokens - len(decoding)
            chunk_slot, chunk_length = self._chunks(self._pace.chunk_tokens(len(decoding), budget))
        if not len(decoding) and not chunk_slot:
            return None, preempted

        rows = self.rows
        slots = lengths = NO_INTS
        if chunk_slot:
            slots, lengths = ints(chunk_slot), ints(chunk_length)
        plan = StepPlan(
            epoch=self._epoch,
            registration=self.worker,
            step=self._next_step,
            after_idle=self._idle,
            leave=ints(self._leaving) if self._leaving else NO_INTS,
            grow_slot=grown.astype(np.int32) if added else NO_INTS,
            grow_block=ints(added) if added else NO_INTS,
            chunk_slot=slots,
            chunk_length=lengths,
            **self._introductions.columns(),
        )
        prompts = self._prompt_parts(chunk_slot, chunk_length) if rows.prompt_entries else []
        sampled, ending, ending_slot = self._advance(decodes, decoding, chunk_slot, chunk_length)
        flight = Flight(
            step=self._next_step,
            slot=sampled,
            ending=ending,
            ending_slot=ending_slot,
            decode_rows=len(decoding),
            chunk_tokens=sum(chunk_length),
            entries=rows.entries[sampled] if rows.telling else None,
            prompts=prompts,
            chunk_slot=chunk_slot,
            lost={},
        )
        self._flights.append(flight)
        self._leaving = ending_slot.copy()
        self._next_step += 1
        self._idle = False
        return plan, preempted

    def commit(
        self,
        step: int,
        token: IntColumn,
        busy_us: int = 0,
        failed: tuple[tuple[int, str], ...] = (),
        told: StepLogprobs | None = None,
    ) -> Commit:
        """Enters a step's tokens into the rows that still own them. `busy_us`: device time of the step, 0 if unknown;
        `failed`: places in `token` whose tokens are none, and why.

        Raises ProtocolError, having changed nothing, if it is not the result that is due or does not fit the step.
        """
        if not self._flights or self._flights[0].step != step:
            due = self._flights[0].step if self._flights else "none"
            raise ProtocolError(f"worker {self.worker} sent the result of step {step}; due is {due}")
        flight = self._flights[0]
        if len(token) != len(flight.slot):
            raise ProtocolError(
                f"worker {self.worker} sent {len(token)} tokens for step {step}, not {len(flight.slot)}"
            )
        if len(token) and _highest(token) >= self.limits.vocab_size:  # negative ones are the largest
            raise ProtocolError(f"worker {self.worker} sent a token outside the vocabulary in step {step}")
        if not all(0 <= position < len(token) for position, _ in failed):
            raise ProtocolError(f"worker {self.worker} failed rows that step {step} has not sampled for")
        if flight.entries is not None or flight.prompts or told is not None:
            told = told or NOTHING_TOLD
            told.require(flight.entries, flight.prompts, self.limits.vocab_size)
        self._flights.popleft()
        self._pace.observe(flight.decode_rows, flight.chunk_tokens, busy_us / 1e6)

        rows, slot, first = self.rows, flight.slot, flight.slot[flight.decode_rows :]
        ending, exhausted = flight.ending, flight.ending_slot
        failures = {slot.item(at): error for at, error in failed if slot.item(at) not in flight.lost}
        logprobs = None if told is None or flight.entries is None else told.of_tokens(flight.entries)
        if flight.lost or failures:
            nobodys = np.zeros(rows.slots, np.bool_)
            nobodys[[*flight.lost, *failures]] = True
            owned = ~nobodys[slot]
            if logprobs is not None:
                logprobs = logprobs.take(np.flatnonzero(owned))
            first = first[owned[flight.decode_rows :]]
            places = np.cumsum(owned) - 1
            ending = [int(places[at]) for at in ending if owned[at]]
            slot, token = slot[owned], token[owned]
            exhausted = [slot.item(at) for at in ending]
        position = rows.append(slot, token)
        stopped = rows.stopped(slot, token)
        if stopped:
            exhausted = [slot.item(at) for at in ending if at not in stopped]
        return Commit(
            slot=slot,
            client=rows.client.take(slot),
            ticket=rows.ticket.take(slot),
            offset=position - rows.prompt_length.take(slot),
            token=token,
            first=first.tolist(),
            stopped=[slot.item(at) for at in stopped],
            exhausted=exhausted,
            failed=tuple(failures.items()),
            logprobs=logprobs,
            prompts=() if told is None else self._commit_prompts(flight.prompts, told),
        )

    def _commit_prompts(self, parts: list[PromptPart], told: StepLogprobs) -> tuple[PromptLogprobs, ...]:
        """What of these parts has an owner, and was not told by an attempt before."""
        found = []
        position = value = 0
        for part in parts:
            first, first_value = position, value
            position += part.count
            value += part.count * part.entries
            request = self.rows.request[part.slot]
            if request is None or identity_of(request) != part.identity:
                continue
            again = min(max(0, request.prompt_told - part.position), part.count)
            if again == part.count:
                continue
            request.prompt_told = part.position + part.count
            values = slice(first_value + again * part.entries, value)
            found.append(
                PromptLogprobs(
                    request.client,
                    request.ticket,
                    part.position + again,
                    part.entries,
                    told.prompt_rank[first + again : position],
                    told.prompt_token[values],
                    told.prompt_logprob[values],
                )
            )
        return tuple(found)

    def settle(self) -> None:
        """To be called once a commit's finished rows are released: without rows the next plan follows an idle spell."""
        if not self.rows.owned and not self._flights:
            self._idle = True

    # --- the passes of a plan --------------------------------------------------------------------------------------

    def _grow(self, preempted: list[Request]) -> tuple[BoolColumn, LongColumn, list[int]] | None:
        """One more block for each decoding row that has filled its last; returns for each slot whether it decodes, the
        slots that got a block, and the blocks.

        None if blocks will come free with a result on its way, so that planning should wait for it.
        """
        rows = self.rows
        while True:
            decodes = rows.phase == _DECODE
            full = rows.planned == rows.room
            full &= decodes
            slots = full.nonzero()[0]
            if len(slots) <= self.pool.available:
                break
            candidates = np.flatnonzero(decodes | (rows.phase == PREFILL))
            if len(candidates) == 1:
                return None  # what it lacks is held by rows in ENDING
            owners = rows.owners(candidates.tolist())
            newest_of_lowest = max(range(len(owners)), key=lambda one: (owners[one].priority, owners[one].number))
            preempted.append(self.evict(int(candidates[newest_of_lowest])))
        if not len(slots):
            return decodes, slots, []
        added = self.pool.take(len(slots))
        rows.room[slots] += self._block_size
        blocks = rows.blocks
        for slot, block in zip(slots.tolist(), added, strict=True):
            blocks[slot].append(block)
        return decodes, slots, added

    def _chunks(self, budget: int) -> tuple[list[int], list[int]]:
        """Slots that compute known tokens in this step, and how many each; `budget` in all."""
        chunk_slot, chunk_length = [], []
        others = len(self._prefilling)
        for slot, length in self._prefilling.items():
            if budget <= 0:
                break
            others -= 1
            if length > budget:
                length = max(1, int(budget * HUGE_SHARE)) if others else budget
            chunk_slot.append(slot)
            chunk_length.append(length)
            budget -= length
        return chunk_slot, chunk_length

    def _prompt_parts(self, slots: list[int], lengths: list[int]) -> list[PromptPart]:
        """What the chunks of a plan tell of prompts; the rows have not advanced yet."""
        rows, parts = self.rows, []
        for slot, length in zip(slots, lengths, strict=True):
            first = int(rows.planned[slot]) + 1
            count = min(first + length, int(rows.prompt_length[slot])) - first
            if slot in rows.prompt_entries and count > 0:
                (owner,) = rows.owners([slot])
                parts.append(PromptPart(slot, identity_of(owner), first, count, rows.prompt_entries[slot]))
        return parts

    def _advance(
        self, decodes: BoolColumn, decoding: LongColumn, slots: list[int], lengths: list[int]
    ) -> tuple[LongColumn, list[int], list[int]]:
        """Moves the rows past the step, in which `slots` compute chunks of these lengths; returns the slots that sample
        in it, in the result's order, where among them those stand that are now in ENDING, and these."""
        rows = self.rows
        rows.planned += decodes
        decodes &= rows.planned >= rows.last
        leaving = decodes.nonzero()[0]
        ending: list[int] = []
        ending_slot: list[int] = []
        if len(leaving):
            rows.phase[leaving] = ENDING
            ending, ending_slot = decoding.searchsorted(leaving).tolist(), leaving.tolist()
        if not slots:
            return decoding, ending, ending_slot
        completed, more = self._chunks_planned(slots, lengths)
        for at in more:
            ending.append(len(decoding) + at)
            ending_slot.append(completed[at])
        return np.concatenate([decoding, ints(completed)]), ending, ending_slot

    def _chunks_planned(self, slots: list[int], lengths: list[int]) -> tuple[list[int], list[int]]:
        """Moves rows past chunks; returns the slots of which all known tokens are planned now, and where among them
        those stand that are at their limit with the next."""
        prefilling, block_size, rows = self._prefilling, self.limits.block_size, self.rows
        blocks, planned, last, phase = rows.blocks, rows.cells.planned, rows.cells.last, rows.cells.phase
        full: list[int] = []
        completed: list[int] = []
        at_limit: list[int] = []
        for slot, length in zip(slots, lengths, strict=True):
            left, before = prefilling[slot], planned[slot]
            after = planned[slot] = before + length
            full += blocks[slot][before // block_size : after // block_size]
            if length < left:
                prefilling[slot] = left - length
                continue
            del prefilling[slot]
            if after >= last[slot]:
                at_limit.append(len(completed))
                phase[slot] = ENDING
            else:
                phase[slot] = DECODE
            completed.append(slot)
        self.backlog -= sum(lengths)
        if self.long_prompts:
            self.long_prompts.difference_update(completed)
        if self._caching:
            self.pool.computed(full)
        return completed, at_limit

    # --- integrity -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError unless the books balance: free + idle + owned = all blocks, every slot has one owner,
        and a block has several only where the prefix cache shares it."""
        rows = self.rows
        owned = np.flatnonzero(rows.phase != FREE)
        self.pool.check([rows.blocks[slot] for slot in owned.tolist()])
        alone = self.alone
        problems = [
            (
                alone is not None and any(request not in (None, alone) for request in rows.request),
                f"others run beside {alone!r}",
            ),
            (
                any(request.suspicions >= SUSPICIONS and request is not alone for request in rows.request if request),
                "a request that must run alone does not",
            ),
            (self.reserved and rows.owned > 0, "it is reserved and runs something"),
            (rows.owned != len(owned), f"{rows.owned} slots are counted as owned, {len(owned)} are"),
            ([one.slot for one in rows.owners(owned.tolist())] != owned.tolist(), "a request owns another slot"),
            (
                sorted(self._prefilling) != np.flatnonzero(rows.phase == PREFILL).tolist(),
                "slots in PREFILL are misfiled",
            ),
            (len(set(self._leaving)) != len(self._leaving), f"a slot leaves twice: {self._leaving}"),
            (
                any(left != rows.known[slot] - rows.planned[slot] for slot, left in self._prefilling.items()),
                f"what is left of prompts is miscounted: {self._prefilling}",
            ),
            (self.backlog != sum(self._prefilling.values()), f"the backlog is not {self.backlog}"),
            (
                not {slot for slot, left in self._prefilling.items() if left > self.limits.max_num_batched_tokens}
                <= self.long_prompts
                <= self._prefilling.keys(),
                f"long prompts are misfiled: {self.long_prompts}",
            ),
            (bool((rows.known[owned] > rows.last[owned] + 1).any()), "a row knows more tokens than its limit"),
            (
                [len(rows.blocks[slot]) * self.limits.block_size for slot in owned.tolist()]
                != rows.room[owned].tolist(),
                "the room of rows is miscounted",
            ),
            (bool((rows.planned[owned] > rows.room[owned]).any()), "a row is planned past its blocks"),
        ]
        for broken, story in problems:
            if broken:
                raise AssertionError(f"worker {self.worker}: {story}")


def _highest(token: IntColumn) -> int:
    """The highest of the tokens, of which there is one at least; negative ones count as the higher."""
    unsigned = token.view(np.uint32)
    highest: int = unsigned.item(unsigned.argmax())  # for a few it takes half of the time of `max`
    return highest
