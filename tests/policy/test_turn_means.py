"""What prompts take, learned from a mixture of short and long ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.policy.turn_means import LEAST_SLOPE, ReadTimes


def times(prompts: list[tuple[int, float]]) -> ReadTimes:
    reads = ReadTimes()
    for tokens, seconds in prompts:
        reads.add(tokens, seconds)
    return reads


def test_nothing_is_known_at_first() -> None:
    reads = ReadTimes()
    assert (reads.s_per_token, reads.s_per_further_token) == (0.0, 0.0)


def test_short_prompts_say_little_of_long_ones() -> None:
    """Each takes 10 ms, and each token 50 us."""
    reads = times([(200 if index % 4 else 1500, 0.010 + 50e-6 * (200 if index % 4 else 1500)) for index in range(40)])
    assert reads.s_per_token > 65e-6
    assert reads.s_per_further_token == pytest.approx(50e-6)


@pytest.mark.parametrize("prompts", [[(200, 0.02)], [(200, 0.02)] * 9, [(200, 0.02), (210, 0.03), (190, 0.01)]])
def test_of_prompts_of_one_length_there_is_no_line(prompts: list[tuple[int, float]]) -> None:
    reads = times(prompts)
    assert reads.s_per_further_token == reads.s_per_token > 0


def test_a_further_token_takes_no_more_than_the_mean_and_not_nothing() -> None:
    """Where long prompts take more per token, and where they take as long as short ones."""
    steep, flat = times([(100, 0.001), (1000, 0.5)] * 9), times([(100, 0.1), (1000, 0.1)] * 9)
    assert steep.s_per_further_token == steep.s_per_token
    assert flat.s_per_further_token == pytest.approx(LEAST_SLOPE * flat.s_per_token)


def test_what_was_long_ago_is_forgotten() -> None:
    reads = times([(200, 0.02), (1500, 0.15)] * 100 + [(200, 0.01), (1500, 0.03)] * 200)
    assert reads.s_per_further_token == pytest.approx(0.02 / 1300, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 10**4)), max_size=80))
def test_whatever_is_measured_the_time_is_within_its_bounds(prompts: list[tuple[int, float]]) -> None:
    reads = times(prompts)
    mean = reads.s_per_token
    assert mean >= 0
    assert LEAST_SLOPE * mean <= reads.s_per_further_token <= mean
