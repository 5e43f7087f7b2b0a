"""Who is kept: tables and properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.gaps import Returns
from vllm_agentserve.policy.retention import Retention


def returning(gap_s: float = 1.0, number: int = 30) -> Returns:
    """Programs came back after each of their first turns."""
    returns = Returns()
    for _ in range(number):
        for turn in (1, 2, 3):
            returns.returned((True, turn), None, gap_s, revised=False)
    return returns


def turn(retention: Retention, name: str, now_s: float, blocks: int, **end: object) -> tuple[bool, list[str]]:
    """A call that comes and ends at once."""
    retention.arrive(name, now_s)
    return retention.end(name, now_s, blocks, **end)  # type: ignore[arg-type]


def kept(retention: Retention) -> list[str]:
    return [name for name in "abcdefgh" if name in retention]


def test_nobody_is_kept_until_somebody_came_back() -> None:
    retention = Retention(100)
    assert turn(retention, "a", 0.0, 10) == (False, [])
    assert turn(retention, "b", 0.0, 10) == (False, [])
    assert turn(retention, "a", 1.0, 10) == (True, [])
    assert retention.blocks == 10


@pytest.mark.parametrize(
    ("blocks", "stays"),
    [
        # As they come, as far as they fit into three quarters of the pool; who was first stays.
        ([25, 25, 25, 25], "abc"),
        ([50, 50, 25, 10], "ac"),
        ([76, 10], "b"),
        ([75, 1], "a"),
    ],
)
def test_who_came_first_is_kept(blocks: list[int], stays: str) -> None:
    retention = Retention(100, returning())
    for name, number in zip("abcd", blocks, strict=False):
        turn(retention, name, 0.0, number)
    assert "".join(kept(retention)) == stays


def test_who_is_kept_stays_so_from_turn_to_turn() -> None:
    """Sixteen programs in turns over a pool for six: the same six find everything each time."""
    retention = Retention(80, returning())
    rounds = []
    for number in range(5):
        for index in range(16):
            turn(retention, f"{index}", number + index / 16, 10)
        rounds.append([f"{index}" in retention for index in range(16)])
    assert rounds == [[True] * 6 + [False] * 10] * 5


def test_when_they_outgrow_the_room_the_last_to_be_kept_goes() -> None:
    retention = Retention(100, returning())
    for name in "abc":
        turn(retention, name, 0.0, 25)
    assert turn(retention, "a", 1.0, 30) == (True, ["c"])
    assert turn(retention, "b", 1.0, 50) == (False, [])
    assert kept(retention) == ["a"]
    assert retention.blocks == 30


def test_who_runs_or_waits_keeps_its_room() -> None:
    retention = Retention(100, returning())
    for name in "abc":
        turn(retention, name, 0.0, 25)
    retention.arrive("c", 0.5)
    assert turn(retention, "a", 1.0, 30) == (True, ["b"])
    assert kept(retention) == ["a", "c"]


def with_tools() -> Retention:
    """Room for 100 blocks; after tool `slow` programs came back 30 s later, after `fast` 0.1 s."""
    returns = returning()
    for _ in range(30):
        returns.returned((True, 1), "slow", 30.0, revised=False)
        returns.returned((True, 1), "fast", 0.1, revised=False)
    return Retention(100, returns)


def test_who_comes_back_much_sooner_takes_the_room() -> None:
    retention = with_tools()
    turn(retention, "a", 0.0, 40, tool="slow")
    turn(retention, "b", 0.0, 30, tool="fast")
    assert turn(retention, "c", 0.0, 40, tool="fast") == (True, ["a"])
    assert turn(retention, "d", 0.0, 40, tool="fast") == (False, [])


def test_a_critical_program_takes_the_room_of_others_and_gives_them_none() -> None:
    retention = with_tools()
    for name in "ab":
        turn(retention, name, 0.0, 35, tool="fast")
    critical(retention, "c", 30, tool="slow")
    assert kept(retention) == ["a", "c"]
    assert turn(retention, "d", 0.0, 35, tool="fast") == (False, [])
    assert retention.first_out(["a", "c"]) == "a"
    critical(retention, "e", 40, tool="slow")
    assert kept(retention) == ["c", "e"]
    # Of critical ones, who was kept first stays.
    critical(retention, "f", 40, tool="slow")
    assert kept(retention) == ["c", "e"]
    assert (retention.away_blocks((), None), retention.away_blocks((), "c", critical=True)) == (70, 40)
    assert retention.critical_blocks == 70
    assert retention.faults() == []


def critical(retention: Retention, name: str, blocks: int, **end: object) -> None:
    """A critical call that comes and ends at once."""
    retention.arrive(name, 0.0, critical=True)
    retention.end(name, 0.0, blocks, **end)  # type: ignore[arg-type]


def test_the_latest_call_says_whether_a_program_is_critical() -> None:
    retention = Retention(100, returning(), only_critical=True)
    assert turn(retention, "a", 0.0, 10) == (False, [])
    critical(retention, "b", 10)
    assert kept(retention) == ["b"]
    assert turn(retention, "b", 0.0, 12) == (False, [])
    assert (kept(retention), retention.critical_blocks) == ([], 0)
    assert retention.faults() == []


def test_what_is_learned_of_others_holds_for_critical_programs() -> None:
    retention = Retention(100, only_critical=True)
    for second in range(4):
        turn(retention, "a", float(second), 10)
    retention.arrive("b", 4.0, critical=True)
    assert retention.end("b", 4.0, 10) == (True, [])


def test_a_large_program_does_not_push_out_others_in_vain() -> None:
    retention = with_tools()
    turn(retention, "a", 0.0, 40, tool="fast")
    turn(retention, "b", 0.0, 30, tool="slow")
    assert turn(retention, "c", 0.0, 60, tool="fast") == (False, [])
    assert kept(retention) == ["a", "b"]


def test_the_last_call_lets_go() -> None:
    retention = Retention(100, returning())
    turn(retention, "a", 0.0, 10)
    assert turn(retention, "a", 1.0, 12, last=True) == (False, [])
    assert turn(retention, "b", 1.0, 10, can_return=False) == (False, [])
    assert retention.blocks == 0


def test_who_stays_away_for_longer_than_others_is_let_go() -> None:
    retention = Retention(100, returning(1.0))
    turn(retention, "a", 0.0, 10)
    turn(retention, "b", 0.0, 10)
    retention.arrive("b", 1.0)
    assert retention.expire(1.2) == []
    assert retention.expire(60.0) == ["a"]
    assert retention.expire(1000.0) == []
    assert kept(retention) == ["b"]
    retention.abort("b", 1000.0)
    assert retention.expire(1001.2) == []
    assert retention.expire(1060.0) == ["b"]


def test_programs_of_one_call_are_learned_not_to_return() -> None:
    retention = Retention(100)
    for number in range(10):
        turn(retention, "a", float(number), 10)
    for number in range(200):
        now = 10.0 + number
        retention.arrive(f"one-shot {number}", now, named=False)
        assert retention.end(f"one-shot {number}", now, 10) == (False, []), number
        turn(retention, "a", now, 10)
    assert kept(retention) == ["a"]


def test_returns_that_others_learn_are_only_read() -> None:
    returns = returning()
    before = returns.gaps.samples
    retention = Retention(100, returns)
    turn(retention, "a", 0.0, 10)
    turn(retention, "a", 1.0, 10, last=True)
    retention.expire(1e6)
    assert returns.gaps.samples == before


def test_whose_blocks_go_first() -> None:
    """Those of who is expected back last; of those that wait only when nobody else has any."""
    retention = Retention(1000, returning(10.0))
    for now, name in enumerate("abc"):
        turn(retention, name, float(now), 10)
    assert retention.first_out(["a", "b", "c"]) == "c"
    retention.arrive("c", 3.0)
    assert retention.first_out(["a", "b", "c"]) == "b"
    assert retention.first_out(["c"]) == "c"
    assert retention.first_out(["a", "unknown"]) == "unknown"


def test_blocks_that_were_lost_or_inherited() -> None:
    retention = Retention(100, returning())
    turn(retention, "a", 0.0, 10)
    retention.resize("a", -4)
    retention.resize("a", 2)
    assert retention.blocks == 8
    retention.resize("a", -50)
    assert retention.blocks == 0
    retention.resize("nobody", 5)
    retention.release("a")
    retention.release("a")
    assert retention.blocks == 0
    assert retention.faults() == []


def test_faults() -> None:
    retention = Retention(100, returning())
    turn(retention, "a", 0.0, 10)
    retention.blocks += 1
    del retention._programs["a"]
    assert retention.faults() == [
        "11 KV blocks are said to be kept, and programs have 10",
        "the program 'a' is kept, and not remembered",
    ]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "critical", "end", "last", "abort", "expire", "lost", "release"]),
        st.sampled_from("abcdefgh"),
        st.floats(0.0, 20.0),
        st.integers(0, 60),
    ),
    max_size=80,
)


def away(retention: Retention, running: set[str], but: str, critical: bool) -> int:
    """What `away_blocks` counts, program by program."""
    kept = [one for name, one in retention._kept.items() if name not in running and name != but]
    return sum(one.blocks for one in kept if one.critical or not critical)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.booleans())
def test_never_more_than_its_room_and_nobody_for_ever(events: list[tuple[str, str, float, int]], learns: bool) -> None:
    retention = Retention(100, None if learns else returning())
    now, calls = 0.0, dict.fromkeys("abcdefgh", 0)
    for kind, name, after_s, blocks in events:
        now += after_s
        if kind in ("arrive", "critical"):
            retention.arrive(name, now, critical=kind == "critical")
            calls[name] += 1
        elif kind in ("end", "last") and calls[name]:
            calls[name] -= 1
            keeps, gone = retention.end(name, now, blocks, last=kind == "last")
            assert keeps == (name in retention)
            assert not any(other in retention for other in gone)
            assert not (keeps and kind == "last")
        elif kind == "abort" and calls[name]:
            calls[name] -= 1
            retention.abort(name, now)
        elif kind == "expire":
            assert not any(other in retention for other in retention.expire(now))
        elif kind == "lost":
            retention.resize(name, -blocks)
        elif kind == "release":
            retention.release(name)
        assert 0 <= retention.blocks <= retention.room
        assert retention.faults() == []
        running = {other for other in calls if calls[other]}
        for critical in (False, True):
            assert retention.away_blocks(running, name, critical) == away(retention, running, name, critical)
    for name, number in calls.items():
        for _ in range(number):
            retention.abort(name, now)
    retention.expire(now + 1e7)
    assert len(retention) == 0
    assert retention.blocks == 0


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_agentserve.policy.expected_back.PROGRAMS_KEPT", 50)
    retention = Retention(100, returning())
    turn(retention, "a", 0.0, 10)
    for number in range(200):
        turn(retention, f"program {number}", 0.0, 1000)
    assert len(retention._programs) == 50
    assert "a" in retention
