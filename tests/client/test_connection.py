"""The client against a scheduler that goes wrong in every way that the protocol allows, and some that it does not."""

import asyncio
import dataclasses
import gc
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem import (
    AsyncClient,
    ConfigurationError,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    RequestCancelled,
    RequestFailed,
    RequestTimeout,
    SamplingParams,
    ServiceUnavailable,
    VersionMismatch,
)
from tandem.client.stream import MAX_UNREAD_TOKENS
from tandem.protocol.messages import (
    PROTOCOL_VERSION,
    AskStats,
    Cancel,
    ClientHello,
    Ended,
    FetchFile,
    Goodbye,
    Ping,
    Refused,
    Stats,
    Submit,
    Tokens,
    UnknownPeer,
    VersionRefused,
    Welcome,
)

from support.deadlines import DEADLINE_S
from support.scripted_scheduler import ANSWER, EOS, FILES, MODEL, TOKENIZER, ScriptedScheduler

Script = Callable[[ScriptedScheduler, Submit], None]
CLOSED_PORT = "tcp://127.0.0.1:9"


def play(
    scenario: Callable[[ScriptedScheduler, AsyncClient], Coroutine[Any, Any, None]],
    script: Script | None = None,
    client_options: dict[str, Any] | None = None,
    **scheduler_options: Any,
) -> None:
    """Runs a scenario with a connected client."""

    async def main() -> None:
        async with ScriptedScheduler(script, **scheduler_options) as scheduler:
            options = {"connect_timeout": DEADLINE_S, **(client_options or {})}
            async with AsyncClient(scheduler.address, **options) as client:
                await scenario(scheduler, client)

    asyncio.run(main())


# --- greeting --------------------------------------------------------------------------------------------------------


def test_connects_once_there_is_a_model() -> None:
    async def main() -> None:
        async with ScriptedScheduler(model=None) as scheduler:
            client = AsyncClient(scheduler.address, name="patient")
            connecting = asyncio.create_task(client.connect())
            assert (await scheduler.until(ClientHello))[0].name == "patient"
            with pytest.raises(ServiceUnavailable):
                _ = client.model
            scheduler.model = MODEL
            scheduler.welcome()
            await connecting
            assert client.model.name == "scripted"
            assert client.model.max_model_len == 4096
            assert len(scheduler.of(ClientHello)) == 1  # a second one would start anew
            await client.close()
            await scheduler.until(Goodbye)

    asyncio.run(main())


def test_without_a_worker_the_error_says_so() -> None:
    async def main() -> None:
        async with ScriptedScheduler(model=None) as scheduler:
            with pytest.raises(ServiceUnavailable, match="no worker with a loaded model"):
                await AsyncClient(scheduler.address, connect_timeout=1.0).connect()

    asyncio.run(main())


def test_nobody_there() -> None:
    client = AsyncClient(CLOSED_PORT, insecure=True, connect_timeout=0.2)
    with pytest.raises(ServiceUnavailable, match=r"tcp://127\.0\.0\.1:9 within 0\.2 s"):
        asyncio.run(client.connect())


def test_a_listener_that_is_no_scheduler() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = AsyncClient(f"tcp://127.0.0.1:{server.getsockname()[1]}", insecure=True, connect_timeout=0.3)
            with pytest.raises(ServiceUnavailable):
                await client.connect()

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer", [VersionRefused(version=99), Welcome(version=99, epoch=1, lease_s=1.0)], ids=["refused", "welcomed"]
)
def test_another_version_is_named(answer: object) -> None:
    async def main() -> None:
        async with ScriptedScheduler(greeting=lambda scheduler: scheduler.say(answer)) as scheduler:
            with pytest.raises(VersionMismatch, match=f"at ipc://.*version 99, this end speaks {PROTOCOL_VERSION}"):
                await AsyncClient(scheduler.address, connect_timeout=DEADLINE_S).connect()

    asyncio.run(main())


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02\x03"])
def test_garbage_instead_of_a_greeting(data: bytes) -> None:
    async def main() -> None:
        async with ScriptedScheduler(greeting=lambda scheduler: scheduler.say(data)) as scheduler:
            with pytest.raises(ProtocolError, match="broke the protocol"):
                await AsyncClient(scheduler.address, connect_timeout=DEADLINE_S).connect()

    asyncio.run(main())


