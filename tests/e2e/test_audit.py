"""Nothing that comes from a socket or a model is unpickled or run: real processes under an audit hook."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from tandem.launch.builtin import MODEL_DIR
from tandem.protocol.messages import Goodbye

from support.deadlines import DEADLINE_S
from support.peers import EVERYTHING, ScriptedClient

TESTS = Path(__file__).resolve().parents[1]


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


@contextmanager
def audited(folder: Path, name: str, module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose misdeeds are in folder/NAME.audit; it has said that it is ready."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "support.audited", str(folder / f"{name}.audit"), str(folder / "strict")]
            + [module, *arguments, "--status-fd", str(writer)],
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
    os.close(writer)
    try:
        with open(reader) as statuses:
            for line in statuses:
                if json.loads(line)["event"] == "ready":
                    break
            else:
                pytest.fail((folder / f"{name}.log").read_text())
            yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.thorough
def test_nothing_is_unpickled_or_run(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/run"
    scheduler = json.dumps({"address": address})
    worker = json.dumps({"scheduler": address, "model": str(MODEL_DIR), "device": "cpu", "threads": 1})
    with (
        audited(tmp_path, "scheduler", "tandem.scheduler.main", "--config-json", scheduler),
        audited(tmp_path, "worker", "tandem.worker.main", "--config-json", worker),
    ):
        asyncio.run(attack(address, tmp_path / "harm"))  # what is made on first use is made now
        client = subprocess.run(
            [sys.executable, "-P", "-m", "support.audited", str(tmp_path / "client.audit"), str(tmp_path / "strict")]
            + ["support.audited_client", address, str(tmp_path / "strict")],
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert client.returncode == 0, client.stderr
        asyncio.run(attack(address, tmp_path / "harm"))
    assert not (tmp_path / "harm").exists()
    for name in ("scheduler", "worker", "client"):
        assert not (misdeeds := (tmp_path / f"{name}.audit").read_text()), f"{name}: {misdeeds[:5_000]}"


def refusals(peer: ScriptedClient) -> int:
    """How many messages were found to be none."""
    return sum(isinstance(one, Goodbye) and "not a message" in one.reason for one in peer.got)


async def attack(address: str, harm: Path) -> None:
    """Pickles, and each kind of message without its fields."""
    pickles = [pickle.dumps(Evil(harm), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    kinds = [msgpack.packb([cls.__name__, {}]) for cls in EVERYTHING]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for port in ("clients", "workers"):
        peer = ScriptedClient(context, f"{address}/{port}")
        for data in (*kinds, *pickles):
            await peer.send(data)
        await peer.wait(lambda peer=peer: refusals(peer) == len(pickles))  # type: ignore[misc]
        peer.close()
    context.term()


def test_the_hook_hears_what_it_is_there_for(tmp_path: Path) -> None:
    module = tmp_path / "evil.py"
    module.write_text(
        "import os, pickle, collections\n"
        "pickle.loads(pickle.dumps(collections.OrderedDict()))\n"
        "os.system('true')\n"
        "open(os.environ['STRICT'], 'w').close()\n"
        "eval('1 + 1')\n"
    )
    log, strict = tmp_path / "audit", tmp_path / "strict"
    subprocess.run(
        [sys.executable, "-P", "-m", "support.audited", str(log), str(strict), "evil"],
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{tmp_path}", "STRICT": str(strict)},
        check=True,
        timeout=DEADLINE_S,
    )
    heard = [line.split()[0] for line in log.read_text().splitlines() if line and not line.startswith(" ")]
    assert {"pickle.find_class", "os.system", "exec", "compile"} <= set(heard)
