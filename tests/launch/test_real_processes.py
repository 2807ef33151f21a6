"""Commands as users run them: real processes, real sockets, and nothing left when they are gone."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tandem.client import Client
from tandem.launch.embedded import EmbeddedSystem
from tandem.launch.supervisor import ChildDied
from tandem.protocol.errors import ConfigurationError

from support.commands import files_below, gone, tandem, terminal
from support.deadlines import DEADLINE_S


def mains(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Schedulers and workers among them, without what these have started."""
    return [one for one in processes if one.is_running() and "tandem.launch.tether" in one.cmdline()]


def test_serve_generate_chat_and_a_clean_end(runtime: Path, engine: list[str], tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(runtime)}
    config = tmp_path / "serve.yaml"
    config.write_text("served-model-name: tiny\nmax-num-seqs: 8\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\nthree\n")
    with tandem("serve", "--config", str(config), "--port", "0", *engine, environment=environment) as serve:
        serve.wait_for("Ctrl-C ends it.")
        assert f"Serving tiny at ipc://{runtime}/tandem/default" in serve.output

        # The running service is found without being named, and asked the same question twice.
        sampling = ["--max-tokens", "12", "--seed", "7", "--temperature", "0.9"]
        answers = []
        for more in ([], ["--connect", f"ipc://{runtime}/tandem/default"]):
            with tandem("generate", *sampling, *more, "--json", "hello", environment=environment) as generate:
                assert generate.finish() == 0, generate.output
                answers.append(json.loads(generate.output.splitlines()[-1]))
        assert answers[0] == answers[1]
        assert answers[0]["seed"] == 7
        assert 1 <= answers[0]["completion_tokens"] <= 12

        with tandem("generate", *sampling, "--json", "-f", str(prompts), "zero", environment=environment) as generate:
            assert generate.finish() == 0, generate.output
        lines = [json.loads(line) for line in generate.output.splitlines() if line.startswith("{")]
        assert [line["prompt"] for line in lines] == ["zero", "one", "two", "three"]
        assert "4 of 4 prompts answered" in generate.output

        # One request that cannot be is reported, and does not take the others with it.
        with tandem("generate", "--max-tokens", "4", "x" * 9000, "short", environment=environment) as generate:
            assert generate.finish() == 1, generate.output
        assert "failed: " in generate.output
        assert "> short\n" in generate.output

        with tandem("chat", *sampling, environment=environment, stdin=True) as chat:
            for line in ("hello", "", "/reset", "again"):
                chat.write(line)
            assert chat.finish() == 0, chat.output

        # The text as it is, each line by itself: what `generate --raw` says to the same prompts.
        texts = ["hello", " hello ", "hello"]
        with tandem("generate", *sampling, "--raw", "--json", *texts, environment=environment) as generate:
            assert generate.finish() == 0, generate.output
        raw = [json.loads(line)["text"] for line in generate.output.splitlines() if line.startswith("{")]
        with tandem("complete", *sampling, environment=environment, stdin=True) as complete:
            for line in (texts[0], "", texts[1], texts[2]):
                complete.write(line)
            assert complete.finish() == 0, complete.output
        assert raw[0] == raw[2] != raw[1]
        assert complete.output.endswith("default.\n" + "".join(f"{text}\n" for text in raw))

        # On a terminal, Ctrl-C stops an answer and not the conversation.
        for command in ("chat", "complete"):
            with terminal(command, "--ignore-eos", environment=environment) as dialogue:
                dialogue.wait_for("> ")
                dialogue.write("tell me everything")
                dialogue.wait_for("everything\r\n")  # the terminal's echo
                dialogue.wait_for_more()
                dialogue.send(signal.SIGINT)
                dialogue.wait_for("[stopped]\r\n> ")
                dialogue.write("/exit")
                assert dialogue.finish() == 0, dialogue.output

        with tandem("serve", "--no-http", *engine, environment=environment) as second:
            assert second.finish() == 1, second.output
        assert "another scheduler is serving there" in second.output

        processes = serve.descendants()
        assert len(mains(processes)) == 3  # scheduler, worker, gateway
        for impatient in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            serve.send(impatient)
        assert serve.finish() == 0, serve.output
    assert gone(processes)
    assert files_below(runtime) == ["tandem"]


