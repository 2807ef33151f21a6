"""Client: the same from ordinary threads."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tandem import Client, InvalidRequest, RequestCancelled, RequestTimeout, ServiceUnavailable
from tandem.protocol.messages import Cancel, Goodbye, Submit

from support.deadlines import DEADLINE_S
from support.scripted_scheduler import ANSWER, ScriptedScheduler, on_thread, scheduler_thread


@pytest.fixture
def scheduler() -> Iterator[ScriptedScheduler]:
    with scheduler_thread(ScriptedScheduler) as running:
        yield running


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tandem-client"]


def test_calls(scheduler: ScriptedScheduler) -> None:
    with Client(scheduler.address) as client:
        assert client.model.name == "scripted"
        assert client.address == scheduler.address
        assert client.generate("Hi").text == ANSWER
        assert [completion.text for completion in client.generate(["a", "b"])] == [ANSWER] * 2
        assert client.chat([{"role": "user", "content": "Hi"}]).text == ANSWER
        with client.stream("Hi") as stream:
            pieces = [chunk.text for chunk in stream]
            assert "".join(pieces) == stream.text == stream.result().text == ANSWER
        assert client.tokenizer() is client.tokenizer()
        with pytest.raises(InvalidRequest, match="top_p"):
            client.generate("Hi", top_p=7)
        with pytest.raises(InvalidRequest, match="beams"):
            next(client.stream("Hi", beams=7))
    assert not our_threads()


def test_several_threads(scheduler: ScriptedScheduler) -> None:
    with Client(scheduler.address) as client, ThreadPoolExecutor(8) as pool:
        whole = pool.map(lambda i: client.generate(f"prompt {i}").text, range(40))
        pieces = pool.map(lambda i: "".join(chunk.text for chunk in client.stream(f"prompt {i}")), range(40))
        assert {*whole, *pieces} == {ANSWER}


def test_leaving_a_loop_cancels(scheduler: ScriptedScheduler) -> None:
    scheduler.script = ScriptedScheduler.begin
    with Client(scheduler.address) as client:
        for _ in client.stream([1]):
            break
        cancels = on_thread(scheduler, lambda: scheduler.until(Cancel))
        assert [cancel.ticket for cancel in cancels] == [0]


def test_cancel_from_another_thread(scheduler: ScriptedScheduler) -> None:
    scheduler.script = ScriptedScheduler.begin
    with Client(scheduler.address) as client, ThreadPoolExecutor(1) as pool:
        stream = client.stream([1])
        next(stream)
        reading = pool.submit(stream.result)
        client.cancel(stream)
        with pytest.raises(RequestCancelled):
            reading.result(DEADLINE_S)


def test_timeout(scheduler: ScriptedScheduler) -> None:
    scheduler.script = ScriptedScheduler.begin
    with Client(scheduler.address) as client:
        with pytest.raises(RequestTimeout):
            client.generate([1], timeout=0.5)
        on_thread(scheduler, lambda: scheduler.until(Cancel))


def test_closing_ends_calls_of_other_threads(scheduler: ScriptedScheduler) -> None:
    scheduler.script = ScriptedScheduler.begin
    client = Client(scheduler.address)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, [1])
        on_thread(scheduler, lambda: scheduler.until(Submit))
        client.close()
        with pytest.raises(RequestCancelled):
            call.result(DEADLINE_S)
    client.close()
    assert not our_threads()
    with pytest.raises(ServiceUnavailable, match="closed"):
        client.generate([1])


def test_a_client_that_cannot_connect_leaves_no_thread() -> None:
    with pytest.raises(ServiceUnavailable):
        Client("tcp://127.0.0.1:9", insecure=True, connect_timeout=0.1)
    gc.collect()
    assert not our_threads()


def test_a_forgotten_client_goes_with_its_last_reference(scheduler: ScriptedScheduler) -> None:
    client = Client(scheduler.address)
    assert client.generate("Hi").text == ANSWER
    del client
    gc.collect()
    on_thread(scheduler, lambda: scheduler.until(Goodbye))
    assert not our_threads()


def test_a_program_that_forgets_to_close_ends(scheduler: ScriptedScheduler) -> None:
    code = f"""
from tandem import Client
client = Client({scheduler.address!r})
print(client.chat([{{"role": "user", "content": "Hi"}}]).text)
stream = client.stream("Hi")
next(stream)
"""
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (run.returncode, run.stderr) == (0, "")
    assert ANSWER in run.stdout
    on_thread(scheduler, lambda: scheduler.until(Goodbye))


def test_ctrl_c_before_a_call_is_under_way_leaves_nothing_behind(
    scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No coroutine that nobody awaits, of which Python would warn between the lines of a dialogue."""

    def interrupted() -> int:
        raise KeyboardInterrupt

    with Client(scheduler.address) as client, client.stream("Hi") as stream:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", interrupted)  # the first thing that a call asks for
                for call in (lambda: next(stream), stream.result, stream.cancel, lambda: client.generate("Hi")):
                    with pytest.raises(KeyboardInterrupt):
                        call()
            gc.collect()
        assert [str(warning.message) for warning in found] == []
        assert "".join(chunk.text for chunk in stream) == ANSWER


def test_within_a_running_loop(scheduler: ScriptedScheduler) -> None:
    """As in a notebook, whose cells run on a loop."""

    async def cell() -> None:
        with Client(scheduler.address) as client:
            assert client.generate("Hi").text == ANSWER
            assert "".join(chunk.text for chunk in client.stream("Hi")) == ANSWER

    asyncio.run(cell())


def test_a_stream_keeps_its_client_alive(scheduler: ScriptedScheduler) -> None:
    assert "".join(chunk.text for chunk in Client(scheduler.address).stream("Hi")) == ANSWER
    gc.collect()
    assert not our_threads()


def test_a_forked_child_is_told_to_make_its_own(scheduler: ScriptedScheduler) -> None:
    """In a program of its own: forking this one, with its threads, would prove little."""
    code = f"""
import os
from tandem import Client
client = Client({scheduler.address!r})
child = os.fork()
if child == 0:
    try:
        client.generate("Hi")
    except RuntimeError as error:
        print("child:", error, flush=True)
else:
    print("parent saw", os.waitpid(child, 0)[1], client.generate("Hi").text)
    client.close()
"""
    python = [sys.executable, "-P", "-W", "ignore::DeprecationWarning"]  # Python 3.12 warns of such a fork itself
    run = subprocess.run([*python, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (run.returncode, run.stderr) == (0, "")
    assert "child: this Client was made before the process forked" in run.stdout
    assert f"parent saw 0 {ANSWER}" in run.stdout
