"""When programs come back, and whether they do."""

from collections import OrderedDict
from math import exp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.gaps import (
    BUCKETS,
    MIDDLES_S,
    NAMES,
    Gaps,
    OwnGaps,
    Returns,
    Share,
    bucket,
    kept,
)

FADE_GAPS, FADE_CALLS = exp(-1 / 64), exp(-1 / 32)


@pytest.mark.parametrize(
    ("gap_s", "expected"),
    [(0.0, 0), (-1.0, 0), (0.005, 0), (0.0051, 1), (0.0062, 1), (0.0063, 2), (0.0078, 2), (0.0079, 3), (1e9, 87)],
)
def test_buckets_grow_by_a_quarter(gap_s: float, expected: int) -> None:
    assert bucket(gap_s) == expected


def test_the_middle_of_a_bucket_is_in_it() -> None:
    assert len(MIDDLES_S) == BUCKETS == 88
    assert [bucket(middle) for middle in MIDDLES_S] == list(range(88))
    assert MIDDLES_S[1] == pytest.approx(0.005 * 1.25**0.5)


def gaps_of(*seen: float) -> Gaps:
    gaps = Gaps()
    for gap in seen:
        gaps.add(gap)
    return gaps


def test_no_gap_is_known_at_first() -> None:
    gaps = Gaps()
    assert (gaps.samples, gaps.mean_s, gaps.longer(1e6)) == (0.0, 0.0, 1.0)


def test_old_gaps_count_less() -> None:
    gaps = gaps_of(1.0, 10.0)
    assert gaps.samples == pytest.approx(1 + FADE_GAPS)
    one, ten = MIDDLES_S[bucket(1.0)], MIDDLES_S[bucket(10.0)]
    assert gaps.mean_s == pytest.approx((one * FADE_GAPS + ten) / (1 + FADE_GAPS))


def test_the_share_of_longer_gaps() -> None:
    gaps = gaps_of(1.0, 10.0)
    tail = 2.0 * exp(-3.0 / (4 * gaps.mean_s))
    assert gaps.longer(3.0) == pytest.approx((1.0 + tail) / (gaps.samples + 2.0))
    # Of a bucket half is taken for longer.
    tail = 2.0 * exp(-10.0 / (4 * gaps.mean_s))
    assert gaps.longer(10.0) == pytest.approx((0.5 + tail) / (gaps.samples + 2.0))
    assert gaps.longer(0.0) == pytest.approx(1.0)
    assert gaps.longer(100.0) < 0.01


def test_few_short_gaps_do_not_rule_out_longer_ones() -> None:
    """Sixteen tools took 50 ms. One that takes 0.2 s is no surprise, one of 5 s is; after a hundred 0.2 s is one too."""
    few, many = gaps_of(*[0.05] * 16), gaps_of(*[0.05] * 100)
    assert few.longer(0.3) > 0.06
    assert few.longer(1.0) == pytest.approx(2.0 * exp(-1.0) / (few.samples + 2.0))
    assert few.longer(5.0) < 0.03
    assert many.longer(0.3) < 0.03


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 1e4), min_size=1, max_size=50), st.floats(0, 1e4), st.floats(1.0, 10.0))
def test_fewer_gaps_are_longer_than_a_longer_time(seen: list[float], elapsed: float, times: float) -> None:
    gaps = gaps_of(*seen)
    assert 0.0 <= gaps.longer(elapsed * times) <= gaps.longer(elapsed) <= 1.0


def test_equal_gaps_are_usual() -> None:
    assert gaps_of(*[2.0] * 20).samples > 17


@pytest.mark.parametrize("gap_s", [0.1, 30.0])
def test_six_strange_gaps_in_a_row_make_old_ones_count_little(gap_s: float) -> None:
    gaps = gaps_of(*[2.0] * 20)
    for _ in range(5):
        gaps.add(gap_s)
    before = gaps.samples
    gaps.add(gap_s)
    assert gaps.samples == pytest.approx(before * FADE_GAPS * 0.1 + 1.0)
    assert before > 20
    # Counting begins anew.
    for _ in range(3):
        gaps.add(gap_s)
    assert gaps.samples > 4.5


def test_strange_gaps_of_both_kinds_are_a_wide_distribution() -> None:
    gaps = gaps_of(*[2.0] * 20)
    for _ in range(3):
        gaps.add(0.1)
        gaps.add(30.0)
    assert gaps.samples > 20


def test_a_usual_gap_ends_the_row() -> None:
    gaps = gaps_of(*[4.0, 1.0, 2.0] * 12)
    for _ in range(5):
        gaps.add(100.0)
    gaps.add(2.0)
    gaps.add(100.0)
    assert gaps.samples > 28


def test_a_program_of_its_own_pace() -> None:
    own = OwnGaps()
    assert own.longer(1.0, 0.7) == pytest.approx(0.7)
    own.add(2.0)
    own.add(1.0)
    assert own.longer(1.0, 0.7) == pytest.approx((1 + 4 * 0.7) / 6)
    for _ in range(8):
        own.add(0.5)
    assert own.longer(1.0, 0.0) == 0.0
    assert own.longer(0.4, 0.0) == pytest.approx(8 / 12)


