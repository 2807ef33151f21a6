"""A worker that is asked to end while its main thread sleeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.deadlines import DEADLINE_S

SCRIPT = """
import os, queue, signal, sys, threading
from tandem.worker.stopping import StopSignals

def sleeps():
    with open(f"/proc/self/task/{os.getpid()}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "S"

def receive():
    seen = 0
    while seen < 1000:  # asleep all the time, and not only while this thread holds the interpreter
        seen = seen + 1 if sleeps() else 0
    signal.pthread_kill(threading.get_ident(), int(sys.argv[1]))

inbox = queue.SimpleQueue()
StopSignals(lambda: sys.exit("too early")).tell(inbox)
threading.Thread(target=receive).start()
print(type(inbox.get()).__name__, flush=True)
"""


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_that_comes_to_another_thread_is_heard(number: int) -> None:
    # Of several signals at once the kernel gives some to other threads, and the main thread sleeps on. The process
    # would end by its last resort, with exit code 0 but without a word.
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(number)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("Stop\n", "", 0)
