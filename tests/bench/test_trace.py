"""Traces: what is kept of them, and what those of a real system at lookahead 0 and 1 say about who waits for whom."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.bench import trace
from tandem.protocol import tracing
from tandem.protocol.errors import ConfigurationError

from support.commands import tandem

SHORTEST_US = 1e-3
"""Sums of times are no more exact."""
TRACKS = {
    "scheduler": {"scheduler", "scheduler's socket for workers", "scheduler's sockets for clients"},
    "worker": {"link", "host thread", "compute thread", "result thread"},
}


@given(st.integers(0, 12), st.integers(1, 5))
def test_a_track_keeps_its_newest_spans(count: int, capacity: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "CAPACITY", capacity)
        track = tracing.Track("t", ("a", "b"))
        for number in range(count):
            track.add(number % 2, number, 10 * number, 10 * number + 5)
        kept = [(span.kind, span.step, span.start, span.end) for span in trace.spans(track)]
    expected = [("ab"[number % 2], number, 10 * number, 10 * number + 5) for number in range(count)]
    assert kept == expected[-capacity:]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    tracer = tracing.Tracer("a/b", str(tmp_path / "made" / "here"))
    track = tracer.track("t", "x")
    between = track.end(0, 7, track.start())
    assert track.end(0, 8, between) >= between
    tracer.write()
    (found,) = tracing.read(tmp_path / "made" / "here")
    assert found.process == "a/b"
    assert [(one.name, one.spans()) for one in found.tracks] == [("t", track.spans())]


def test_without_a_directory_nothing_is_kept_or_written(tmp_path: Path) -> None:
    tracer = tracing.Tracer("p", None)
    track = tracer.track("t", "x")
    track.end(0, 7, track.start())
    tracer.write()
    assert track is tracing.OFF
    assert not track.on


def test_what_cannot_be_written_or_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--trace-dir .*file/x: cannot make it: Not a directory"):
        tracing.Tracer("p", str(tmp_path / "file" / "x"))
    (tmp_path / "bad.trace").write_bytes(b"\x81\xa1x\x01")
    with pytest.raises(ConfigurationError, match=r"bad\.trace is no trace"):
        tracing.read(tmp_path)
    with pytest.raises(ConfigurationError, match="quiet: no step was traced"):
        trace.draw("never.png", [trace.SystemTrace("quiet", [])])


class Run:
    """One system's spans out of a Chrome trace, by track and kind."""

    def __init__(self, events: list[dict[str, Any]], system: str) -> None:
        names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        self.pids = {pid: name.split(" (")[0] for pid, name in names.items() if name.endswith(f"({system})")}
        self.tracks = {
            (event["pid"], event["tid"]): event["args"]["name"]
            for event in events
            if event["name"] == "thread_name" and event["pid"] in self.pids
        }
        self.spans = [event for event in events if event["ph"] == "X" and event["pid"] in self.pids]

    def of(self, track: str, kind: str) -> dict[int, tuple[float, float]]:
        """Start and end, µs, by step."""
        found = {}
        for event in self.spans:
            if self.tracks[event["pid"], event["tid"]] == track and event["name"] == kind:
                step = event["args"]["step"]
                assert step not in found
                found[step] = event["ts"], event["ts"] + event["dur"]
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    folder = tmp_path_factory.mktemp("trace")
    load = "--num-prompts 4 --prompt-tokens 8 --output-tokens 40 --num-warmups 1 --threads 1 --device cpu".split()
    outputs = ["--trace", str(folder / "t.json"), "--timeline", str(folder / "t.png")]
    with tandem("bench", "offline", *load, "--lookahead", "0", "--lookahead", "1", *outputs, environment={}) as command:
        assert command.finish() == 0, command.output
    assert (folder / "t.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((folder / "t.json").read_text())["traceEvents"]
    return {lookahead: Run(events, f"lookahead {lookahead}") for lookahead in (0, 1)}


@pytest.mark.parametrize("lookahead", [0, 1])
def test_all_tracks_are_there_and_their_spans_nest(runs: dict[int, Run], lookahead: int) -> None:
    run = runs[lookahead]
    found: dict[str, set[str]] = {name: set() for name in run.pids.values()}
    for (pid, _), name in run.tracks.items():
        found[run.pids[pid]].add(name)
    assert found == TRACKS
    by_track: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in run.spans:
        assert event["dur"] >= 0
        by_track.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(by_track) == set(run.tracks)
    for spans in by_track.values():
        open_until: list[float] = []
        for start, end in spans:  # by start, outer ones first
            while open_until and open_until[-1] <= start + SHORTEST_US:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + SHORTEST_US
            open_until.append(end)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_each_step_goes_its_way_on_one_clock(runs: dict[int, Run], lookahead: int) -> None:
    run = runs[lookahead]
    way = [
        run.of("scheduler's socket for workers", "send plan"),
        run.of("link", "receive plan"),
        run.of("host thread", "lay out"),
        run.of("host thread", "launch"),
        run.of("compute thread", "copy in"),
        run.of("compute thread", "forward"),
        run.of("compute thread", "copy out"),
        run.of("result thread", "hand on"),
        run.of("link", "send result"),
        run.of("scheduler's socket for workers", "receive result"),
    ]
    steps = set(way[0])
    assert steps == set(range(len(steps)))
    assert len(steps) > 40
    for before, after in itertools.pairwise(way):
        assert set(after) == steps
        assert all(before[step][0] <= after[step][0] for step in steps)
    whole = run.of("compute thread", "step")
    assert all(whole[step][1] <= whole[step + 1][0] + SHORTEST_US for step in range(len(steps) - 1))


def test_at_lookahead_1_the_next_step_is_there_when_one_ends_and_at_0_it_is_not(runs: dict[int, Run]) -> None:
    for lookahead, run in runs.items():
        planned = run.of("scheduler's socket for workers", "send plan")
        answered = run.of("scheduler's socket for workers", "receive result")
        launched, computed = run.of("host thread", "launch"), run.of("compute thread", "step")
        steps = range(len(planned) - 1)
        planned_ahead = sum(planned[step + 1][0] < answered[step][0] for step in steps)
        launched_ahead = sum(launched[step + 1][0] < computed[step][1] for step in steps)
        if lookahead == 0:
            assert (planned_ahead, launched_ahead) == (0, 0)
        else:
            # All but where the work ran out: after the warm-up's requests, and after the load's.
            assert planned_ahead >= len(planned) - 6
            assert launched_ahead > 0
