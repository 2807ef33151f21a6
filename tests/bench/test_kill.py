"""The benchmarks that kill processes: how they count, and (slow) that one does what it says. Nothing here asserts a
time that was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.bench import kill
from tandem.bench.kill import Run, compared, summary
from tandem.bench.recovery import pause_s

from support.deadlines import DEADLINE_S


@pytest.mark.parametrize(
    ("times", "pause"),
    [
        ([9.9, 10.3, 10.4], 0.3),
        ([9.9, 10.01, 10.02, 10.5, 10.6], 0.5),  # two were on their way
        ([9.98, 10.03, 10.05, 10.07, 10.09, 10.11, 10.13], 0.03),  # the other worker's: it never stood still
        ([10.05, 10.4, 12.0], 0.4),  # a later gap has other reasons
        ([9.0, 13.0], 3.0),
    ],
)
def test_a_pause_ends_with_the_first_token_that_was_not_on_its_way(times: list[float], pause: float) -> None:
    assert pause_s(times, 10.0) == pytest.approx(pause)


def test_differences_are_told_by_where_they_begin() -> None:
    reference = Run([[1, 2, 3, 4]] * 4, [[0.0]] * 4)
    run = Run([[1, 2, 3, 4], [1, 2, 9, 4], [1, 9, 9, 9], [1, 2, 3, 9]], [[0.0]] * 4, had=[2, 2, 2, 2])
    assert compared(run, reference) == {
        "streams": 4,
        "differ": 3,
        "differ_first_after_the_kill": 2,
        "first_difference_at": 1,
        "median_difference_at": 2,
    }
    assert compared(reference, reference)["differ"] == 0


def test_what_was_computed_again_is_counted_of_open_streams() -> None:
    times = [[1.0, 2.0, 2.05, 7.0], [1.0, 2.0, 6.0, 7.0], [1.0, 1.1, 1.2, 1.3]]
    run = Run([[1, 2, 3, 4]] * 3, times, killed_at=2.01, had=[2, 2, 4], back_at=5.01)
    found = summary([], run, prompt_tokens=10)
    assert found["streams_open_at_the_kill"] == 2
    assert found["computed_again_tokens"] == 24
    assert found["worker_back_s"] == 3.0
    assert found["next_token_s"] == {"median": 4.49, "first": 3.99, "last": 4.99}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-tokens", "10", "--kill-after-tokens", "10"], "--kill-after-tokens 10: must be less than"),
        (["--kill-after-tokens", "0"], "--kill-after-tokens: must be at least 1, not 0"),
        (["--num-prompts", "0"], "--num-prompts: must be at least 1, not 0"),
    ],
)
def test_a_load_that_cannot_be_killed_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        kill.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_streams_outlive_the_only_worker(tmp_path: Path) -> None:
    out = tmp_path / "kill.json"
    arguments = "--device cpu --num-prompts 4 --prompt-tokens 20 --output-tokens 400 --kill-after-tokens 20"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tandem.bench.kill", *arguments.split(), "--batch-invariant", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["wrong"] == []
    assert (report["streams"], report["streams_open_at_the_kill"], report["tokens"]) == (4, 4, 1_600)
    assert report["tokens_before_the_kill"] >= 80
    assert report["killed_against_undisturbed"]["differ"] == 0
    assert len(report["pauses_s"]) == 4
