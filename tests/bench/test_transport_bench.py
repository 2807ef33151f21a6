"""The benchmark of transports takes every one of them. Nothing here asserts a time that was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.bench import transport


def test_every_transport_is_measured_at_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "transport.json"
    assert transport.main(["--round-trips", "3", "--one-way", "512", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [(one["bytes"], one["transport"]) for one in report["messages"]] == [
        (size, name) for size in transport.SIZES for name in ("ipc", "tcp", "tcp, keys")
    ]
    assert all(us > 0 for one in report["messages"] for us in one["us"])
    assert report["system_tokens_per_s"] == {}
    assert capsys.readouterr().out.count("tcp, keys") == len(transport.SIZES)


@pytest.mark.parametrize("arguments", [["--one-way", "1000"], ["--one-way", "128"], ["--repeats", "0"]])
def test_numbers_that_cannot_be_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        transport.main(arguments)
    assert ended.value.code == 2
    assert f"{arguments[0]}: must be" in capsys.readouterr().err
