"""`python -m tandem.worker.grammars.sandbox`: tries grammars, each in a process of its own that may take so much time
and memory and no more. Whatever a grammar does to the library that compiles it, nothing else is harmed.

Speaks frames over stdin and stdout: a length (4 bytes, little-endian) and as many bytes. The first frame is the
vocabulary (JSON: `vocab_size`, `eos_token_ids`), the second tokenizer.json; each one after them is an encoded
StructuredOutputsParams, which a frame answers: an error in UTF-8, empty if the grammar is fine.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from typing import BinaryIO, Final

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from ...protocol.codec import decode
from ...protocol.structured import StructuredOutputsParams
from .compiler import LONGEST_ERROR, GrammarError, compile_grammar, open_tokenizer, raise_error

CPU_S: Final = 1.0
"""Processor time for compiling a grammar and following it for TRIAL_TOKENS."""
TRIAL_TOKENS: Final = 24
TRIAL_CPU_S: Final = 0.5
"""The trial is over after this time, if it has shown nothing wrong until then."""
TOKEN_CPU_S: Final = 0.1
"""What a token may take: every other request of the batch waits for it."""
MEMORY_BYTES: Final = 512 << 20
"""On top of what the tokenizer takes."""


def read_frame(stream: BinaryIO) -> bytes | None:
    """None at the stream's end."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    length = int.from_bytes(header, "little")
    data = stream.read(length)
    return data if len(data) == length else None


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


def main() -> int:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    about, vocabulary = read_frame(stdin), read_frame(stdin)
    if about is None or vocabulary is None:
        return 0
    given = json.loads(about)
    tokenizer = open_tokenizer(vocabulary, given["vocab_size"], tuple(given["eos_token_ids"]))
    while (data := read_frame(stdin)) is not None:
        stdout.write(frame(_in_a_process(data, tokenizer).encode()))
        stdout.flush()
    return 0


def _in_a_process(data: bytes, tokenizer: LLTokenizer) -> str:
    """What is wrong with the grammar, or ""."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _try_and_leave(data, tokenizer, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = read_frame(pipe)
    _, status = os.waitpid(child, 0)
    if answer is not None:
        return answer.decode()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"the grammar takes over {CPU_S:g} s to compile; make it simpler"
    return f"the grammar takes over {MEMORY_BYTES >> 20} MiB, or is nested too deep, to compile; make it simpler"


def _try_and_leave(data: bytes, tokenizer: LLTokenizer, writer: int) -> None:
    """In the child. The kernel ends it at the limits, whatever runs then."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory()
        sys.stdin.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library that aborts says so
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        error = ""
        try:
            try_grammar(decode(data, StructuredOutputsParams), tokenizer)
        except GrammarError as problem:
            error = str(problem)
        except Exception as problem:  # noqa: BLE001 - of whatever kind, it is this grammar's
            error = f"{type(problem).__name__}: {problem}"[:LONGEST_ERROR]
        os.write(writer, frame(error.encode()))
        code = 0
    finally:
        os._exit(code)


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def try_grammar(wanted: StructuredOutputsParams, tokenizer: LLTokenizer) -> None:
    """Compiles a grammar and follows it for some tokens drawn at random. Raises GrammarError."""
    matcher = compile_grammar(wanted, tokenizer)
    rng = random.Random(0)
    begin = time.process_time()
    for index in range(TRIAL_TOKENS):
        start = time.process_time()
        allowed = _allowed(matcher)
        took = time.process_time() - start
        if not len(allowed):
            raise GrammarError("no token may come first: nothing satisfies it")
        if index and took > TOKEN_CPU_S:
            raise GrammarError(f"choosing a token takes {took:.2f} s, over the limit of {TOKEN_CPU_S:g} s")
        matcher.consume_token(int(allowed[rng.randrange(len(allowed))]))
        raise_error(matcher)
        if matcher.is_stopped() or time.process_time() - begin > TRIAL_CPU_S:
            return


def _allowed(matcher: LLMatcher) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    mask = matcher.compute_bitmask()
    raise_error(matcher)
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))


if __name__ == "__main__":
    sys.exit(main())
