"""Whether a limit gives what was expected of it: what is counted, and for how long it is believed."""

from math import exp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.limit_check import FADE_S, LEAST, LimitCheck


def counted(
    rate: float,
    expected: float,
    seconds: float = 60.0,
    firsts: int = 0,
    first_s: float = 0.0,
    without: float | None = None,
) -> LimitCheck:
    """After so long with `rate` turns per second; `firsts`: one in so many is a first call; `without`: what is expected without
    a limit, as much as with one where it is not given."""
    check, done = LimitCheck(), 0
    for step in range(int(seconds * 4)):
        now = step / 4
        check.expects(now, expected, expected if without is None else without, 1.0)
        while done < rate * now:
            done += 1
            first = bool(firsts) and done % firsts == 0
            check.answered(first, first_s if first else 0.02)
    return check


@pytest.mark.parametrize(
    ("rate", "expected", "share"),
    [(5.0, 5.0, 1.0), (8.0, 5.0, 1.0), (1.5, 3.6, 1.5 / 3.6), (0.5, 10.0, LEAST)],
    ids=["as expected", "more", "less", "much less"],
)
def test_the_share_of_what_was_expected(rate: float, expected: float, share: float) -> None:
    check = counted(rate, expected)
    assert check.share(max(check.found_s, 0.0)) == pytest.approx(share, rel=0.07)


def test_what_is_only_thought_too_large_is_left_to_the_model() -> None:
    """Half of what was expected, and still more than would come without a limit; or nearly as much."""
    assert counted(5.0, 10.0, without=4.0).share(60.0) == 1.0
    assert counted(3.0, 10.0, without=5.0).share(60.0) == 1.0
    assert counted(2.0, 10.0, without=5.0).share(60.0) < 0.4


def test_nothing_is_said_after_a_few_turns() -> None:
    assert counted(1.5, 3.6, seconds=10.0).share(10.0) == 1.0
    assert counted(1.5, 3.6, seconds=20.0).share(20.0) < 0.6


def test_first_prompts_are_read_once() -> None:
    """One call in five is a first one that takes the engine for 1 s: four turns a second without that, and 2.2 with it."""
    assert counted(2.2, 4.0, firsts=5, first_s=1.0).share(60.0) == pytest.approx(0.98, rel=0.1)


def test_many_that_begin_say_nothing() -> None:
    assert counted(0.5, 10.0, seconds=200.0, firsts=2, first_s=1.0).share(200.0) == 1.0


def test_what_was_found_fades() -> None:
    check = counted(1.0, 5.0)
    found = check.share(check.found_s)
    assert found == LEAST
    assert check.share(check.found_s + FADE_S) == pytest.approx(1 - (1 - found) * exp(-1))
    assert check.share(1e9) == pytest.approx(1.0)


def test_while_nobody_waits_nothing_is_counted() -> None:
    """The limit did not bound what was given: asked again a minute later, the count begins anew."""
    check = LimitCheck()
    for step in range(12):
        check.expects(step / 4, 5.0, 5.0, 1.0)
    for _ in range(40):
        check.answered(False, 0.02)
    check.expects(60.0, 5.0, 5.0, 1.0)
    check.expects(60.25, 5.0, 5.0, 1.0)
    assert check.share(60.25) == 1.0


def test_no_time_is_no_rate() -> None:
    """Tools that take no time, and two decisions at one instant."""
    check = LimitCheck()
    for _ in range(2):
        check.expects(5.0, 1.0, 1.0, 0.0)
        for _ in range(40):
            check.answered(False, 0.0)
        check.expects(6.0, 1.0, 1.0, 0.0)
    assert check.share(6.0) == 1.0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 40), st.booleans(), st.floats(0, 10)), max_size=60),
    st.floats(0, 100),
    st.floats(0, 1000),
)
def test_it_is_always_a_share(steps: list[tuple[float, int, bool, float]], gap_s: float, rate: float) -> None:
    check, now = LimitCheck(), 0.0
    for took, turns, first, read_s in steps:
        now += took
        for _ in range(turns):
            check.answered(first, read_s)
        check.expects(now, rate, rate, gap_s)
        assert LEAST <= check.share(now) <= 1.0