def test_tcp_must_be_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="insecure"):
        AsyncClient("tcp://127.0.0.1:1")


def test_an_open_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        asyncio.run(AsyncClient(f"ipc://{tmp_path}").connect())


def test_use_before_and_after() -> None:
    async def main() -> None:
        async with ScriptedScheduler() as scheduler:
            client = AsyncClient(scheduler.address)
            with pytest.raises(ServiceUnavailable, match="not connected"):
                await client.generate("x")
            await client.connect()
            with pytest.raises(RuntimeError, match="connected before"):
                await client.connect()
            await client.close()
            await client.close()
            with pytest.raises(ServiceUnavailable, match="closed"):
                await client.generate("x")

    asyncio.run(main())


def test_a_client_that_is_forgotten_holds_nobody_up() -> None:
    """It was not closed and its loop is gone: whoever collects the garbage must not wait for its sockets."""

    def leave_one_behind(address: str, told: Callable[[], object]) -> None:
        async def use() -> None:
            client = AsyncClient(address)
            await client.connect()
            await client.generate([1])

        asyncio.run(use())
        gc.collect()
        told()

    async def main() -> None:
        loop, collected = asyncio.get_running_loop(), asyncio.Event()
        async with ScriptedScheduler() as scheduler:
            told = partial(loop.call_soon_threadsafe, collected.set)
            thread = threading.Thread(target=leave_one_behind, args=(scheduler.address, told), daemon=True)
            thread.start()
            async with asyncio.timeout(DEADLINE_S):
                await collected.wait()

    gc.collect()
    with pytest.warns(ResourceWarning, match="Unclosed context"):
        asyncio.run(main())


def test_another_loop_is_refused() -> None:
    async def main() -> None:
        async with ScriptedScheduler() as scheduler, AsyncClient(scheduler.address) as client:

            def elsewhere() -> None:
                with pytest.raises(RuntimeError, match="another event loop"):
                    asyncio.run(client.generate([1]))

            await asyncio.to_thread(elsewhere)

    asyncio.run(main())


def test_the_lease_is_renewed() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        loop = asyncio.get_running_loop()
        begin, count = loop.time(), len(scheduler.of(Ping))
        await scheduler.until(Ping, count + 6)
        assert loop.time() - begin > 5 * scheduler.lease_s / 20  # often enough, and not all the time

    play(scenario, lease_s=0.3)


# --- a stream that is not what it should be --------------------------------------------------------------------------


