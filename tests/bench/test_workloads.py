"""Loads are what their flags say, the same each time, and refused where they cannot be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.bench.workloads import Load, Wanted, arrivals, plan, prompt_of, sampling_of
from tandem.launch.config import build
from tandem.protocol.errors import ConfigurationError

VOCAB = 1_000


def ids(load: Load, index: int, run: int = 1) -> list[int]:
    """The token ids that request `index` sends."""
    prompt = prompt_of(load, index, plan(load)[index], VOCAB, run)
    assert isinstance(prompt, np.ndarray)
    assert prompt.dtype == np.int32
    found: list[int] = prompt.tolist()
    assert all(0 <= token < VOCAB for token in found)
    return found


def test_the_ragged_load_is_the_published_one() -> None:
    wanted = plan(Load(workload="ragged", num_prompts=512))
    assert [(one.prompt, one.output_tokens) for one in wanted[:2]] == [(992, 261), (904, 279)]
    assert sum(one.output_tokens for one in wanted) == 143_089
    assert plan(Load(workload="ragged", num_prompts=512, seed=1)) != wanted


def test_uniform_prompts_have_their_length_and_differ() -> None:
    load = Load(num_prompts=3, prompt_tokens="40", output_tokens="7")
    assert plan(load) == [Wanted(40, 7)] * 3
    prompts = [ids(load, index) for index in range(3)]
    assert [len(prompt) for prompt in prompts] == [40, 40, 40]
    assert prompts[0] != prompts[1] != prompts[2]


def test_prompts_depend_on_seed_run_and_index_alone() -> None:
    load = Load(num_prompts=4, prompt_tokens="40")
    assert ids(load, 2) == ids(Load(num_prompts=9, prompt_tokens="40"), 2)
    assert ids(load, 2) != ids(load, 2, run=2)
    assert ids(load, 2) != ids(Load(num_prompts=4, prompt_tokens="40", seed=1), 2)


def test_groups_share_their_prefix_and_nothing_else() -> None:
    load = Load(
        workload="shared-prefix",
        num_prompts=6,
        prefix_tokens=20,
        prefix_groups=2,
        prompt_tokens="5-9",
        output_tokens="3",
    )
    prompts = [ids(load, index) for index in range(6)]
    assert all(25 <= len(prompt) <= 29 for prompt in prompts)
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 2
    assert prompts[0][:20] == prompts[2][:20] == prompts[4][:20]
    assert len({tuple(prompt[20:]) for prompt in prompts}) == 6
    assert ids(load, 0, run=2)[:20] != prompts[0][:20]


def test_arrivals_keep_the_rate_exactly_and_come_from_the_seed() -> None:
    times = arrivals(1_001, 20.0, 1.0, 0)
    assert times[0] == 0
    assert times[-1] == pytest.approx(50.0)
    assert times == sorted(times)
    assert times == arrivals(1_001, 20.0, 1.0, 0)
    assert times != arrivals(1_001, 20.0, 1.0, 1)
    assert arrivals(1_001, 40.0, 1.0, 0) == pytest.approx([time / 2 for time in times])
    assert arrivals(3, float("inf"), 1.0, 0) == [0.0, 0.0, 0.0]
    assert arrivals(1, 5.0, 1.0, 0) == [0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
def test_gaps_are_as_bursty_as_asked(burstiness: float) -> None:
    gaps = np.diff(arrivals(20_001, 10.0, burstiness, 0))
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)  # of a gamma distribution


def write_trace(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_trace_is_read_in_the_order_of_its_times(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "trace.jsonl",
        {"arrival_s": 7.5, "prompt": "hello", "output_tokens": 3},
        {"arrival_s": 7.0, "prompt_tokens": 12, "output_tokens": 4},
        {"arrival_s": 9.0, "prompt_token_ids": [5, 6], "output_tokens": 5},
    )
    load = Load(workload="trace", trace_file=trace)
    wanted = plan(load)
    assert [one.arrival_s for one in wanted] == [0.0, 0.5, 2.0]
    assert [one.output_tokens for one in wanted] == [4, 3, 5]
    assert len(ids(load, 0)) == 12
    assert prompt_of(load, 1, wanted[1], VOCAB, 1) == "hello"
    assert ids(load, 2) == [5, 6]
    assert len(plan(Load(workload="trace", trace_file=trace, num_prompts=2))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"output_tokens": 1}', "exactly one of prompt, prompt_token_ids and prompt_tokens is needed"),
        ('{"output_tokens": 1, "prompt": "a", "prompt_tokens": 3}', "exactly one of"),
        ('{"output_tokens": 0, "prompt": "a"}', "output_tokens"),
        ('{"prompt": "a"}', "output_tokens"),
        ('{"output_tokens": 1, "prompt": "a", "arrival": 3}', "arrival"),
        ('{"output_tokens": 1, "prompt": "a", "arrival_s": -1}', "arrival_s"),
        ('{"output_tokens": 1, "prompt_token_ids": []}', "prompt_token_ids"),
    ],
)
def test_bad_lines_of_a_trace_are_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"output_tokens": 1, "prompt_tokens": 1}\n' + line)
    with pytest.raises(ConfigurationError, match=r"--trace-file: .*, line 2: ") as refused:
        plan(Load(workload="trace", trace_file=str(path)))
    assert message in str(refused.value)


def test_a_trace_that_is_missing_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        plan(Load(workload="trace", trace_file=str(tmp_path / "none")))
    trace = write_trace(tmp_path / "trace.jsonl", {"prompt_tokens": 1, "output_tokens": 1})
    with pytest.raises(ConfigurationError, match="has 1 requests, not the 2 asked for"):
        plan(Load(workload="trace", trace_file=trace, num_prompts=2))
    with pytest.raises(ConfigurationError, match="has 0 requests"):
        plan(Load(workload="trace", trace_file=write_trace(tmp_path / "empty.jsonl")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": "1-2"}, "--prompt-tokens: 1-2 is a range, which --workload ragged takes"),
        ({"output_tokens": "many"}, "--output-tokens: expected N or LOW-HIGH, got 'many'"),
        ({"workload": "ragged", "output_tokens": "0-5"}, "expected 1 <= LOW <= HIGH"),
        ({"workload": "ragged", "prompt_tokens": "5-4"}, "expected 1 <= LOW <= HIGH"),
        ({"prefix_tokens": 5}, "--prefix-tokens is for --workload shared-prefix, not uniform"),
        ({"workload": "ragged", "prefix_groups": 5}, "--prefix-groups is for --workload shared-prefix, not ragged"),
        ({"trace_file": "x"}, "--trace-file is for --workload trace, not uniform"),
        ({"workload": "trace"}, "--workload trace needs a file"),
        (
            {"workload": "trace", "trace_file": "x", "output_tokens": "5"},
            "--output-tokens is for --workload uniform or",
        ),
        ({"workload": "trace", "trace_file": "x", "text": True}, "--text is for"),
        ({"workload": "heavy"}, "--workload: "),
        ({"num_prompts": 0}, "--num-prompts: "),
        ({"temperature": -1.0}, "--temperature: "),
        ({"sampling_params": "{"}, "--sampling-params: no JSON: "),
        ({"sampling_params": "[1]"}, "--sampling-params: expected a JSON object, got '[1]'"),
        ({"sampling_params": '{"top_p": 2}'}, "--sampling-params: top_p: "),
        ({"sampling_params": '{"topp": 1}'}, "--sampling-params: topp: "),
        ({"sampling_params": '{"seed": 1}'}, "--sampling-params: seed is what --seed says"),
        ({"sampling_share": 0.5}, "--sampling-share is for --sampling-params"),
        ({"sampling_params": "{}", "sampling_share": 0.0}, "--sampling-share: "),
    ],
)
def test_loads_that_cannot_be_are_refused_by_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        build(Load, options)
    assert message in str(refused.value)


def test_more_sampling_parameters_are_a_share_of_the_requests_spread_evenly() -> None:
    more = '{"temperature": 0.8, "top_k": 7, "structured_outputs": {"json": {"type": "integer"}}}'
    load = build(Load, {"sampling_params": more, "sampling_share": 0.4, "seed": 5})
    found = [sampling_of(load, index, 9) for index in range(10)]
    assert [params.top_k for params in found] == [0, 0, 7, 0, 7, 0, 0, 7, 0, 7]
    plain, own = found[1:3]
    assert (plain.temperature, plain.max_tokens, plain.ignore_eos, plain.seed) == (0.0, 9, True, 6)
    assert (own.temperature, own.max_tokens, own.ignore_eos, own.seed) == (0.8, 9, True, 7)
    assert own.structured_outputs is not None
    assert json.loads(own.structured_outputs.json or "") == {"type": "integer"}


@pytest.mark.parametrize("share", [0.07, 0.29, 0.57, 0.58, 1.0])
def test_a_share_of_a_hundred_requests_is_as_many_as_it_says(share: float) -> None:
    load = build(Load, {"sampling_params": '{"top_k": 7}', "sampling_share": share})
    assert sum(sampling_of(load, index, 9).top_k == 7 for index in range(100)) == round(100 * share)