def test_a_share_with_its_prior() -> None:
    share = Share()
    assert share.estimate(0.3, 2.0) == pytest.approx(0.3)
    share.add(True)
    share.add(False)
    assert share.samples == pytest.approx(1 + FADE_CALLS)
    assert share.estimate(0.25, 2.0) == pytest.approx((FADE_CALLS + 0.5) / (3 + FADE_CALLS))
    share.revise()
    assert share.estimate(0.0, 0.0) == pytest.approx(1.0)


def test_three_returns_where_there_were_none_change_the_share() -> None:
    share = Share()
    for _ in range(20):
        share.add(False)
    share.add(True)
    share.add(True)
    before = share.samples
    assert before > 14
    share.add(True)
    assert share.samples == pytest.approx(before * FADE_CALLS * 0.1 + 1)
    assert share.estimate(0.5, 1.0) > 0.35


def test_three_that_are_gone_where_all_came_back_change_the_share() -> None:
    share = Share()
    for _ in range(20):
        share.add(True)
    share.add(False)
    share.add(False)
    assert share.samples > 14
    share.add(False)
    assert share.samples < 3
    # The run begins anew.
    share.add(False)
    assert share.samples > 3


def test_a_late_return_ends_a_run() -> None:
    share = Share()
    for _ in range(20):
        share.add(True)
    for _ in range(6):
        share.add(False)
        share.revise()
    assert share.samples > 17
    assert share.estimate(0.5, 1.0) > 0.95


def test_a_late_return_is_one() -> None:
    share = Share()
    for so in (False, False, True):
        share.add(so)
    share.revise()
    assert share.estimate(0.0, 0.0) == pytest.approx(2 / share.samples)


def test_results_that_alternate_change_nothing() -> None:
    share = Share()
    for _ in range(20):
        share.add(True)
        share.add(False)
    assert share.samples > 22
    assert share.estimate(0.5, 0.0) == pytest.approx(0.5, abs=0.02)


def test_runs_of_six_where_it_was_half_are_chance() -> None:
    share = Share()
    for so in [True, False] * 16 + [True] * 6:
        share.add(so)
    assert share.samples > 20


FIRST = (True, 1)


def test_nothing_returns_until_a_return_was_seen() -> None:
    returns = Returns()
    returns.gone(FIRST, None)
    assert returns.probability(FIRST, None) == returns.overall() == returns.begins(True) == 0.0
    assert returns.longer(None, 5.0) == 1.0
    assert returns.seen(FIRST) == 1.0
    assert returns.seen((True, 2)) == 0.0


def test_one_return_is_enough_to_begin() -> None:
    returns = Returns()
    returns.returned(FIRST, None, 1.0, revised=False)
    assert returns.begins(True) == pytest.approx(1 / 1.5)
    assert returns.begins(False) == 0.0
    assert returns.overall() == pytest.approx(1.5 / 2)
    assert returns.probability(FIRST, None) == pytest.approx((1 + 0.5 * 0.75) / 1.5)
    assert returns.probability((True, 2), None) == pytest.approx(0.75)


def test_what_is_known_of_a_turn() -> None:
    returns = Returns()
    returns.returned(FIRST, None, 1.0, revised=False)
    returns.gone((True, 2), None)
    overall = returns.overall()
    assert overall == pytest.approx((FADE_CALLS + 0.5) / (2 + FADE_CALLS))
    assert returns.probability((True, 2), None) == pytest.approx(0.5 * overall / 1.5)
    assert returns.at_most((True, 2)) == pytest.approx(0.5)
    assert returns.at_most(FIRST) == pytest.approx(1.0)
    assert returns.at_most((True, 3)) == pytest.approx((FADE_CALLS + 1) / (2 + FADE_CALLS))


def test_what_is_known_of_a_tool() -> None:
    returns = Returns()
    returns.returned(FIRST, "search", 1.0, revised=False)
    returns.gone(FIRST, "search")
    returns.returned(FIRST, None, 100.0, revised=False)
    others = returns.gaps.longer(10.0)
    assert returns.longer(None, 10.0) == returns.longer("unknown", 10.0) == pytest.approx(others)
    alone = gaps_of(1.0)
    assert returns.longer("search", 10.0) == pytest.approx((alone.longer(10.0) + 4 * others) / 5)
    of_turn = returns.probability(FIRST, "unknown")
    assert returns.probability(FIRST, "search") == pytest.approx((FADE_CALLS + 4 * of_turn) / (1 + FADE_CALLS + 4))


def test_who_comes_back_late_had_not_gone() -> None:
    returns = Returns()
    returns.gone(FIRST, "search")
    returns.returned(FIRST, "search", 9.0, revised=True)
    assert returns.overall() == pytest.approx(1.5 / 2)
    assert returns.seen(FIRST) == 1.0
    assert returns.gaps.samples == 1.0
    assert returns.probability(FIRST, "search") > 0.9


def test_the_longest_unused_entry_goes() -> None:
    table: OrderedDict[int, str] = OrderedDict()
    for key in range(NAMES):
        kept(table, key, lambda: "made")
    kept(table, 0, lambda: "again")
    kept(table, NAMES, lambda: "new")
    assert len(table) == NAMES
    assert table[0] == "made"
    assert table[NAMES] == "new"
    assert 1 not in table