def test_what_is_stale_or_foreign_is_dropped() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.tokens(submit.ticket, [9], 0, epoch=scheduler.epoch - 1)
        scheduler.tokens(submit.ticket + 1_000, [9], 0, [Ended(ticket=submit.ticket + 1_000, reason="stop")])
        scheduler.begin(submit)
        scheduler.tokens(submit.ticket, [], 0, [scheduler.end(submit, 3, "length")])
        scheduler.tokens(submit.ticket, [9], 3)  # after the end

    async def scenario(_scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        for _ in range(2):
            assert (await client.generate([1])).token_ids == [5, 6, 7]

    play(scenario, script)


BROKEN_TOKENS = {
    "columns of two lengths": {"count": np.array([1, 1], np.int32)},
    "more counted than there": {"count": np.array([2], np.int32)},
    "a count of zero": {"count": np.array([0], np.int32), "token": np.array([], np.int32)},
    "a negative count": {"count": np.array([-1], np.int32)},
    "a negative token": {"token": np.array([-5], np.int32)},
}


@pytest.mark.parametrize("change", BROKEN_TOKENS.values(), ids=BROKEN_TOKENS)
def test_columns_that_do_not_fit_are_asked_for_again(change: dict[str, Any]) -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if submit.ticket:
            scheduler.answer(submit)
            return
        whole: dict[str, Any] = {
            "ticket": np.array([submit.ticket], np.int64),
            "offset": np.array([0], np.int32),
            "count": np.array([1], np.int32),
            "token": np.array([5], np.int32),
        }
        scheduler.say(Tokens(epoch=scheduler.epoch, **(whole | change)))

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        assert (await client.generate([1])).text == ANSWER
        assert len(scheduler.of(ClientHello)) == 2  # it greeted anew

    play(scenario, script)


@pytest.mark.parametrize(("reason", "error"), [("abort", RequestCancelled), ("error", RequestFailed)])
def test_bad_ends(reason: str, error: type[Exception]) -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.begin(submit)
        ended = dataclasses.replace(scheduler.end(submit, 3, reason), error="the reason why")
        scheduler.tokens(submit.ticket, [], 0, [ended])

    async def scenario(_scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1])
        chunk = await anext(stream)  # tokens that were delivered stand
        assert chunk.token_ids == [5, 6, 7]
        for _ in range(2):
            with pytest.raises(error, match="the reason why"):
                await anext(stream)

    play(scenario, script)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_refusal_names_field_limit_and_value() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.say(
            Refused(
                epoch=scheduler.epoch,
                ticket=submit.ticket,
                code="invalid",
                message="the prompt has 9 tokens",
                field="prompt",
                limit="8",
                value="9 tokens",
            )
        )

    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(InvalidRequest, match="the prompt has 9 tokens") as info:
            await client.generate([1])
        assert (info.value.field, info.value.limit, info.value.value) == ("prompt", 8, "9 tokens")

    play(scenario, script)


def _overloaded_twice(refusals: list[int], scheduler: ScriptedScheduler, submit: Submit) -> None:
    if len(refusals) < 2:
        refusals.append(submit.ticket)
        scheduler.say(
            Refused(
                epoch=scheduler.epoch,
                ticket=submit.ticket,
                code="overloaded",
                message="too many requests wait",
                retry_after_s=0.01,
            )
        )
    else:
        scheduler.answer(submit)


def test_overload_is_raised_for_one_and_waited_out_for_a_list() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        with pytest.raises(Overloaded, match="too many") as info:
            await client.generate([1])
        assert info.value.retry_after == 0.01
        assert [c.text for c in await client.generate([[1], [2], [3]])] == [ANSWER] * 3

    play(scenario, partial(_overloaded_twice, []))


# --- a scheduler that goes away --------------------------------------------------------------------------------------


def test_a_scheduler_that_restarts_before_it_has_a_model() -> None:
    async def main() -> None:
        async with ScriptedScheduler(model=None, lease_s=0.3) as scheduler:
            client = AsyncClient(scheduler.address, connect_timeout=DEADLINE_S)
            connecting = asyncio.create_task(client.connect())
            await scheduler.until(Ping)
            scheduler.epoch += 1
            scheduler.model = MODEL
            scheduler.say(UnknownPeer(epoch=scheduler.epoch))
            await connecting
            assert (await client.generate([1])).text == ANSWER
            await client.close()

    asyncio.run(main())


def test_a_scheduler_that_is_gone_fails_open_requests_after_a_while() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1])
        await anext(stream)
        scheduler.socket.close()
        with pytest.raises(ServiceUnavailable, match=r"could not be reached; there was no service for 0\.1 s"):
            await stream.result()
        waiting = asyncio.create_task(client.generate([1]))
        scheduler.script = ScriptedScheduler.answer
        scheduler.listen()
        assert (await waiting).text == ANSWER

    play(scenario, ScriptedScheduler.begin, {"reconnect_timeout": 0.1}, lease_s=0.3)


# --- letting go ------------------------------------------------------------------------------------------------------


async def _break(client: AsyncClient) -> None:
    async for _ in client.stream([1]):
        break


