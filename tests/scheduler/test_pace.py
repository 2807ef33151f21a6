"""How large chunks of prompts may be beside rows that decode."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.scheduler.pace import LEAST_TOKENS, Pace

SECONDS = st.one_of(st.just(0.0), st.floats(0.0, 1e4))


@given(
    target_s=SECONDS,
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10_000), SECONDS), max_size=9),
    budget=st.integers(1, 100_000),
)
def test_chunks_get_what_they_always_get_and_no_more_than_there_is(
    target_s: float, steps: list[tuple[int, int, float]], budget: int
) -> None:
    pace = Pace(target_s)
    for decode_rows, chunk_tokens, seconds in steps:
        pace.observe(decode_rows, chunk_tokens, seconds)
    assert min(budget, LEAST_TOKENS) <= pace.chunk_tokens(1, budget) <= budget
    assert pace.chunk_tokens(0, budget) == budget


@pytest.mark.parametrize(("decode_s", "tokens"), [(0.01, 4_096), (0.03, LEAST_TOKENS)])
def test_prompts_that_cost_nothing_for_long(decode_s: float, tokens: int) -> None:
    """The average of what a token costs comes as near to zero as a float can, beside a target that is above what the
    decoding rows need or below."""
    pace = Pace(0.02)
    pace.observe(1, 0, decode_s)
    pace.observe(1, 100, 2 * decode_s)
    for _ in range(5_000):
        pace.observe(1, 100, decode_s)
        assert LEAST_TOKENS <= pace.chunk_tokens(1, 4_096) <= 4_096
    assert pace.chunk_tokens(1, 4_096) == tokens


def test_the_share_is_what_brings_a_step_to_its_target() -> None:
    pace = Pace(0.02)
    pace.observe(8, 0, 0.01)
    pace.observe(8, 500, 0.02)
    assert pace.chunk_tokens(8, 4_096) == pytest.approx(500, abs=1)
    assert pace.step_s(8, 1_000) == pytest.approx(0.03)


def test_a_prompt_of_one_token_says_little_of_what_a_token_costs() -> None:
    """It took a whole step, as any chunk up to some hundred tokens does. One step with 64 shows that."""
    pace = Pace(0.1)
    pace.observe(1, 0, 0.005)
    pace.observe(0, 1, 0.005)
    assert pace.chunk_tokens(1, 4_096) == LEAST_TOKENS
    pace.observe(1, 64, 0.006)
    assert pace.chunk_tokens(1, 4_096) > 250