def test_a_dead_worker_that_is_not_to_be_started_again_is_reported_and_ends_the_service(
    runtime: Path, engine: list[str]
) -> None:
    address = f"ipc://{runtime}/mine"
    with tandem("serve", "--no-http", "--address", address, "--max-restarts", "0", *engine, environment={}) as serve:
        serve.wait_for("registered with scheduler")
        serve.wait_for("Ctrl-C ends it.")
        processes = serve.descendants()
        (worker,) = [one for one in processes if "tandem.worker.main" in one.cmdline()]
        worker.kill()
        assert serve.finish() == 1, serve.output
    assert "tandem: worker was killed by SIGKILL. Its last words:" in serve.output
    assert "registered with scheduler" in serve.output.split("last words:")[1]
    assert gone(processes)
    assert files_below(runtime) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_can_be_ended_while_it_starts(number: signal.Signals, runtime: Path, engine: list[str]) -> None:
    with tandem("serve", "--no-http", "--address", f"ipc://{runtime}/mine", *engine, environment={}) as serve:
        serve.wait_for("scheduler: ready")
        processes = serve.descendants()
        serve.send(number)
        assert serve.finish() == 0, serve.output
    assert gone(processes)
    assert files_below(runtime) == []


def test_a_model_that_does_not_exist_is_one_sentence(runtime: Path) -> None:
    with tandem("serve", "/nonexistent/m", "--no-http", "--address", f"ipc://{runtime}/mine", environment={}) as serve:
        assert serve.finish() == 1, serve.output
    assert serve.output.splitlines()[-1] == "tandem: worker: no such folder: /nonexistent/m"
    assert "Traceback" not in serve.output
    assert files_below(runtime) == []


