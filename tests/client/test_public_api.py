"""What `tandem` offers, and what naming it costs."""

import copy
import subprocess
import sys

import pytest

import tandem
import tandem.client
from tandem.launch.supervisor import ChildDied
from tandem.protocol.errors import OffsetError

from support.deadlines import DEADLINE_S

LIGHT = """
import sys
import tandem
from tandem import Client, AsyncClient, InvalidRequest
heavy = {"torch", "transformers", "numpy", "zmq", "pydantic", "tokenizers", "jinja2"} & set(sys.modules)
print(*sorted(heavy))
"""
OFFLINE = """
import sys
from tandem import Client, AsyncClient, SamplingParams, LLM
heavy = {"torch", "transformers", "huggingface_hub", "fastapi", "numpy", "zmq", "msgpack", "tokenizers", "jinja2"}
print(*sorted(heavy & set(sys.modules)))
"""
COMPLETE = """
import sys
from tandem import *
import tandem.client.connection, tandem.client.tokenizer, tandem.client.prompts
print(*sorted({"torch", "transformers", "huggingface_hub", "fastapi"} & set(sys.modules)))
"""


@pytest.mark.parametrize("module", [tandem, tandem.client])
def test_every_name_is_there(module: object) -> None:
    names = module.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(module, name).__name__ == name
    assert set(names) <= set(dir(module))


def test_the_api_is_this() -> None:
    assert set(tandem.__all__) == set(
        """
        LLM RequestOutput CompletionOutput Logprob
        Client AsyncClient SamplingParams StructuredOutputsParams ChatOptions TokensPrompt CompletionStream
            SyncCompletionStream Completion
        Choice Chunk Usage Timings TokenLogprob PositionLogprobs TandemError ConfigurationError ServiceUnavailable
        VersionMismatch AuthenticationError ProtocolError OffsetError RequestError InvalidRequest Overloaded
        RequestFailed RequestTimeout RequestCancelled ModelChanged
        """.split()
    )


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tandem.nonsense
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tandem.client.nonsense


@pytest.mark.parametrize("code", [LIGHT, OFFLINE, COMPLETE], ids=["names only", "offline too", "everything"])
def test_what_imports_bring_along(code: str) -> None:
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize(
    "error",
    [
        tandem.InvalidRequest("n: 9", field="n", limit=8, value=9),
        tandem.Overloaded("full", retry_after=2.0),
        tandem.RequestTimeout("late", completion=None),
        OffsetError(3, 4),
        ChildDied("worker", "ended with code 2", ["last", "words"], ""),
        tandem.ServiceUnavailable("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_made_anew_from_what_they_hold(error: tandem.TandemError) -> None:
    """As multiprocessing does with what a process raises; `copy` goes by the same `__reduce_ex__`."""
    same = copy.copy(error)
    assert (type(same), str(same), vars(same)) == (type(error), str(error), vars(error))


def test_the_package_runs_as_the_command_line() -> None:
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "tandem", "--help"], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert ran.stdout.lstrip().startswith("Usage: tandem [OPTIONS]")
