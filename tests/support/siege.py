"""A service under attack: a real scheduler process over TCP with keys, an honest simulated worker, eight honest
streams.

`endure(attack)` runs an attack beside the streams, and asserts what must hold however it was attacked: the streams are
what they are undisturbed, the service is well, and nothing of the attack is left in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import zmq

from tandem.launch.keys import ROLES, KeyDirectory
from tandem.protocol.codec import encode
from tandem.protocol.keys import PeerFile, PeerKeys, read_key_file
from tandem.protocol.messages import AskStats, Goodbye, Ping, Stats, WorkerWelcome
from tandem.protocol.transport import Address, Port

from support.deadlines import DEADLINE_S
from support.peers import VOCAB, Peer, ScriptedClient, ScriptedWorker, free_ports
from support.simulated_worker import continuation

STREAMS = 8
PROMPT_TOKENS, OUTPUT_TOKENS = 4, 24
CLIENT_LEASE_S = 20.0
"""The honest client renews it from the loop on which the attacks run, which may keep that busy for seconds."""
SPARE_FILES = 4
"""File descriptors of connections that the system may not have taken away yet."""
MEMORY_GROWTH_BYTES = 96 * 1024 * 1024
"""That all attacks together may cost the scheduler: allocators keep some of what was freed."""

Attack = Callable[["Siege"], Awaitable[None]]


class Siege:
    """Used in a with block; each of its coroutines is run by `run`, on a loop that stands still in between."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="siege-"))
        directory = KeyDirectory(self.folder / "keys", make=True)
        directory.create_server()
        for port in ROLES.values():
            for name in ("default", "attacker", "revoked"):
                directory.create(port, name)
        self.keys = {
            (port, name): self._read(port, name)
            for port in ROLES.values()
            for name in ("default", "attacker", "revoked")
        }
        for port in ROLES.values():
            directory.revoke(port, "revoked")
        clients, workers = free_ports(2)
        self.address, self.worker_address = f"tcp://127.0.0.1:{clients}", f"tcp://127.0.0.1:{workers}"
        self.ports: dict[Port, int] = {"clients": clients, "workers": workers}
        self.instances = iter(range(100, 1_000_000))
        self.peers: list[Peer] = []

    def _read(self, port: Port, name: str) -> PeerKeys:
        file = read_key_file(self.folder / "keys" / port / f"{name}.key", PeerFile)
        return PeerKeys(file.public, file.secret, file.server)

    def __enter__(self) -> Siege:
        self.process = self._start()
        self.scheduler = psutil.Process(self.process.pid)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.loop = asyncio.new_event_loop()
        self.failures: list[Any] = []
        self.loop.set_exception_handler(lambda _, details: self.failures.append(details))
        self.run(self._settle())
        self.files = self.scheduler.num_fds()
        self.memory = self.scheduler.memory_info().rss
        return self

    def _start(self) -> subprocess.Popen[bytes]:
        config = {
            "address": self.address,
            "worker_address": self.worker_address,
            "keys": str(self.folder / "keys"),
            "client_lease": CLIENT_LEASE_S,
            "worker_lease": 3_600.0,
            "max_waiting_requests": 200,
            "max_requests_per_client": 50,
        }
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with open(self.folder / "log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tandem.scheduler.main", "--config-json", json.dumps(config)]
                + ["--status-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
            )
        os.close(writer)
        with open(reader) as statuses:
            said = statuses.readline()
        assert '"ready"' in said, said + self.log
        return process

    async def _settle(self) -> None:
        """The honest worker registers, and everything that is made on first use is."""
        self.worker = ScriptedWorker(
            self.context, self.worker_address, instance=1, keys=self.keys["workers", "default"]
        )
        await self.worker.hello()
        await self.worker.expect(WorkerWelcome)
        await self.endure(_nothing)

    def __exit__(self, *_: object) -> None:
        self.worker.close()
        self.context.term()
        self.loop.close()
        self.process.terminate()
        code = self.process.wait(DEADLINE_S)
        shutil.rmtree(self.folder)
        assert code == 0
        assert self.failures == []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def run(self, work: Awaitable[None]) -> None:
        async def main() -> None:
            async with asyncio.timeout(2 * DEADLINE_S):
                await work

        self.loop.run_until_complete(main())

    # --- those who attack --------------------------------------------------------------------------------------------

    def client(self, keys: PeerKeys | None = None, *, port: Port = "clients") -> ScriptedClient:
        """A client with a key that is admitted, unless `keys` says otherwise."""
        made = ScriptedClient(self.context, f"tcp://127.0.0.1:{self.ports[port]}", keys or self.keys[port, "attacker"])
        self.peers.append(made)
        return made

    def liar(self, **changes: Any) -> ScriptedWorker:
        """A worker with a key that is admitted; it computes nothing unless told to."""
        made = ScriptedWorker(
            self.context,
            self.worker_address,
            instance=next(self.instances),
            manual=True,
            keys=self.keys["workers", "attacker"],
            **changes,
        )
        self.peers.append(made)
        return made

    # --- and those who must not notice -------------------------------------------------------------------------------

    async def endure(self, attack: Attack) -> None:
        """See the module."""
        honest = ScriptedClient(self.context, self.address, self.keys["clients", "default"])
        logged = len(self.log)
        renewal = asyncio.ensure_future(_renew_lease(honest))
        try:
            await honest.hello()
            await honest.wait(lambda: honest.got and honest.got[-1].model)
            prompts = [[(3 * i + j) % VOCAB for j in range(PROMPT_TOKENS)] for i in range(STREAMS)]
            for ticket, prompt in enumerate(prompts):
                await honest.submit(ticket, prompt, max_tokens=OUTPUT_TOKENS)
            await attack(self)
            for ticket, prompt in enumerate(prompts):
                end = await honest.wait(lambda ticket=ticket: honest.ended(ticket))  # type: ignore[misc]
                assert end.reason == "length", f"{end}\n{self.log[-2_000:]}"
                expected = continuation(prompt, PROMPT_TOKENS + OUTPUT_TOKENS, frozenset(), VOCAB)[0]
                assert honest.tokens(ticket) == expected
            self._dismiss()
            await self._is_well(honest)
        finally:
            self._dismiss()
            renewal.cancel()
            await honest.send(Goodbye(reason="done"))
            honest.socket.close()
            if honest.monitor is not None:
                honest.monitor.close(0)
        assert "Traceback" not in self.log[logged:], self.log[logged:]

    def _dismiss(self) -> None:
        """The attackers go; workers say so, since their lease is long."""
        for peer in self.peers:
            if isinstance(peer, ScriptedWorker):
                peer.socket.send([encode(Goodbye(reason="the attack is over"))])
                peer.socket.close()
            peer.close()
        self.peers.clear()

    async def _is_well(self, honest: ScriptedClient) -> None:
        """No request is left, all workers are there that should be, and no connection stays open."""
        asked = 0
        async with asyncio.timeout(DEADLINE_S):
            while True:
                asked += 1
                await honest.send(AskStats())
                stats = await honest.expect(Stats, asked)
                files = self.scheduler.num_fds() - getattr(self, "files", self.scheduler.num_fds())
                if stats.running == stats.waiting == 0 and len(stats.workers) == 1 and files <= SPARE_FILES:
                    return
                await asyncio.sleep(0.02)

    def assert_no_growth(self) -> None:
        grown = self.scheduler.memory_info().rss - self.memory
        assert grown < MEMORY_GROWTH_BYTES, f"{grown} bytes more than before the attacks"


async def _renew_lease(client: ScriptedClient) -> None:
    while True:
        await asyncio.sleep(CLIENT_LEASE_S / 4)
        await client.send(Ping())


async def _nothing(_: Siege) -> None:
    """The baseline."""


def endpoint(siege: Siege, port: Port) -> str:
    return Address(siege.address if port == "clients" else siege.worker_address).endpoint(port)
