"""Which engine a call goes to: tables and properties."""

from collections import Counter
from collections.abc import Sequence
from inspect import signature
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_agentserve.policy.fleet import Fleet, rendezvous
from vllm_agentserve.policy.gateway import LONGEST_NAME
from vllm_agentserve.policy.placement import (
    REASONS,
    SHORT_TOKENS,
    Decision,
    EngineLoad,
    NoEngineError,
    Placement,
    Policy,
)

PINNING = ("conserve", "autellix", "sticky")
LONG = SHORT_TOKENS + 1


def placement(policy: str = "conserve", engines: Sequence[str] = ("a", "b", "c"), **options: float) -> Placement:
    made = Placement(policy, **options)  # type: ignore[arg-type]
    made.engines(engines, 0.0)
    return made


def load(calls: int, kv_tokens: int = 0, capacity: int = 100_000) -> EngineLoad:
    return EngineLoad(calls, 0, kv_tokens, capacity)


def loads(made: Placement, now: float = 0.0, **calls: int) -> None:
    for engine, number in calls.items():
        made.report(engine, load(number), now)


# What every policy does.


@pytest.mark.parametrize("policy", get_args(Policy))
def test_without_engines_nothing_can_be_placed(policy: str) -> None:
    made = Placement(policy)
    with pytest.raises(NoEngineError, match=r"^no engine lives$"):
        made.place("s", 10, 0.0)
    made.engines(["a"], 0.0)
    assert made.place("s", 10, 0.0).engine == "a"
    made.engines([], 1.0)
    with pytest.raises(LookupError):
        made.place("s", 10, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "fastest"}, "policy = 'fastest' is not allowed: it must be one of conserve, autellix, round-robin"),
        ({"bound": 0.99}, "bound = 0.99 is not allowed: it must be a number from 1"),
        ({"bound": float("inf")}, "bound = inf is not allowed"),
        ({"bound": float("nan")}, "bound = nan is not allowed"),
        ({"pin_seconds": 0}, "pin_seconds = 0 is not allowed: it must be a number above 0"),
        ({"pin_seconds": float("inf")}, "pin_seconds = inf is not allowed"),
        ({"max_pins": 0}, "max_pins = 0 is not allowed: it must be a whole number from 1"),
    ],
)
def test_wrong_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=r"is not allowed") as caught:
        Placement(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(words)


def test_default_options() -> None:
    defaults = {name: one.default for name, one in signature(Placement).parameters.items()}
    assert defaults == {"policy": "conserve", "bound": 1.25, "pin_seconds": 3600.0, "max_pins": 65536}


def test_smallest_options() -> None:
    made = placement(bound=1, pin_seconds=0.001, max_pins=1)
    assert made.place("s", 10, 0.0).reason == "first"
    assert made.policy == "conserve"


def test_reasons_and_policies() -> None:
    assert REASONS == ("pinned", "first", "parent", "crowded", "moved", "short", "per-call")
    assert get_args(Policy) == ("conserve", "autellix", "round-robin", "least-loaded", "hash", "sticky")


# Policies that take every call by itself.


def test_round_robin_takes_engines_in_turn() -> None:
    made = placement("round-robin", "cab")
    engines = [made.place("s", 10, 0.0).engine for _ in range(6)]
    assert engines == ["b", "c", "a", "b", "c", "a"]
    assert made.place("s", 10, 0.0) == Decision("b", "per-call", None)
    assert len(made.pins) == 0
    assert made.resident_tokens("a") == 0


def test_least_loaded_counts_running_waiting_and_sent() -> None:
    made = placement("least-loaded")
    made.report("a", EngineLoad(1, 1, 0, 0), 0.0)
    made.report("b", EngineLoad(3, 0, 0, 0), 0.0)
    made.report("c", EngineLoad(0, 4, 0, 0), 0.0)
    # a has 2 calls, b 3, c 4.
    engines = [made.place(str(number), 10, 0.0).engine for number in range(6)]
    assert engines[0] == "a"
    assert sorted(engines) == ["a", "a", "a", "b", "b", "c"]
    made.finished("0", "c", 10, 1.0)
    made.finished("1", "c", 10, 1.0)
    assert made.place("x", 10, 1.0) == Decision("c", "per-call", None)


def test_a_report_replaces_what_was_counted() -> None:
    made = placement("least-loaded", "ab")
    loads(made, a=0, b=3)
    for number in range(3):
        assert made.place(str(number), 10, 0.0).engine == "a"
    loads(made, 5.0, a=0)
    assert [made.place(str(number), 10, 5.0).engine for number in range(3)] == ["a"] * 3
    loads(made, 6.0, a=9)
    assert made.place("s", 10, 6.0).engine == "b"


def test_a_report_that_is_handed_on_again_does_not_undo_what_was_counted() -> None:
    made = placement("least-loaded", "ab")
    loads(made, a=0, b=2)
    found = []
    for number in range(4):
        loads(made, 0.1 * number, a=0, b=2)
        found.append(made.place(str(number), 10, 0.1 * number).engine)
    assert sorted(found) == ["a", "a", "a", "b"]
    # After two seconds it must be a new one.
    loads(made, 1.9, a=0)
    assert made.place("s", 10, 1.9).engine == "b" or found.count("a") == 2
    loads(made, 2.0, a=0)
    assert made.place("s", 10, 2.0).engine == "a"


def test_calls_that_end_do_not_count_below_none() -> None:
    made = placement("least-loaded", "ab")
    for _ in range(5):
        made.finished("s", "a", 10, 0.0)
    loads(made, b=0)
    # Ends that no report knew of are forgotten with the next one.
    loads(made, a=1)
    assert made.place("s", 10, 0.0).engine == "b"


def test_late_reports_and_ends_of_dead_engines_are_ignored() -> None:
    made = placement("least-loaded", "ab")
    made.engines(["b"], 1.0)
    loads(made, 1.0, a=0)
    made.finished("s", "a", 10, 1.0)
    assert made.place("s", 10, 1.0).engine == "b"
    made.engines(["a", "b"], 2.0)
    assert [made.place("t", 10, 2.0).engine for _ in range(3)].count("a") >= 1


@pytest.mark.parametrize(
    ("policy", "tokens"),
    [("sticky", 10), ("least-loaded", 10), ("hash", 10), ("autellix", 10), ("autellix", LONG), ("conserve", 10)],
)
def test_of_equal_engines_it_is_the_sessions_by_hash(policy: str, tokens: int) -> None:
    engines = [f"engine-{number}" for number in range(4)]
    made = [placement(policy, engines) for _ in range(100)]
    found = [one.place(f"session-{number}", tokens, 0.0).engine for number, one in enumerate(made)]
    assert found == [rendezvous(f"session-{number}", engines) for number in range(100)]
    assert all(found.count(engine) > 10 for engine in engines)


def test_engines_that_stay_keep_what_is_known_of_them() -> None:
    made = placement("least-loaded", "ab")
    loads(made, a=5, b=3)
    made.place("s", 10, 0.0)
    made.engines("abc", 1.0)
    loads(made, 1.0, c=4)
    assert sorted(made.place(str(number), 10, 1.0).engine for number in range(5)) == ["a", "b", "b", "c", "c"]


def test_a_hash_moves_only_the_sessions_of_an_engine_that_goes() -> None:
    sessions = [f"session-{number}" for number in range(200)]
    made = placement("hash", "abcd")
    before = [made.place(session, 10, 0.0) for session in sessions]
    assert before == [Decision(one.engine, "per-call", None) for one in before]
    assert all(30 <= [one.engine for one in before].count(engine) <= 70 for engine in "abcd")
    made.engines("acd", 1.0)
    after = [made.place(session, 10, 1.0).engine for session in sessions]
    assert all(was.engine in (one, "b") for one, was in zip(after, before, strict=True))
    assert "b" not in after


def test_the_hash_is_the_same_everywhere() -> None:
    """In every process and version: ingresses have to agree."""
    assert [rendezvous(str(number), "abcd") for number in range(12)] == list(HASHED)
    assert rendezvous("\ud800", ["a", "\udfff"]) in ("a", "\udfff")


HASHED = "cbdabcdddcbd"


# Policies that pin.


@pytest.mark.parametrize("policy", PINNING)
def test_a_conversation_stays(policy: str) -> None:
    made = placement(policy)
    first = made.place("s", LONG, 0.0)
    assert first.reason == "first"
    assert first.moved_from is None
    made.finished("s", first.engine, LONG + 100, 1.0)
    for turn in range(1, 5):
        loads(made, float(turn), **{first.engine: 50})
        assert made.place("s", LONG + 200 * turn, turn + 0.5) == Decision(first.engine, "pinned", None)
        made.finished("s", first.engine, LONG + 200 * turn + 100, turn + 0.7)
    assert dict(made.pins) == {"s": first.engine}
    assert made.resident_tokens(first.engine) == LONG + 900


@pytest.mark.parametrize("policy", ["conserve", "sticky"])
def test_a_conversation_is_pinned_where_its_call_has_gone_unless_it_is_pinned(policy: str) -> None:
    made = placement(policy)
    for engine in "abc":
        assert made.place(f"to {engine}", 100, 0.0, known=engine) == Decision(engine, "pinned")
        assert made.pins[f"to {engine}"] == engine
    assert made.place("to a", 100, 1.0, known="b") == Decision("a", "pinned")
    assert made.place("to one that does not live", 100, 1.0, known="d").reason == "first"


@pytest.mark.parametrize("policy", PINNING)
def test_a_dead_engines_conversation_moves_once(policy: str) -> None:
    made = placement(policy, "ab")
    home = made.place("s", LONG, 0.0).engine
    other = "ab".replace(home, "")
    made.engines([other, "z"], 1.0)
    made.report(other, load(0, 0), 1.0)
    made.report("z", load(9, 90_000), 1.0)
    assert made.place("s", LONG, 1.0) == Decision(other, "moved", home)
    # Nothing counts twice, and the first engine's return moves nothing.
    assert (made.resident_tokens(home), made.resident_tokens(other)) == (0, LONG)
    made.engines("ab", 2.0)
    assert made.place("s", LONG, 2.0) == Decision(other, "pinned", None)
    # The call that was lost with the engine ends late.
    made.finished("s", home, LONG, 2.0)
    assert (made.resident_tokens(home), made.resident_tokens(other)) == (0, LONG)


@pytest.mark.parametrize("policy", PINNING)
def test_an_engine_that_is_back_before_the_next_turn_keeps_its_conversations(policy: str) -> None:
    made = placement(policy, "ab")
    home = made.place("s", LONG, 0.0).engine
    made.engines("ab".replace(home, ""), 1.0)
    made.engines("ab", 2.0)
    assert made.place("s", LONG, 3.0) == Decision(home, "pinned", None)


@pytest.mark.parametrize("policy", PINNING)
def test_a_pin_expires(policy: str) -> None:
    made = placement(policy, pin_seconds=100.0)
    home = made.place("s", LONG, 0.0).engine
    made.finished("s", home, LONG, 10.0)
    assert made.place("s", LONG, 110.0).reason == "pinned"
    made.finished("s", home, LONG, 110.0)
    assert made.place("s", LONG, 210.5).reason == "first"
    made.report("a", load(0), 400.0)
    assert len(made.pins) == 0
    assert sum(made.resident_tokens(engine) for engine in "abc") == 0


def test_one_of_many_pins_that_expired_is_no_pin() -> None:
    """One call forgets a part of them only."""
    made = placement("sticky", "ab", pin_seconds=100.0)
    for number in range(1000):
        made.place(f"s{number}", 10, 0.0)
    assert made.place("s999", 10, 101.0).reason == "first"
    assert len(made.pins) > 800


@pytest.mark.parametrize("policy", PINNING)
def test_a_conversation_that_is_over_is_forgotten(policy: str) -> None:
    made = placement(policy)
    home = made.place("s", LONG, 0.0).engine
    other = made.place("t", LONG, 0.0).engine
    made.finished("s", home, LONG, 1.0)
    made.ended("s", 1.0)
    assert dict(made.pins) == {"t": other}
    assert sum(made.resident_tokens(engine) for engine in "abc") == LONG
    made.ended("s", 1.0)
    made.finished("s", home, LONG, 2.0)
    assert "s" not in made.pins
    assert made.place("s", LONG, 3.0).reason == "first"


@pytest.mark.parametrize(
    ("name", "pinned"), [("", False), ("n" * LONGEST_NAME, True), ("n" * (LONGEST_NAME + 1), False)]
)
def test_calls_without_a_usable_session_are_not_pinned(name: str, pinned: bool) -> None:
    made = placement()
    for _ in range(2):
        decision = made.place(name, 10, 0.0)
        assert decision.moved_from is None
        assert decision.reason in ("first", "pinned")
    assert (decision.reason == "pinned") is pinned
    assert (name in made.pins) is pinned


def test_sticky_takes_the_fewest_calls_and_not_the_fewest_tokens() -> None:
    made = placement("sticky", "ab")
    made.report("a", load(2, 0), 0.0)
    made.report("b", load(1, 90_000), 0.0)
    assert made.place("s", 10, 0.0, parent="p") == Decision("b", "first", None)
    assert made.place("t", 10, 0.0, parent="s").reason == "first"


# Autellix.


def test_short_calls_go_to_the_fewest_calls_and_long_ones_home() -> None:
    made = placement("autellix", "ab")
    loads(made, a=1, b=5)
    assert made.place("s", SHORT_TOKENS, 0.0) == Decision("a", "short", None)
    assert "s" not in made.pins
    assert made.place("s", SHORT_TOKENS + 1, 0.0) == Decision("a", "first", None)
    assert made.pins["s"] == "a"
    loads(made, 1.0, a=9, b=5)
    assert made.place("s", SHORT_TOKENS, 1.0) == Decision("b", "short", None)
    assert made.place("s", SHORT_TOKENS + 1, 1.0) == Decision("a", "pinned", None)


def test_a_sub_agents_long_calls_go_to_its_parents_engine() -> None:
    made = placement("autellix", "ab")
    loads(made, a=1, b=2)
    assert made.place("p", LONG, 0.0).engine == "a"
    loads(made, 1.0, a=2, b=0)
    assert made.place("c", SHORT_TOKENS, 1.0, parent="p") == Decision("b", "short", None)
    assert made.place("c", LONG, 1.0, parent="p") == Decision("a", "parent", None)
    assert made.place("c", LONG, 1.0, parent="p") == Decision("a", "pinned", None)


# ConServe.


@pytest.mark.parametrize(
    ("kv_tokens", "capacities", "tokens", "expected"),
    [
        # The emptiest, in tokens per token of KV cache.
        ((50_000, 40_000, 60_000), (100_000, 100_000, 100_000), 1000, "b"),
        ((50_000, 40_000, 60_000), (100_000, 60_000, 200_000), 1000, "c"),
        # A long prompt fills a small engine more than a large one.
        ((10_000, 1000, 90_000), (100_000, 20_000, 100_000), 1000, "b"),
        ((10_000, 1000, 90_000), (100_000, 20_000, 100_000), 9000, "a"),
        # One that does not fit at all does not go there, however empty it is.
        ((90_000, 0, 95_000), (100_000, 20_000, 100_000), 20_000, "b"),
        ((90_000, 0, 95_000), (100_000, 20_000, 100_000), 20_001, "a"),
        # It fits nowhere: then as if it did.
        ((90_000, 0, 95_000), (100_000, 20_000, 110_000), 200_000, "c"),
        # Where a KV cache is not known, it is taken for the mean of the others.
        ((50_000, 40_000, 31_000), (100_000, 100_000, 0), 1000, "c"),
        ((50_000, 40_000, 31_000), (0, 0, 0), 1000, "c"),
        ((50_000, 30_000, 40_000), (0, 40_000, 80_000), 1000, "c"),
    ],
)
def test_a_first_turn_goes_where_room_is(
    kv_tokens: tuple[int, ...], capacities: tuple[int, ...], tokens: int, expected: str
) -> None:
    made = placement()
    for engine, used, capacity in zip("abc", kv_tokens, capacities, strict=True):
        made.report(engine, load(0, used, capacity), 0.0)
    assert made.place("s", tokens, 0.0).engine == expected


def test_conversations_count_although_their_agents_are_away() -> None:
    """vLLM reports no used KV between turns."""
    made = placement("conserve", "ab")
    loads(made, a=1, b=0)
    assert made.place("s", 8000, 0.0).engine == "b"
    made.finished("s", "b", 9000, 1.0)
    loads(made, 2.0, a=1, b=0)
    assert made.resident_tokens("b") == 9000
    assert made.place("t", 8000, 2.0).engine == "a"
    made.finished("t", "a", 8100, 3.0)
    loads(made, 4.0, a=0, b=1)
    assert made.place("u", 8000, 4.0).engine == "a"


def test_what_was_sent_counts_before_it_is_reported() -> None:
    made = placement("conserve", "ab")
    made.report("a", load(0, 10_000), 0.0)
    made.report("b", load(0, 40_000), 0.0)
    assert [made.place("", 10_000, 0.0).engine for _ in range(3)] == ["a", "a", "b"]
    made.finished("", "a", 10_000, 1.0)
    made.finished("", "a", 60_000, 1.0)
    assert made.place("", 10_000, 1.0).engine == "a"


@pytest.mark.parametrize(
    ("calls", "used", "expected"),
    [
        # Of the fair share of calls a has 1.33 and b 0.89, which counts 0.22; so do 11,100 of 99,900 tokens.
        ((5, 3), (39_900, 59_900), "a"),
        ((5, 3), (44_300, 55_500), "a"),
        ((5, 3), (44_500, 55_300), "b"),
        ((0, 9), (20_000, 15_000), "a"),
        ((9, 0), (15_000, 20_000), "b"),
        ((9, 0), (8000, 20_000), "b"),
        ((9, 0), (7000, 20_000), "a"),
    ],
)
def test_calls_count_half_as_much_as_tokens(calls: tuple[int, int], used: tuple[int, int], expected: str) -> None:
    made = placement("conserve", "ab", bound=2.0)
    made.report("a", load(calls[0], used[0]), 0.0)
    made.report("b", load(calls[1], used[1]), 0.0)
    assert made.place("s", 100, 0.0).engine == expected


@pytest.mark.parametrize(("used", "expected"), [(62_700, "a"), (62_900, "b")])
def test_an_engine_over_its_bound_is_left_out_however_few_calls_it_has(used: int, expected: str) -> None:
    """x1.25 of the fair share of used + 38,500 tokens."""
    made = placement("conserve", "ab", bound=1.25)
    made.report("a", load(0, used), 0.0)
    made.report("b", load(60, 38_000), 0.0)
    assert made.place("s", 500, 0.0).engine == expected


# Sub-agents.


@pytest.mark.parametrize(
    ("used", "others", "tokens", "expected"),
    [
        # Up to half of the KV cache is within any bound.
        (45_000, 0, 5000, "parent"),
        (45_000, 0, 5001, "crowded"),
        # Above that, x1.25 of the fair share: of 132,000 tokens on two engines 82,500.
        (72_000, 50_000, 10_000, "parent"),
        (74_000, 50_000, 10_000, "crowded"),
        # Never more than the KV cache.
        (90_000, 85_000, 10_000, "parent"),
        (90_000, 85_000, 10_001, "crowded"),
    ],
)
def test_a_sub_agent_starts_at_its_parents_engine(used: int, others: int, tokens: int, expected: str) -> None:
    made = placement("conserve", "ab")
    made.report("a", load(0, 0), 0.0)
    made.report("b", load(0, 1), 0.0)
    assert made.place("p", 100, 0.0).engine == "a"
    made.report("a", load(1, used), 1.0)
    made.report("b", load(0, others), 1.0)
    decision = made.place("c", tokens, 1.0, parent="p")
    assert decision.reason == expected
    assert decision.engine == ("a" if expected == "parent" else "b")
    assert made.place("c", tokens, 1.0, parent="p") == Decision(decision.engine, "pinned", None)


def test_a_parents_engine_without_a_known_kv_cache_may_have_its_share() -> None:
    made = placement("conserve", "ab")
    for engine, used in (("a", 0), ("b", 1)):
        made.report(engine, load(0, used, 0), 0.0)
    assert made.place("p", 100, 0.0).engine == "a"
    made.report("a", load(0, 8000, 0), 1.0)
    made.report("b", load(0, 6000, 0), 1.0)
    # 8500 of 14,500 with this one, and 9062 are allowed.
    assert made.place("c", 500, 1.0, parent="p").reason == "parent"
    made.report("a", load(0, 9000, 0), 1.0)
    # 9500 of 15,500, and 9687; then 9700 of 15,700 and 9812; 11,000 of 17,000 and 10,625.
    assert made.place("d", 2000, 1.0, parent="p").reason == "crowded"


@pytest.mark.parametrize(("calls", "expected"), [(29, "parent"), (30, "crowded")])
def test_a_parents_engine_may_have_its_share_of_calls(calls: int, expected: str) -> None:
    """x1.5 of half of them: 30 of 40."""
    made = placement("conserve", "ab", bound=1.5)
    made.report("a", load(0, 0), 0.0)
    made.report("b", load(0, 1), 0.0)
    assert made.place("p", 100, 0.0).engine == "a"
    made.report("a", load(calls, 0), 1.0)
    made.report("b", load(10, 1), 1.0)
    assert made.place("c", 100, 1.0, parent="p").reason == expected


def test_siblings_spread_where_the_parents_engine_has_many_calls() -> None:
    made = placement("conserve", "abcd")
    for engine in "abcd":
        made.report(engine, load(0, 0), 0.0)
    home = made.place("p", 100, 0.0).engine
    made.finished("p", home, 100, 1.0)
    children = [made.place(f"c{number}", 100, 1.0, parent="p") for number in range(8)]
    assert [one.reason for one in children] == ["parent"] * 4 + ["crowded"] * 4
    assert all(one.engine != home for one in children[4:])


@pytest.mark.parametrize("parent", ["nobody", "s", "dead", ""])
def test_a_parent_that_is_not_known_or_whose_engine_is_dead_is_no_parent(parent: str) -> None:
    made = placement("conserve", "a")
    made.place("dead", 100, 0.0)
    made.engines("b", 1.0)
    assert made.place("s", 100, 1.0, parent=parent) == Decision("b", "first", None)


def test_a_sub_agent_that_has_to_move_does_not_follow_its_parent() -> None:
    made = placement("conserve", "ab")
    made.report("a", load(0, 0), 0.0)
    made.report("b", load(0, 1), 0.0)
    assert made.place("c", 100, 0.0).engine == "a"
    made.engines("bd", 1.0)
    made.report("d", load(0, 50_000), 1.0)
    made.report("b", load(0, 60_000), 1.0)
    assert made.place("p", 100, 1.0).engine == "d"
    assert made.place("c", 100, 1.0, parent="p") == Decision("b", "moved", "a")


def test_a_crowded_sub_agent_that_finds_no_other_engine_is_with_its_parent() -> None:
    made = placement("conserve", "a")
    made.report("a", load(0, 99_999), 0.0)
    made.place("p", 100, 0.0)
    assert made.place("c", 5000, 0.0, parent="p") == Decision("a", "parent", None)


# Properties.


class Calls(RuleBasedStateMachine):
    """Calls that come and end on engines that die and come back, against what was placed where."""

    ENGINES = "abcde"

    @initialize(policy=st.sampled_from(["conserve", "sticky"]), bound=st.floats(1.0, 3.0), engines=st.integers(1, 5))
    def begin(self, policy: str, bound: float, engines: int) -> None:
        self.placement = Placement(policy, bound=bound, pin_seconds=1000.0)
        self.now = 0.0
        self.live = set(self.ENGINES[:engines])
        self.homes: dict[str, str] = {}
        self.contexts: dict[str, int] = {}
        self.running: list[tuple[str, str, int]] = []
        self.deaths = self.moves = 0
        self.placement.engines(self.live, 0.0)

    @rule(
        session=st.integers(0, 12),
        tokens=st.integers(0, 9000),
        parent=st.none() | st.integers(0, 12),
        s=st.floats(0, 1),
    )
    @precondition(lambda self: self.live)
    def place(self, session: int, tokens: int, parent: int | None, s: float) -> None:
        self.now += s
        name = f"s{session}"
        decision = self.placement.place(name, tokens, self.now, None if parent is None else f"s{parent}")
        assert decision.engine in self.live
        before = self.homes.get(name)
        if before in self.live:
            assert decision == Decision(before, "pinned", None)
        elif before is not None:
            assert (decision.reason, decision.moved_from) == ("moved", before)
            self.moves += 1
        else:
            assert decision.reason in ("first", "parent", "crowded")
            assert decision.moved_from is None
        self.homes[name] = decision.engine
        self.contexts[name] = max(self.contexts.get(name, 0), tokens)
        self.running.append((name, decision.engine, tokens))

    @rule(number=st.integers(0, 30), answer=st.integers(0, 500))
    @precondition(lambda self: self.running)
    def end(self, number: int, answer: int) -> None:
        name, engine, tokens = self.running.pop(number % len(self.running))
        self.placement.finished(name, engine, tokens + answer, self.now)
        if self.homes.get(name) == engine:
            self.contexts[name] = tokens + answer

    @rule(session=st.integers(0, 12))
    def over(self, session: int) -> None:
        name = f"s{session}"
        self.placement.ended(name, self.now)
        self.homes.pop(name, None)
        self.contexts.pop(name, None)

    @rule(engine=st.sampled_from(ENGINES))
    def dies(self, engine: str) -> None:
        if engine in self.live and len(self.live) > 1:
            self.live.remove(engine)
            self.deaths += sum(home == engine for home in self.homes.values())
            self.placement.engines(self.live, self.now)

    @rule(engine=st.sampled_from(ENGINES))
    def comes(self, engine: str) -> None:
        self.live.add(engine)
        self.placement.engines(sorted(self.live), self.now)

    @rule(engine=st.sampled_from(ENGINES), calls=st.integers(0, 20), used=st.integers(0, 50_000), all=st.booleans())
    def reports(self, engine: str, calls: int, used: int, all: bool) -> None:
        self.placement.report(engine, EngineLoad(calls, calls // 2, used, 50_000 if all else 0), self.now)

    @invariant()
    def pins_are_where_conversations_live(self) -> None:
        if hasattr(self, "placement"):
            assert dict(self.placement.pins) == self.homes
            places = Counter(self.homes.values())
            assert all(self.placement.conversations(engine) == places[engine] for engine in self.ENGINES)

    @invariant()
    def tokens_are_those_of_the_contexts(self) -> None:
        if hasattr(self, "placement"):
            for engine in self.ENGINES:
                expected = sum(self.contexts[name] for name, home in self.homes.items() if home == engine)
                assert self.placement.resident_tokens(engine) == expected

    @invariant()
    def no_more_moves_than_conversations_on_engines_that_died(self) -> None:
        if hasattr(self, "placement"):
            assert self.moves <= self.deaths


Calls.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCalls = Calls.TestCase


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 120_000), st.sampled_from([0, 50_000, 100_000])),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 60_000),
    st.floats(1.0, 2.0),
    st.booleans(),
)
def test_no_engine_above_its_bound_while_another_has_room(
    engines: list[tuple[int, int, int]], tokens: int, bound: float, child: bool
) -> None:
    names = [f"e{number}" for number in range(len(engines))]
    made = placement("conserve", names, bound=bound)
    if child:
        made.place("p", 10, 0.0)
    mirror = Fleet(made.resident_tokens, bound)
    mirror.set(names)
    for name, (calls, used, capacity) in zip(names, engines, strict=True):
        made.report(name, load(calls, used, capacity), 0.0)
        mirror.report(name, load(calls, used, capacity), 0.0)
    room = mirror.room(tokens)
    within = [name for name in names if mirror.has_room(name, tokens, room)]
    fitting = [name for name in within if tokens <= (engines[names.index(name)][2] or tokens)]
    decision = made.place("s", tokens, 0.0, parent="p" if child else None)
    if fitting:
        assert decision.engine in fitting


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(10, 5000), min_size=20, max_size=200), st.integers(2, 6))
def test_conversations_are_spread_evenly(lengths: list[int], number: int) -> None:
    names = [f"e{index}" for index in range(number)]
    made = placement("conserve", names)
    for index, tokens in enumerate(lengths):
        made.place(f"s{index}", tokens, 0.0)
    found = [made.resident_tokens(name) for name in names]
    assert sum(found) == sum(lengths)
    assert max(found) - min(found) <= 2 * max(lengths) + 0.25 * sum(lengths) / number
