"""Which of several workers a request goes to.

Workers where equally much of a request is cached are compared by how many requests they run: how many rows a worker's
steps have is what every request there feels until it ends. The prompts that it still has to compute change from step to
step, and equal workers are a step or two apart in them at any moment. They count only beyond PASSING_STEPS, or if one
of them is long.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

from .blocks import Match
from .replica import Replica
from .requests import Request

PASSING_STEPS = 3
"""Short prompts for so many steps more than another worker has say nothing of how busy a worker will be in a second."""
NEAR = 1 / 16
"""Loads that are so close count as the same: the blocks in use grow by fits and starts."""

Offer: TypeAlias = tuple[Replica, Match]
"""A worker with room for the request, and what the request would find there."""


def choose(request: Request, offers: list[Offer], replicas: Collection[Replica]) -> Offer:
    """The best of the offers, one at least, that some of all these replicas made.

    One that has prompts for a whole step makes none, but is asked again if it runs fewer requests than all that do:
    they would get its share, only because their steps ended first. What it offers then is added to `offers`.
    """
    if len(offers) < len(replicas):
        _ask_again(request, offers, replicas)
    if len(offers) == 1:
        return offers[0]
    first, match = offers[0]
    cached = len(match.blocks) * first.limits.block_size
    for replica, match in offers:
        if len(match.blocks) * replica.limits.block_size != cached:
            break
    else:
        return _emptiest(offers)
    by_cached: dict[int, list[Offer]] = {}
    for offer in offers:
        by_cached.setdefault(len(offer[1].blocks) * offer[0].limits.block_size, []).append(offer)
    best = [_emptiest(alike) for alike in by_cached.values()]
    return min(best, key=lambda offer: offer[0].cost(request, offer[1]))


def _ask_again(request: Request, offers: list[Offer], replicas: Collection[Replica]) -> None:
    least = min([replica.rows.share for replica, _ in offers])
    for replica in replicas:
        if replica.rows.free and replica.rows.share < least:
            match = replica.offer(request, PASSING_STEPS)
            if match is not None:
                offers.append((replica, match))


def _emptiest(offers: list[Offer]) -> Offer:
    """That of the worker with the smallest share of its slots in use, then the fewest prompt tokens to compute, among
    those that are about as busy as the least busy one. Equally much of the request is cached at all of them."""
    emptiest = offers[0]
    share, backlog = emptiest[0].rows.share, emptiest[0].backlog
    for offer in offers[1:]:
        replica = offer[0]
        rows = replica.rows
        here = 1.0 - len(rows.free) / rows.slots  # its share, without a call
        if here < share or (here == share and replica.backlog < backlog):
            emptiest, share, backlog = offer, here, replica.backlog
    least = min([replica.backlog for replica, _ in offers]) if backlog else 0
    if _busy(emptiest[0], least) <= share + NEAR:
        return emptiest  # as a rule: nobody is less busy than the smallest share
    least = min([replica.backlog for replica, _ in offers])
    busy = [_busy(replica, least) for replica, _ in offers]
    limit = min(busy) + NEAR
    near = [offer for offer, how in zip(offers, busy, strict=True) if how <= limit]
    return min(near, key=lambda offer: (offer[0].rows.share, offer[0].backlog))


def _busy(replica: Replica, least_backlog: int) -> float:
    """The load of a worker, and for how many steps more than another it has prompts to compute, as far as that
    counts."""
    steps = (replica.backlog - least_backlog) / replica.limits.max_num_batched_tokens
    if not replica.long_prompts:
        steps = steps - PASSING_STEPS if steps > PASSING_STEPS else 0.0
    return replica.load + steps
