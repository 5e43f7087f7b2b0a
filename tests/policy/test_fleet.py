"""Engines: what they report, what happened since, and their bounds."""

import pytest

from vllm_agentserve.policy.fleet import REPEATED_S, EngineLoad, Fleet, Room, rank


def fleet(**residents: int) -> Fleet:
    """Engines a, b and c."""
    made = Fleet(lambda name: residents.get(name, 0), 1.5)
    made.set("cabb")
    return made


def test_engines_are_in_order() -> None:
    made = fleet()
    assert list(made) == ["a", "b", "c"]
    assert len(made) == 3
    assert "a" in made
    assert "d" not in made
    assert [made.next() for _ in range(4)] == ["b", "c", "a", "b"]


def test_calls_and_tokens_since_the_report() -> None:
    made = fleet(b=500)
    made.report("a", EngineLoad(2, 3, 100, 1000), 0.0)
    assert (made.calls("a"), made.tokens("a")) == (5, 100)
    made.sent("a", 30)
    made.sent("a", 20)
    assert (made.calls("a"), made.tokens("a")) == (7, 150)
    made.ended("a", 40)
    assert (made.calls("a"), made.tokens("a")) == (6, 110)
    made.ended("a", 40)
    assert (made.calls("a"), made.tokens("a")) == (5, 100)
    made.ended("a", 0)
    assert (made.calls("a"), made.tokens("a")) == (4, 100)
    made.ended("nobody", 0)
    # Conversations that live there count where they are more than what runs.
    assert made.tokens("b") == 500
    made.sent("b", 499)
    assert made.tokens("b") == 500
    made.sent("b", 2)
    assert made.tokens("b") == 501


def test_a_report_twice_is_one() -> None:
    made = fleet()
    made.report("a", EngineLoad(0, 0, 0, 0), 100.0)
    made.report("b", EngineLoad(1, 0, 0, 0), 100.0)
    for name in "ab":
        made.sent(name, 0)
    made.report("a", EngineLoad(0, 0, 0, 0), 100.0 + REPEATED_S - 0.1)
    made.report("b", EngineLoad(2, 0, 0, 0), 100.0)
    assert (made.calls("a"), made.calls("b")) == (1, 2)
    made.report("a", EngineLoad(0, 0, 0, 0), 100.0 + REPEATED_S)
    assert made.calls("a") == 0


def test_a_first_report_counts_although_it_says_nothing() -> None:
    made = fleet()
    made.sent("a", 10)
    made.report("a", EngineLoad(0, 0, 0, 0), 0.0)
    assert (made.calls("a"), made.tokens("a")) == (0, 0)


def test_capacities_that_are_not_known_are_the_mean() -> None:
    made = fleet()
    assert [made.capacity(name) for name in "abc"] == [1.0, 1.0, 1.0]
    made.report("a", EngineLoad(0, 0, 0, 1), 0.0)
    assert [made.capacity(name) for name in "abc"] == [1, 1.0, 1.0]
    made.report("b", EngineLoad(0, 0, 0, 3), 0.0)
    made.report("c", EngineLoad(0, 0, 0, -7), 0.0)
    assert [made.capacity(name) for name in "abc"] == [1, 3, 2.0]


def test_bounds() -> None:
    made = fleet(a=100, b=200)
    made.report("a", EngineLoad(4, 1, 0, 1000), 0.0)
    made.report("b", EngineLoad(3, 0, 0, 2000), 0.0)
    made.report("c", EngineLoad(0, 0, 0, 1000), 0.0)
    assert made.room(60) == Room(1.5 * 9, 1.5 * 360, 4000)
    made.set("ac")
    assert made.room(0) == Room(1.5 * 6, 1.5 * 100, 2000)


@pytest.mark.parametrize(
    ("capacity", "most", "tokens", "expected"),
    [
        # Half of a known KV cache is always allowed, and never more than all of it.
        (1000, 0.125, 400, True),
        (1000, 0.125, 401, False),
        (1000, 0.75, 650, True),
        (1000, 0.75, 651, False),
        (1000, 1.25, 900, True),
        (1000, 1.25, 901, False),
        (0, 0.1, 0, False),
        (0, 105.0, 5, True),
        (0, 105.0, 6, False),
        (1, 200.0, 0, False),
    ],
)
def test_room_for_tokens(capacity: int, most: float, tokens: int, expected: bool) -> None:
    made = fleet(a=100)
    made.report("a", EngineLoad(0, 0, 0, capacity), 0.0)
    assert made.has_room("a", tokens, Room(9, 8 * most, 8)) is expected


@pytest.mark.parametrize(
    ("most", "calls", "tokens", "expected"),
    [
        (16, 7, 400, True),
        (16, 8, 400, False),
        (16, 7, 401, False),
        # Four are always allowed.
        (2, 3, 400, True),
        (2, 4, 400, False),
    ],
)
def test_within_both_bounds(most: float, calls: int, tokens: int, expected: bool) -> None:
    made = fleet(a=100)
    made.report("a", EngineLoad(calls, 0, 0, 1000), 0.0)
    assert made.is_within("a", tokens, Room(most, 200, 2000)) is expected


def test_a_share_of_calls_is_in_proportion_to_the_kv_cache() -> None:
    """5 calls on the half of b are as many as 10 on the whole."""
    made = fleet()
    made.set("ab")
    for a, expected in ((11, "b"), (9, "a")):
        made.report("a", EngineLoad(a, 0, 0, 2000), 0.0)
        made.report("b", EngineLoad(5, 0, 0, 1000), 0.0)
        assert made.roomiest("s", 0) == expected


def test_the_share_of_tokens_is_of_all_with_the_call() -> None:
    """10,000 and 0 tokens with 30,000 more: 40,000 is all there is, and the fair share 20,000."""
    made = Fleet(lambda name: 10_000 if name == "a" else 0, 5.0)
    made.set("ab")
    for name, calls in (("a", 1), ("b", 2)):
        made.report(name, EngineLoad(calls, 0, 0, 1_000_000), 0.0)
    # Shares of tokens 2.0 and 1.5; of calls, 0.5 and 1.0, which count half.
    assert made.roomiest("s", 30_000) == "b"
    made.report("b", EngineLoad(5, 0, 0, 1_000_000), 0.0)
    # Of calls 0.29 and 1.43: 2.14 against 2.21.
    assert made.roomiest("s", 30_000) == "a"


def test_ranks_differ_by_session_and_engine() -> None:
    ranks = {rank(session, engine) for session in ("", "a", "ab", "b") for engine in ("", "a", "ab", "b")}
    assert len(ranks) == 16
    assert all(0 <= one < 2**64 for one in ranks)


def test_the_roomiest_of_none_that_fit_is_the_one_with_most_room() -> None:
    made = fleet()
    for name, capacity in (("a", 100), ("b", 300), ("c", 1)):
        made.report(name, EngineLoad(0, 0, 0, capacity), 0.0)
    assert made.roomiest("s", 1000) == "b"
    # One token of KV cache is known, and too little.
    assert made.roomiest("s", 2) == "b"