async def _aclose(client: AsyncClient) -> None:
    stream = client.stream([1])
    await anext(stream)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    with pytest.raises(RequestCancelled):
        await stream.result()


async def _leave_the_context(client: AsyncClient) -> None:
    async with client.stream([1]) as stream:
        await anext(stream)


async def _cancel_the_request(client: AsyncClient) -> None:
    stream = client.stream([1])
    await anext(stream)
    client.cancel(stream)
    with pytest.raises(RequestCancelled):
        await anext(stream)


async def _cancel_the_reader(client: AsyncClient) -> None:
    stream = client.stream([1])
    await anext(stream)
    reader = asyncio.create_task(stream.result())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def _cancel_generate(client: AsyncClient) -> None:
    await _cancel_when_sent(client, client.generate([1]))


async def _cancel_generate_of_a_list(client: AsyncClient) -> None:
    await _cancel_when_sent(client, client.generate([[1]]))


async def _cancel_when_sent(client: AsyncClient, call: Coroutine[Any, Any, object]) -> None:
    task = asyncio.create_task(call)
    while not client._connection.open_requests:  # noqa: ASYNC110 - no event of the client's tells
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _time_out(client: AsyncClient) -> None:
    with pytest.raises(RequestTimeout, match=r"timeout of 0\.5 s"):
        await client.generate([1], timeout=0.5)


async def _time_out_streaming(client: AsyncClient) -> None:
    with pytest.raises(RequestTimeout):
        async for _ in client.stream([1], timeout=0.5):
            pass


@pytest.mark.parametrize(
    "let_go",
    [
        _break,
        _aclose,
        _leave_the_context,
        _cancel_the_request,
        _cancel_the_reader,
        _cancel_generate,
        _cancel_generate_of_a_list,
        _time_out,
        _time_out_streaming,
    ],
)
def test_letting_go_cancels(let_go: Callable[[AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        await client.tokenizer()
        await let_go(client)
        assert [cancel.ticket for cancel in await scheduler.until(Cancel)] == [0]
        scheduler.script = ScriptedScheduler.answer
        assert (await client.generate([1])).text == ANSWER
        assert len(scheduler.of(Cancel)) == 1
        assert not client._connection.open_requests

    play(scenario, ScriptedScheduler.begin)


def test_closing_the_client_ends_its_requests() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        task = asyncio.create_task(client.generate([1]))
        await scheduler.until(Submit)
        await client.close()
        with pytest.raises(RequestCancelled, match="closed"):
            await task

    play(scenario, ScriptedScheduler.begin)


def test_cancel_before_the_start() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1])
        stream.cancel()
        with pytest.raises(RequestCancelled):
            await stream.result()
        assert not scheduler.of(Submit)

    play(scenario)


def test_a_finished_request_is_not_cancelled() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        async with client.stream([1]) as stream:
            await stream.result()
            client.cancel(stream)
        assert (await stream.result()).text == ANSWER
        await client.close()
        await scheduler.until(Goodbye)
        assert not scheduler.of(Cancel)

    play(scenario)


def test_a_reader_that_does_not_read_loses_only_its_own_stream() -> None:
    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        if submit.ticket == 1:
            scheduler.answer(submit)
            return
        scheduler.accept(submit)
        for offset in range(0, MAX_UNREAD_TOKENS + 10_000, 10_000):
            scheduler.tokens(submit.ticket, [5] * 10_000, offset)

    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        async with client.stream([1]) as slow:
            await scheduler.until(Cancel)
            assert (await client.generate([1])).text == ANSWER
            with pytest.raises(RequestFailed, match=str(MAX_UNREAD_TOKENS)):
                await slow.result()

    play(scenario, script)


def test_two_readers_of_one_stream_are_refused() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        stream = client.stream([1])
        await anext(stream)
        reader = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await anext(stream)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)

    play(scenario, ScriptedScheduler.begin)


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_come_in_pieces_and_once() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        tokenizers = await asyncio.gather(*(client.tokenizer() for _ in range(3)))
        assert len({id(tokenizer) for tokenizer in tokenizers}) == 1
        tokenizer = tokenizers[0]
        assert tokenizer is not None
        assert tokenizer.encode(ANSWER) == TOKENIZER.encode(ANSWER)
        fetched = [(fetch.name, fetch.offset) for fetch in scheduler.of(FetchFile)]
        assert len(fetched) == len(set(fetched)) > len(FILES)

    play(scenario)


