"""Where conversations live: which are counted, which are forgotten, and how many there are at most."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_agentserve.policy.pins import AT_ONCE, GAPS_BETWEEN, LONGEST_AWAY_S, Pins


def pins(pin_seconds: float = 1000.0, max_pins: int = 100) -> Pins:
    return Pins(pin_seconds, max_pins)


def turn(table: Pins, session: str, now: float, tokens: int = 100, engine: str = "a", took: float = 0.0) -> None:
    """A call that comes and ends."""
    table.pin(session, engine, tokens, now)
    table.ended(session, engine, tokens, now + took)


def test_tokens_follow_their_conversation() -> None:
    table = pins()
    table.pin("s", "a", 100, 0.0)
    table.pin("t", "a", 50, 0.0)
    table.pin("u", "b", 7, 0.0)
    assert (table.tokens("a"), table.tokens("b"), table.tokens("c")) == (150, 7, 0)
    table.ended("s", "a", 130, 1.0)
    assert table.tokens("a") == 180
    # A shorter prompt does not make a context shorter, but what its end says does.
    table.pin("s", "a", 10, 2.0)
    assert table.tokens("a") == 180
    table.ended("s", "a", 20, 3.0)
    assert table.tokens("a") == 70
    table.pin("s", "b", 30, 4.0)
    assert (table.tokens("a"), table.tokens("b")) == (50, 37)
    table.ended("s", "a", 999, 5.0)
    table.ended("nobody", "a", 999, 5.0)
    assert (table.tokens("a"), table.tokens("b")) == (50, 37)
    table.forget("s")
    table.forget("s")
    assert (table.tokens("a"), table.tokens("b")) == (50, 7)
    assert dict(table) == {"t": "a", "u": "b"}


def test_it_is_a_mapping() -> None:
    table = pins()
    turn(table, "s", 0.0)
    turn(table, "s", 1.0)
    turn(table, "t", 1.0, engine="b")
    assert sorted(table) == ["s", "t"]
    assert len(table) == 2
    assert table["t"] == "b"
    with pytest.raises(KeyError, match="u"):
        table["u"]


def test_pins_expire_by_their_last_use() -> None:
    table = pins(pin_seconds=10.0)
    turn(table, "s", 0.0)
    turn(table, "t", 0.0)
    table.pin("t", "a", 100, 5.0)
    table.expire(10.0)
    assert sorted(table) == ["s", "t"]
    table.expire(10.5)
    assert sorted(table) == ["t"]
    table.ended("t", "a", 100, 12.0)
    table.expire(22.0)
    assert sorted(table) == ["t"]
    table.expire(22.5)
    assert sorted(table) == []
    assert table.tokens("a") == 0


def test_one_that_expired_is_found_before_its_turn_to_go() -> None:
    table = pins(pin_seconds=10.0)
    turn(table, "s", 0.0)
    table.drop_expired("s", 10.0)
    assert "s" in table
    table.drop_expired("s", 10.5)
    assert "s" not in table
    table.drop_expired("s", 10.5)


def test_only_a_part_is_forgotten_at_once() -> None:
    table = pins(pin_seconds=10.0, max_pins=1000)
    for number in range(3 * AT_ONCE):
        turn(table, f"s{number}", 0.0)
        if number % 3 == 0:
            turn(table, f"s{number}", 0.0)
    assert len(table) == 3 * AT_ONCE
    table.expire(20.0)
    assert len(table) == AT_ONCE
    table.expire(20.0)
    assert len(table) == 0


def test_many_that_are_away_are_uncounted_a_part_at_a_time() -> None:
    table = pins(pin_seconds=10_000.0, max_pins=1000)
    for number in range(2 * AT_ONCE):
        turn(table, f"s{number}", 0.0, tokens=1)
    table.expire(LONGEST_AWAY_S)
    assert table.tokens("a") == 2 * AT_ONCE
    table.expire(LONGEST_AWAY_S + 1)
    assert table.tokens("a") == AT_ONCE
    table.expire(LONGEST_AWAY_S + 1)
    assert table.tokens("a") == 0
    assert len(table) == 2 * AT_ONCE
    table.expire(LONGEST_AWAY_S + 1)


def test_who_is_away_for_long_is_not_counted_but_keeps_its_pin() -> None:
    table = pins(pin_seconds=5000.0)
    turn(table, "s", 0.0)
    table.pin("t", "a", 30, 0.0)
    table.expire(LONGEST_AWAY_S + 1)
    # A call that takes long counts.
    assert table.tokens("a") == 30
    table.expire(LONGEST_AWAY_S + 1)
    assert table.tokens("a") == 30
    assert table["s"] == "a"
    table.ended("t", "a", 40, 1000.0)
    assert table.tokens("a") == 40
    # Who comes back counts again, and once.
    table.pin("s", "a", 120, 1001.0)
    assert table.tokens("a") == 160
    table.ended("s", "a", 130, 1002.0)
    assert table.tokens("a") == 170
    table.expire(1003.0 + LONGEST_AWAY_S)
    assert table.tokens("a") == 0
    table.forget("s")
    assert table.tokens("a") == 0


def test_how_long_is_learned_from_gaps() -> None:
    table = pins(pin_seconds=5000.0)
    assert table.away_s == LONGEST_AWAY_S
    now = 0.0
    for number in range(GAPS_BETWEEN):
        assert table.away_s == LONGEST_AWAY_S
        turn(table, f"s{number}", now)
        turn(table, f"s{number}", now + 1.0, took=0.5)
        now += 2.0
    assert 2.0 < table.away_s < 30.0
    after = table.away_s
    for number in range(100):
        turn(table, f"t{number}", now)
        turn(table, f"t{number}", now + 1.0)
        now += 2.0
    assert 1.0 < table.away_s <= after
    table.expire(now + table.away_s - 0.9)
    counted = table.tokens("a")
    assert counted
    table.expire(now + table.away_s)
    table.expire(now + table.away_s)
    assert table.tokens("a") == 0


def test_calls_side_by_side_are_no_gaps() -> None:
    table = pins()
    for number in range(3 * GAPS_BETWEEN):
        table.pin("s", "a", 10, number * 0.01)
    assert table.away_s == LONGEST_AWAY_S
    for _ in range(3 * GAPS_BETWEEN - 1):
        table.ended("s", "a", 10, 1.0)
    table.pin("s", "a", 10, 2.0)
    assert table.away_s == LONGEST_AWAY_S
    table.expire(LONGEST_AWAY_S + 3.0)
    assert table.tokens("a") == 10


def test_calls_that_a_dead_engine_had_do_not_run_for_ever() -> None:
    table = pins()
    table.pin("s", "a", 10, 0.0)
    table.pin("s", "b", 10, 1.0)
    table.ended("s", "b", 20, 2.0)
    table.expire(LONGEST_AWAY_S + 3.0)
    assert table.tokens("b") == 0


def test_more_ends_than_calls_do_no_harm() -> None:
    table = pins()
    turn(table, "s", 0.0)
    table.ended("s", "a", 100, 0.0)
    table.pin("s", "a", 100, 1.0)
    table.expire(LONGEST_AWAY_S + 2.0)
    assert table.tokens("a") == 100


def test_a_short_time_to_expire_is_the_longest_to_be_away() -> None:
    table = pins(pin_seconds=2.0)
    assert table.away_s == 2.0
    now = 0.0
    for _ in range(GAPS_BETWEEN):
        turn(table, "s", now)
        now += 1.9
    assert table.away_s == 2.0


def test_gaps_longer_than_the_longest_change_nothing() -> None:
    table = pins(pin_seconds=1e6)
    now = 0.0
    for _ in range(2 * GAPS_BETWEEN):
        turn(table, "s", now)
        now += 2000.0
    assert table.away_s == LONGEST_AWAY_S


def test_a_million_sessions_leave_those_that_return() -> None:
    table = pins(max_pins=400)
    for number in range(400):
        turn(table, f"agent-{number}", 0.0, tokens=1)
        turn(table, f"agent-{number}", 0.1, tokens=1)
    for number in range(100_000):
        table.pin(f"hostile-{number}", "a", 1, 1.0)
    assert len(table) == 400
    assert sum(f"agent-{number}" in table for number in range(400)) == 300
    assert all(f"agent-{number}" in table for number in range(100, 400))
    assert all(f"hostile-{number}" in table for number in range(99_900, 100_000))
    assert table.tokens("a") == 400


def test_without_others_new_sessions_take_the_whole_table() -> None:
    table = pins(max_pins=8)
    for number in range(20):
        table.pin(f"s{number}", "a", 1, float(number))
    assert sorted(table) == sorted(f"s{number}" for number in range(12, 20))
    assert table.tokens("a") == 8


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5])
def test_small_tables_hold_the_last_one(most: int) -> None:
    table = pins(max_pins=most)
    for number in range(10):
        turn(table, f"s{number}", number)
        turn(table, f"s{number}", number)
        assert f"s{number}" in table
        assert len(table) <= most
    table.pin("new", "a", 1, 20.0)
    assert "new" in table
    assert len(table) == most


@pytest.mark.parametrize(("ends", "counted"), [(0, 100), (1, 100), (2, 100), (3, 0)])
def test_a_conversation_counts_while_one_of_its_calls_runs(ends: int, counted: int) -> None:
    table = pins()
    for _ in range(3):
        table.pin("s", "a", 100, 0.0)
    for _ in range(ends):
        table.ended("s", "a", 100, 1.0)
    table.expire(LONGEST_AWAY_S + 2.0)
    assert table.tokens("a") == counted


def test_those_away_are_uncounted_behind_a_call_that_takes_long() -> None:
    table = pins()
    table.pin("runs", "a", 1, 0.0)
    turn(table, "away", 0.0, tokens=10)
    turn(table, "here", 50.0, tokens=100)
    table.expire(LONGEST_AWAY_S + 1.0)
    assert table.tokens("a") == 101


def test_one_call_conversations_have_a_quarter_of_a_full_table() -> None:
    table = pins(max_pins=20)
    for number in range(20):
        turn(table, f"agent-{number}", 0.0)
        turn(table, f"agent-{number}", 0.1)
    for number in range(9):
        table.pin(f"new-{number}", "a", 1, 1.0)
        assert sum(name.startswith("new") for name in table) == min(number + 1, 5)
        assert len(table) == 20


def test_of_a_small_table_one_place_is_for_one_call_conversations() -> None:
    table = pins(max_pins=4)
    for name in "abcd":
        turn(table, name, 0.0)
        turn(table, name, 0.1)
    table.pin("x", "a", 1, 1.0)
    table.pin("y", "a", 1, 1.0)
    assert sorted(table) == ["b", "c", "d", "y"]


def test_a_table_of_conversations_of_one_call_expires_too() -> None:
    table = pins(pin_seconds=10.0)
    table.pin("new", "a", 1, 0.0)
    turn(table, "old", 0.0)
    turn(table, "old", 5.0)
    table.expire(12.0)
    assert sorted(table) == ["old"]
    table.expire(20.0)
    assert len(table) == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["pin", "pin", "ended", "ended", "forget", "expire", "drop"]),
        st.integers(0, 15),
        st.sampled_from("abc"),
        st.integers(0, 1000),
        st.sampled_from([0.0, 0.1, 1.0, 9.0, 700.0]),
    ),
    max_size=80,
)


@settings(deadline=None, max_examples=100)
@given(STEPS, st.integers(1, 12), st.sampled_from([5.0, 2000.0]))
def test_tokens_are_neither_lost_nor_counted_twice(
    steps: list[tuple[str, int, str, int, float]], most: int, pin_seconds: float
) -> None:
    table, now = pins(pin_seconds, most), 0.0
    for step, number, engine, tokens, later in steps:
        now += later
        name = f"s{number}"
        match step:
            case "pin":
                table.pin(name, engine, tokens, now)
                assert table[name] == engine
            case "ended":
                table.ended(name, engine, tokens, now)
            case "forget":
                table.forget(name)
                assert name not in table
            case "expire":
                table.expire(now)
            case "drop":
                table.drop_expired(name, now)
        assert len(table) == len(list(table)) <= most
        assert all(table.tokens(one) >= 0 for one in "abc")
        assert set(table.values()) >= {one for one in "abc" if table.tokens(one)}
    for name in list(table):
        table.forget(name)
    assert [table.tokens(one) for one in "abc"] == [0, 0, 0]
