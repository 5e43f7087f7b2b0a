"""Turns per second of programs that think between their turns."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.turn_rate import TurnCost, hit_ratio, turns_per_second


@pytest.mark.parametrize(
    ("pressure", "expected"), [(0.0, 1.0), (1.0, 1.0), (1.3, 0.5), (1.45, 0.25), (1.6, 0.0), (4.0, 0.0)]
)
def test_hits_end_where_contexts_do_not_fit(pressure: float, expected: float) -> None:
    assert hit_ratio(pressure) == pytest.approx(expected)


def test_one_program_alone_waits_for_nobody() -> None:
    """A turn of 1 + 0.5 + 0.001 s; reading takes a thousandth of the engine."""
    turn = TurnCost(gap_s=1.0, decode_s=0.5, read_s=0.001, again_s=0.0)
    assert turns_per_second(1, turn, 1.0) == pytest.approx(1 / 1.501, rel=0.001)


def test_many_programs_read_all_the_time() -> None:
    turn = TurnCost(gap_s=1.0, decode_s=0.5, read_s=0.1, again_s=0.4)
    assert turns_per_second(10_000, turn, 1.0) == pytest.approx(10.0, rel=0.01)
    assert turns_per_second(10_000, turn, 0.0) == pytest.approx(2.0, rel=0.01)
    assert turns_per_second(10_000, turn, 0.5) == pytest.approx(1 / 0.3, rel=0.01)


def test_no_more_turns_run_than_contexts_fit() -> None:
    """With room for four: four turns of 0.5 s to read and 2 s to answer, which stands still while others read."""
    turn = TurnCost(gap_s=0.1, decode_s=2.0, read_s=0.1, again_s=0.4)
    assert turns_per_second(100, turn, 0.0, 4) == pytest.approx(4 / (2.5 + 4 * 0.5))
    assert turns_per_second(100, turn, 0.0, 400) > 1.9
    few = turns_per_second(2, turn, 1.0)
    assert turns_per_second(2, turn, 1.0, 2) == pytest.approx(few)


def test_nothing_to_read_is_no_error() -> None:
    assert turns_per_second(4, TurnCost(1.0, 1.0, 0.0, 0.0), 1.0) == pytest.approx(2.0)
    assert turns_per_second(4, TurnCost(0.0, 2.0, 0.0, 0.0), 1.0) == pytest.approx(2.0)


def test_answers_take_longer_beside_others() -> None:
    """Sixteen programs without gaps that read next to nothing all decode at once; two that are mostly away hardly ever do."""
    turn = TurnCost(gap_s=0.0, decode_s=0.3, read_s=0.0, again_s=0.0, beside_s=0.02)
    assert turns_per_second(16, turn, 1.0) == pytest.approx(16 / (0.3 + 15 * 0.02), rel=0.001)
    seldom = replace(turn, gap_s=30.0)
    assert turns_per_second(2, seldom, 1.0) == pytest.approx(2 / 30.3, rel=0.001)


def test_fewer_that_find_their_contexts_decode_faster() -> None:
    """What sixteen programs take that find nothing says little of eight that find everything."""
    turn = TurnCost(gap_s=1.0, decode_s=0.32, read_s=0.02, again_s=0.114, beside_s=0.037)
    as_measured = replace(turn, decode_s=0.32 + 5 * 0.037, beside_s=0.0)
    assert turns_per_second(16, turn, 0.0, 8) == pytest.approx(turns_per_second(16, as_measured, 0.0, 8), rel=0.02)
    assert turns_per_second(8, turn, 1.0) > 1.07 * turns_per_second(8, as_measured, 1.0)


@settings(deadline=None)
@given(
    st.floats(0.5, 500), st.floats(0, 30), st.floats(0.01, 5), st.floats(0.001, 1), st.floats(0, 1), st.floats(1, 100)
)
def test_what_others_take_makes_no_rate_larger(
    programs: float, gap: float, decode: float, read: float, beside: float, room: float
) -> None:
    turn = TurnCost(gap, decode, read, 0.0, beside_s=beside)
    rate = turns_per_second(programs, turn, 1.0, room)
    assert 0 < rate <= turns_per_second(programs, replace(turn, beside_s=0.0), 1.0, room) * (1 + 1e-9)


@settings(deadline=None)
@given(
    st.floats(0.5, 500), st.floats(0, 30), st.floats(0.01, 5), st.floats(0.001, 1), st.floats(0, 10), st.floats(0, 1)
)
def test_littles_law(programs: float, gap: float, decode: float, read: float, again: float, hits: float) -> None:
    rate = turns_per_second(programs, TurnCost(gap, decode, read, again), hits)
    busy = rate * (read + (1 - hits) * again)
    assert 0 < busy < 1
    there = rate * gap + rate * (read + (1 - hits) * again + decode) / (1 - busy)
    assert there == pytest.approx(programs, rel=1e-3)