def test_scheduler_and_worker_placed_by_hand(runtime: Path, engine: list[str]) -> None:
    address = f"ipc://{runtime}/mine"
    with (
        tandem("scheduler", "--address", address, environment={}) as scheduler,
        tandem("worker", "--scheduler", address, "--name", "by-hand", *engine, environment={}) as worker,
    ):
        worker.wait_for("registered with scheduler")
        with Client(address) as client:
            assert client.generate([5, 6, 7], max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
        worker.send(signal.SIGTERM)
        assert worker.finish() == 0, worker.output
        scheduler.send(signal.SIGINT)
        assert scheduler.finish() == 0, scheduler.output
    assert files_below(runtime) == []


@pytest.mark.thorough
def test_two_embedded_systems_at_once(runtime: Path, model_folder: Path) -> None:
    options = {"model": str(model_folder), "load_format": "dummy", "device": "cpu", "threads": 1}
    others = psutil.Process().children(recursive=True)  # what other tests share
    with EmbeddedSystem({**options, "seed": 1}) as one, EmbeddedSystem({**options, "seed": 2}) as two:
        assert one.address != two.address
        with Client(one.address) as first, Client(two.address) as second:
            prompt = list(range(2, 30))
            tokens = [c.generate(prompt, max_tokens=16, temperature=0, ignore_eos=True) for c in (first, second)]
            assert tokens[0].token_ids != tokens[1].token_ids  # other weights
            again = first.generate(prompt, max_tokens=16, temperature=0, ignore_eos=True)
            assert again.token_ids == tokens[0].token_ids
        children = [child for child in psutil.Process().children(recursive=True) if child not in others]
        assert len(mains(children)) == 4
        two.stop()
        two.stop()
        with Client(one.address) as first:
            assert first.generate([3], max_tokens=1).usage.completion_tokens == 1
    assert gone(children)
    assert files_below(runtime) == ["tandem"]


FORGETFUL = """
import sys
from tandem.launch.embedded import EmbeddedSystem
system = EmbeddedSystem({"model": sys.argv[1], "load_format": "dummy", "device": "cpu", "threads": 1})
system.start()
print(system.address)
"""


@pytest.mark.slow
def test_a_program_that_forgets_to_stop_its_system_leaves_nothing(runtime: Path, model_folder: Path) -> None:
    command = [sys.executable, "-P", "-c", FORGETFUL, str(model_folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"ipc://{runtime}/tandem/e-")
    assert files_below(runtime) == ["tandem"]


def test_an_embedded_system_that_cannot_start_leaves_nothing(runtime: Path) -> None:
    system = EmbeddedSystem({"model": "/nonexistent/m"})
    with pytest.raises(ChildDied, match="no such folder: /nonexistent/m"):
        system.start()
    assert files_below(runtime) == ["tandem"]
    with pytest.raises(ConfigurationError, match="an embedded system chooses its own"):
        EmbeddedSystem({}, {"address": "ipc:///x"})


@pytest.mark.thorough
def test_generate_goes_on_when_its_worker_dies(runtime: Path, engine: list[str]) -> None:
    """The answer is what it would have been."""
    sampling = ["--ignore-eos", "--temperature", "0.8", "--seed", "3", "--max-tokens", "300", "--json"]
    arguments = ["generate", *engine, "--batch-invariant", *sampling, "hello"]
    answers = []
    for disturbed in (False, True):
        with tandem(*arguments, environment={"PYTHONUNBUFFERED": "1"}) as generate:
            generate.wait_for("worker: ready\n")
            if disturbed:
                (worker,) = [one for one in generate.descendants() if "tandem.worker.main" in one.cmdline()]
                worker.kill()
            assert generate.finish() == 0, generate.output
            answers.append(generate.output)
    assert "[launcher] worker was killed by SIGKILL; starting it again in 0.1 s\n" in answers[1]
    told = [json.loads(line) for answer in answers for line in answer.split("\n") if line.startswith("{")]
    assert [one["completion_tokens"] for one in told] == [300, 300]
    assert told[0]["text"] == told[1]["text"]
    assert files_below(runtime) == ["tandem"]


@pytest.mark.thorough
def test_processes_that_die_or_hang_are_started_again(runtime: Path, engine: list[str]) -> None:
    def serving() -> dict[str, psutil.Process]:
        found = serve.descendants()
        return {
            module: one
            for one in found
            for module in ("scheduler", "worker")
            if f"tandem.{module}.main" in one.cmdline()
        }

    def answered() -> None:
        with Client(address) as client:
            assert client.generate([5, 6, 7], max_tokens=3, ignore_eos=True).usage.completion_tokens == 3

    address = f"ipc://{runtime}/mine"
    with tandem("serve", "--address", address, "--no-http", "--scheduler-lease", "4", *engine, environment={}) as serve:
        serve.wait_for("Ctrl-C ends it.")
        processes = serve.descendants()
        serving()["worker"].kill()
        serve.wait_for("worker was killed by SIGKILL; starting it again")
        answered()
        serving()["scheduler"].send_signal(signal.SIGSTOP)
        serve.wait_for("scheduler gave no sign of life for ")
        serve.wait_for("and was killed; starting it again in 0.01 s")
        answered()
        processes += serve.descendants()
        assert len(mains(set(processes))) == 2
        serve.send(signal.SIGINT)
        assert serve.finish() == 0, serve.output
    assert gone(processes)
    assert files_below(runtime) == []


def test_demo_shows_answers_and_speed(runtime: Path, engine: list[str]) -> None:
    with tandem("demo", *engine, environment={}) as demo:
        assert demo.finish() == 0, demo.output
    assert "> What is 458 + 267?\n" in demo.output
    assert "12 questions at once: " in demo.output
    assert " tokens/s (ready after " in demo.output
    assert files_below(runtime) == ["tandem"]
