"""What a stream that stands still is waiting for, as seen from both ends, while it waits."""

from __future__ import annotations

import asyncio

from chaos.load import Load, Turn
from chaos.service import ChaosService

from tandem import AsyncClient, TandemError

STILL_S = 45.0
"""A stream without a token for so long is reported."""


async def watch(service: ChaosService, load: Load, faults: list[str]) -> None:
    """Until cancelled: adds a report to `load.reports` for each request that stands still. `faults`: what was done so
    far."""
    while True:
        await asyncio.sleep(1.0)
        now = asyncio.get_running_loop().time()
        still = [one for one in load.turns.values() if now - one.moved_at > STILL_S and not one.is_reported]
        if still:
            seen = await scheduler_side(service)
            for turn in still:
                turn.is_reported = True
                load.reports.append("\n".join([client_side(turn, now), *seen, f"last faults: {faults[-8:]}"]))


def client_side(turn: Turn, now: float) -> str:
    """The request, the connection that it is on, and where the two of them stand."""
    connection = turn.client._connection
    pauses = [(position, round(now - at, 1)) for position, at in turn.pauses]
    epoch = None if connection._welcome is None else connection._welcome.epoch
    lines = [
        f"request {turn.which} of stream {turn.stream}: {turn.position} tokens, nothing for "
        f"{now - turn.moved_at:.1f} s, begun {now - turn.begun_at:.1f} s ago",
        f"  after pauses of over a second, tokens came at (position, seconds ago) {pauses}",
        f"  its connection: session {connection._session}, welcomed by {epoch}, ready {connection._ready.is_set()}, "
        f"lost {connection._lost}, failure {connection._failure!r}",
        f"  heard {now - connection._heard_at:.1f} s ago, sent {now - connection._sent_at:.1f} s ago; "
        f"{len(connection._requests)} requests sent, {len(connection._resumptions)} wait to be sent again",
    ]
    known = len(lines)
    for where, streams in (
        ("sent", connection._requests._streams.values()),
        ("to be sent again", connection._resumptions._due),
    ):
        lines += [
            f"  {where}: ticket {one.ticket}, known to epoch {one.history.epoch} as {one.history.number}, "
            f"{len(one.history.generated)} tokens, {one.history.suspicions} suspicions, resumed {one.resumed}, "
            f"{one.repairs} repairs"
            for one in streams
            if tuple(one.history.prompt.tolist()) == turn.prompt
        ]
    if len(lines) == known:
        lines.append("  the connection does not have it")
    return "\n".join(lines)


async def scheduler_side(service: ChaosService) -> list[str]:
    """What the scheduler and the operating system say of everybody."""
    lines = [
        f"  {kept.name}: pid {kept.process.pid}, started {kept.started} times, {kept.status()}"
        for kept in (service.scheduler, *service.workers)
    ]
    try:
        async with AsyncClient(service.direct, connect_timeout=5, **service.access) as client:
            found = await client.stats(timeout=5)
    except TandemError as error:
        return [*lines, f"  the scheduler does not answer: {error}"]
    lines.append(
        f"  scheduler: epoch {found.epoch}, up {found.uptime_s:.1f} s, {found.running} run, {found.waiting} wait, "
        f"{found.suspects} of them to run alone, {found.moved} moved, {found.lost_workers} workers lost, "
        f"{found.preemptions} preemptions, {found.clients} clients"
    )
    lines += [
        f"  {one.name}, registration {one.registration}: {one.state}, {one.running} run ({one.suspects} suspects), "
        f"{one.in_flight} steps in flight of {one.steps} done, silent for {one.silent_s:.1f} s, "
        f"lease {one.lease_s:.1f} s"
        for one in found.workers
    ]
    return lines
