"""Whose place may be taken, and that lost work stays below its share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.calls import NamedAccount
from vllm_agentserve.policy.preemption import HORIZON_MS, Rank, victim

I0, I1, I2, B0, B3 = Rank(False, 0), Rank(False, 1), Rank(False, 2), Rank(True, 0), Rank(True, 3)


@pytest.mark.parametrize(
    ("waiting", "running", "chosen"),
    [
        (I0, [], None),
        (I0, [(I0, "a")], None),
        (I1, [(I0, "a"), (I1, "b")], None),
        (I0, [(I1, "a"), (I2, "b"), (I1, "c")], "b"),
        (I0, [(I2, "a"), (I2, "b")], "b"),
        (I2, [(I0, "a"), (B0, "b")], "b"),
        (I0, [(B3, "a"), (B0, "b"), (I2, "c")], "a"),
        (B0, [(I2, "a")], None),
        (B0, [(I2, "a"), (B3, "b")], "b"),
    ],
)
def test_victims(waiting: Rank, running: list[tuple[Rank, str]], chosen: str | None) -> None:
    assert victim(waiting, running) == chosen


def test_an_account_is_settled_with_what_was_really_lost() -> None:
    account = NamedAccount(0.1)
    account.serve(1000.0)
    assert account.allows(100.0)
    assert not account.allows(100.1)
    account.preempt("a", 90.0)
    assert not account.allows(20.0)
    assert account.settle("a", 5.0)
    assert not account.settle("a", 5.0)
    assert account.lost_ms == 5.0
    assert account.allows(95.0)


@given(
    st.floats(0.01, 0.5),
    st.lists(st.tuples(st.integers(0, 5), st.floats(0.1, 500.0), st.floats(0.0, 1.0)), max_size=100),
)
def test_lost_work_stays_below_its_share(share: float, history: list[tuple[int, float, float]]) -> None:
    account = NamedAccount(share)
    out: dict[str, float] = {}
    for which, ms, part in history:
        call = f"c{which}"
        account.serve(ms)
        if call in out:
            account.settle(call, part * out.pop(call))
        elif account.allows(ms):
            account.preempt(call, ms)
            out[call] = ms
        assert account.lost_ms <= share * account.service_ms + 1e-9
    for call, ms in out.items():
        account.settle(call, ms)
    assert account.lost_ms <= share * account.service_ms + 1e-6


def test_accounts_of_several_calls_add_up() -> None:
    account = NamedAccount(0.5)
    account.serve(600.0)
    account.serve(400.0)
    assert account.service_ms == 1000.0
    account.preempt("a", 100.0)
    account.preempt("b", 150.0)
    assert ("a" in account, "c" in account) == (True, False)
    assert account.allows(250.0)
    assert not account.allows(250.1)
    account.settle("a", 30.0)
    assert account.allows(500.0 - 30.0 - 150.0)
    assert not account.allows(500.1 - 30.0 - 150.0)
    account.settle("b", 20.0)
    assert account.lost_ms == 50.0
    assert account._pending_ms == 0.0


def test_a_call_that_is_preempted_twice_is_charged_once_at_a_time() -> None:
    account = NamedAccount(0.5)
    account.serve(1000.0)
    account.preempt("a", 100.0)
    account.preempt("b", 50.0)
    account.preempt("a", 200.0)
    assert account.lost_ms == 0.0
    assert account.allows(250.0)
    assert not account.allows(250.1)


def test_what_was_not_lost_is_kept_for_a_while_only() -> None:
    """Ten hours in which nobody was preempted allow no more than five minutes do."""
    account = NamedAccount(0.1)
    account.serve(36_000_000.0)
    lost = 0
    while account.allows(2000.0):
        account.preempt("a", 2000.0)
        account.settle("a", 2000.0)
        lost += 1
    assert lost == 15 == 0.1 * HORIZON_MS / 2000.0
    account.serve(19_000.0)
    assert not account.allows(2000.0)
    account.serve(1001.0)
    assert account.allows(2000.0)


def test_what_is_pending_holds_its_part_of_what_may_be_lost() -> None:
    account = NamedAccount(0.5, horizon_ms=1000.0)
    account.serve(9000.0)
    account.preempt("a", 400.0)
    account.serve(9000.0)
    assert (account.allows(100.0), account.allows(100.1)) == (True, False)
    account.settle("a", 0.0)
    assert (account.allows(500.0), account.allows(500.1)) == (True, False)


@given(st.lists(st.tuples(st.floats(0.1, 300.0), st.floats(0.1, 100.0), st.booleans()), max_size=80), st.data())
def test_no_stretch_of_service_loses_more_than_its_share(
    history: list[tuple[float, float, bool]], data: st.DataObject
) -> None:
    """And that of the horizon, which is what the time before it may have left."""
    account = NamedAccount(0.2, horizon_ms=500.0)
    points = [(0.0, 0.0)]
    for served, worst, all_of_it in history:
        account.serve(served)
        if account.allows(worst):
            account.preempt("a", worst)
            account.settle("a", worst if all_of_it else worst / 3)
        points.append((account.service_ms, account.lost_ms))
    begin = data.draw(st.integers(0, len(points) - 1))
    for served, lost in points[begin:]:
        assert lost - points[begin][1] <= 0.2 * (served - points[begin][0] + 500.0) + 1e-6