def test_a_file_with_another_hash_is_refused() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        scheduler.files = {name: bytes(len(data)) for name, data in FILES.items()}
        with pytest.raises(ConfigurationError, match=r"tokenizer\.json arrived with SHA-256"):
            await client.generate("text")
        scheduler.files = FILES
        assert (await client.generate("text")).text == ANSWER  # the next one tries again

    play(scenario)


@pytest.mark.parametrize("content", [b"", b"x" * 2_000_000])
def test_a_file_that_is_shorter_or_longer_than_announced(content: bytes) -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        scheduler.files = dict.fromkeys(FILES, content)
        with pytest.raises(ProtocolError, match=r"tokenizer\.json"):
            await client.generate("text")

    play(scenario, chunk_bytes=2_000_000)


def test_a_model_without_a_tokenizer_takes_token_ids() -> None:
    async def scenario(_: ScriptedScheduler, client: AsyncClient) -> None:
        assert await client.tokenizer() is None
        completion = await client.generate([1, 2])
        assert completion.text == ""
        assert completion.token_ids[-1] == EOS
        with pytest.raises(ConfigurationError, match="token ids"):
            await client.generate("text")

    play(scenario, files={})


def test_the_default_address_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_ADDRESS", "ipc:///some/where")
    assert AsyncClient().address == "ipc:///some/where"


def test_parameters_travel_with_a_seed() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        await client.generate([1], SamplingParams(temperature=0.7), max_tokens=3)
        await client.generate([1], seed=11)
        first, second = (submit.sampling for submit in scheduler.of(Submit))
        assert (first.temperature, first.max_tokens, first.top_k) == (0.7, 3, 0)
        assert first.seed is not None
        assert (second.seed, second.temperature, second.top_k) == (11, 0.5, 7)  # the model's own defaults

    play(scenario)


def test_stats_go_to_who_asked_even_after_another_gave_up() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        scheduler.stats = None
        with pytest.raises(ServiceUnavailable):
            await client.stats(timeout=0.05)
        second = asyncio.create_task(client.stats())
        await scheduler.until(AskStats, 2)
        for running in (1, 2):  # the answers, in the order of the questions
            scheduler.say(Stats(epoch=scheduler.epoch, running=running, waiting=0, preemptions=0))
        assert (await second).running == 2

    play(scenario)


def test_stats_fail_when_the_scheduler_leaves() -> None:
    async def scenario(scheduler: ScriptedScheduler, client: AsyncClient) -> None:
        scheduler.stats = None
        asked = asyncio.create_task(client.stats(timeout=None))
        await scheduler.until(AskStats)
        scheduler.say(Goodbye(reason="done"))
        with pytest.raises(ServiceUnavailable, match="done"):
            await asked

    play(scenario)


def test_a_program_that_has_no_files_left_is_told_and_not_ended() -> None:
    """By ZeroMQ, which calls abort where it cannot open one."""
    script = """
import asyncio, os, resource
from tandem import AsyncClient, ServiceUnavailable

async def connect():
    try:
        await AsyncClient("ipc:///nowhere/at/all", connect_timeout=0.01).connect()
    except ServiceUnavailable as error:
        return error

async def main():
    await connect()  # imports whatever is imported late
    lowest = os.dup(0)
    os.close(lowest)
    for free in range(16):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        print(free, await connect())

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0].startswith("0 a connection needs 12 more open files, but after 0: Too many open files; close some")
    assert told[11].startswith("11 a connection needs 12 more open files, but after 11: ")
    assert told[-1].startswith("15 no scheduler could be reached")
