"""The files in deploy/ name options that exist, and the batch script ends the service and says how it ended."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tandem.launch.cli import SERVE_FLAGS, app
from tandem.launch.config import read_file
from tandem.launch.options import option_names

from support.deadlines import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TANDEM = "/opt/tandem/.venv/bin/tandem"


class UnitParser(configparser.ConfigParser):
    """Keeps names as they are written."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def unit() -> configparser.ConfigParser:
    parser = UnitParser(interpolation=None, strict=False)
    parser.read_string((DEPLOY / "tandem.service").read_text())
    return parser


def of_unit() -> list[str]:
    return shlex.split(unit()["Service"]["ExecStart"])


def of_docker() -> list[str]:
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    (run,) = re.findall(r"^docker run .* tandem (--.*)$", (ROOT / "docs/deployment.md").read_text(), re.MULTILINE)
    return [*json.loads(line), *shlex.split(run)]


def of_slurm() -> list[str]:
    text = (DEPLOY / "tandem.slurm").read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"^({re.escape(TANDEM)} .*) &$", text, re.MULTILINE)
    return shlex.split(line)


def flags_of(command: str) -> set[str]:
    group = typer.main.get_group(app)
    return {flag for parameter in group.commands[command].params for flag in parameter.opts}


@pytest.mark.parametrize("words", [of_unit(), of_docker(), of_slurm()], ids=["systemd", "docker", "slurm"])
def test_the_commands_exist(words: list[str]) -> None:
    assert words[:2] == [TANDEM, "serve"]
    named = {word for word in words if word.startswith("-")}
    assert named
    assert named <= flags_of("serve")


def test_the_configuration_file_is_one() -> None:
    read_file(DEPLOY / "serve.yaml", option_names(SERVE_FLAGS))  # raises for an option that is none


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs/deployment.md").read_text()
    assert {path.name for path in DEPLOY.iterdir()} == set(re.findall(r"\]\(\.\./deploy/([\w.]+)\)", page))


def test_systemd_waits_longer_than_the_service_takes_to_end() -> None:
    options = read_file(DEPLOY / "serve.yaml", option_names(SERVE_FLAGS))
    assert float(unit()["Service"]["TimeoutStopSec"]) > options["shutdown_timeout"]


STAND_IN = """#!{python}
import os, signal, sys
def end(*_):
    os.write(1, b"ending\\n")  # not print: it may be what is interrupted
    sys.exit({code})
signal.signal(signal.SIGTERM, end)
print("serving", *sys.argv[1:], flush=True)
while True:  # the signal may come before the pause
    signal.pause()
"""


@pytest.mark.parametrize("code", [0, 1])
def test_the_batch_script_passes_on_that_the_time_is_over(code: int, tmp_path: Path) -> None:
    stand_in = tmp_path / "tandem"
    stand_in.write_text(STAND_IN.format(python=sys.executable, code=code))
    stand_in.chmod(0o755)
    script = tmp_path / "job"
    script.write_text((DEPLOY / "tandem.slurm").read_text().replace(TANDEM, str(stand_in)))
    environment = {"PATH": "/usr/bin:/bin", "SLURM_GPUS_ON_NODE": "3"}
    with subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, text=True, env=environment) as job:
        assert job.stdout is not None
        served = job.stdout.readline().split()
        assert served[:2] == ["serving", "serve"]
        assert served[served.index("--data-parallel-size") + 1] == "3"
        job.send_signal(signal.SIGTERM)
        assert job.stdout.readline() == "ending\n"
        assert job.wait(timeout=DEADLINE_S) == code
