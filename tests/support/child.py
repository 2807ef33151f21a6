"""A process for a supervisor to look after: `python -m support.child BEHAVIOUR… --status-fd N`. Behaviours run in
order; afterwards it waits for SIGTERM and exits with 0."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading

at_end: list[float] = []


def end(words: str, *_: object) -> None:
    """Takes its time, says something, and goes."""
    for seconds in at_end:
        threading.Event().wait(seconds)
    print(words, flush=True)
    sys.exit(0)


def beat(pids: str, status: int) -> None:
    """Says that it is alive, again and again, from a thread, so that it goes on while the main one does other things
    but not while the process is stopped."""

    def run() -> None:
        while True:
            behave(f"alive={pids}", status)
            threading.Event().wait(0.02)

    threading.Thread(target=run, daemon=True).start()


def behave(behaviour: str, status: int) -> None:
    name, _, value = behaviour.partition("=")
    if name == "ready":
        os.write(status, json.dumps({"event": "ready", "pid": os.getpid()}).encode() + b"\n")
    elif name == "progress":
        os.write(status, json.dumps({"event": "progress", "stage": "load", "done": float(value)}).encode() + b"\n")
    elif name == "nonsense":
        os.write(status, b'not json\n[1]\n{"event": "new kind"}\n{"event": "progress", "stage": "odd", "done": "x"}\n')
    elif name == "error":
        os.write(status, json.dumps({"event": "error", "message": value}).encode() + b"\n")
    elif name == "say":
        print(value, flush=True)
    elif name == "say_optimize":
        print(f"optimize {sys.flags.optimize}", flush=True)
    elif name == "say_lines":
        print("\n".join(f"line {number}" for number in range(int(value))), flush=True)
    elif name == "mutter":
        os.write(2, value.encode())  # a line that never ends
    elif name == "exit":
        os._exit(int(value))
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name in ("first_life", "later_life"):
        # The rest of the line holds in the process' first life only, or in the later ones; the file remembers.
        path, _, rest = value.partition(":")
        first = not os.path.exists(path)
        if name == "first_life":
            open(path, "w").close()
        if first == (name == "first_life"):
            behave(rest, status)
    elif name == "alive":
        pids = [os.getpid() if pid == "self" else int(pid) for pid in value.split(",") if pid]
        os.write(status, json.dumps({"event": "alive", "workers": pids}).encode() + b"\n")
    elif name == "beat":
        beat(value, status)
    elif name == "drained":
        os.write(status, b'{"event": "drained"}\n')
    elif name == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif name == "say_at_end":
        signal.signal(signal.SIGTERM, functools.partial(end, value))
    elif name == "slow_end":
        at_end.append(float(value))
    elif name == "grandchild":
        print(f"grandchild {subprocess.Popen(['sleep', '600']).pid}", flush=True)
    else:
        raise ValueError(f"unknown behaviour {behaviour!r}")


def main() -> None:
    arguments = sys.argv[1:]
    position = arguments.index("--status-fd")
    status = int(arguments[position + 1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for behaviour in arguments[:position]:
        behave(behaviour, status)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
