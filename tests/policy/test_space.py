"""The reserve of critical calls: tables and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.policy.space import EVERY_S, LEAST, MOST, STEP, Space


@pytest.mark.parametrize(
    ("uses", "share"),
    [
        ([], LEAST),
        ([76], LEAST + STEP),
        ([75], LEAST),
        ([76, 76], LEAST + 2 * STEP),
        ([76] * 20, MOST),
        ([76] * 20 + [40], MOST),
        ([76] * 20 + [39], MOST - STEP),
        ([76] * 20 + [0] * 20, LEAST),
        ([0], LEAST),
    ],
)
def test_the_share_follows_what_is_in_use(uses: list[int], share: float) -> None:
    space = Space(100)
    for number, used in enumerate(uses):
        space.adapt(number * EVERY_S, used)
    assert space.share == pytest.approx(share)


def test_it_changes_once_a_second_at_most() -> None:
    space = Space(100)
    for ms in range(2500):
        space.adapt(ms / 1000, 100)
    assert space.share == pytest.approx(LEAST + 3 * STEP)


@pytest.mark.parametrize(("critical", "reserved"), [(0, 5), (3, 2), (5, 0), (50, 0)])
def test_what_critical_calls_have_is_their_part_of_it(critical: int, reserved: int) -> None:
    assert Space(100).reserved(critical) == reserved


@pytest.mark.parametrize("most", [0.0, 0.02])
def test_a_small_limit_holds(most: float) -> None:
    space = Space(1000, most)
    for second in range(9):
        space.adapt(float(second), 1000 if second < 5 else 0)
        assert space.share == most
    assert space.reserved(0) == 1000 * most


@given(
    st.integers(0, 10_000),
    st.floats(0, 0.9),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 20_000))),
    st.integers(0, 20_000),
)
def test_whatever_is_in_use_the_reserve_is_within_its_bounds(
    pool: int, most: float, uses: list[tuple[float, int]], critical: int
) -> None:
    space = Space(pool, most)
    for now_s, used in uses:
        space.adapt(now_s, used)
        assert min(LEAST, most) <= space.share <= max(most, 0.0)
        assert 0 <= space.reserved(critical) <= most * pool
