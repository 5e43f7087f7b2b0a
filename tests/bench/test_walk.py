"""Which calls are due when one has ended: chains, forks, joins, failures, in any order of their ends."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.bench.calls import CallShape, program_walk
from vllm_agentserve.bench.client import StreamingClient
from vllm_agentserve.bench.replay import Replay
from vllm_agentserve.bench.sessions import Session, Turn, WorkloadError, contexts, longest_context, session_walk
from vllm_agentserve.bench.walk import DueCall, PlannedCall, Walk

FORKING = [
    Session("p", "p", (Turn((1,) * 8, 2, spawns=("x", "y")), Turn((2,) * 4, 1, 0.5)), start_s=3.0),
    Session("x", "p", (Turn((3,) * 4, 2, 0.1, spawns=("z",)),), forked=True),
    Session("y", "p", (Turn((5,) * 4, 1), Turn((6,), 1, 0.2)), forked=True),
    Session("z", "p", (Turn((7,), 1),), forked=True),
    Session("q", "q", (Turn((9,), 1, 0.25),), start_s=1.0, after="p"),
]
"""`p` spawns two sessions, of which one spawns a third; `q` starts after `p`."""


def names(due: list[DueCall]) -> list:
    return [one.name for one in due]


def test_sessions_fork_and_join() -> None:
    walk = session_walk(FORKING)
    assert walk.begin(100.0) == [DueCall(("p", 0), 103.0)]
    assert walk.end(("p", 0), 110.0) == [DueCall(("x", 0), 110.1), DueCall(("y", 0), 110.0)]
    assert walk.end(("x", 0), 111.0) == [DueCall(("z", 0), 111.0)]
    assert walk.end(("y", 0), 112.0) == [DueCall(("y", 1), 112.2)]
    assert walk.end(("y", 1), 113.0) == []
    assert walk.end(("z", 0), 114.0) == [DueCall(("p", 1), 114.5)]
    assert not walk.over
    assert walk.end(("p", 1), 115.0) == [DueCall(("q", 0), 116.25)]
    assert walk.end(("q", 0), 117.0) == []
    assert walk.over


def test_a_failure_gives_up_what_goes_on_from_it_and_nothing_else() -> None:
    walk = session_walk(FORKING)
    walk.begin(0.0)
    walk.end(("p", 0), 1.0)
    assert names(walk.end(("y", 0), 2.0)) == [("y", 1)]
    assert names(walk.end(("y", 1), 2.0)) == []
    assert names(walk.fail(("x", 0), 3.0)) == [("p", 1)]
    assert names(walk.end(("p", 1), 4.0)) == [("q", 0)]
    walk.end(("q", 0), 5.0)
    assert walk.over


def test_a_failed_first_turn_ends_the_session_and_all_that_would_fork_from_it() -> None:
    walk = session_walk(FORKING)
    walk.begin(0.0)
    assert walk.fail(("p", 0), 1.0) == [DueCall(("q", 0), 2.25)]


JOINS = {
    "two": {
        "a": PlannedCall(),
        "b": PlannedCall(),
        "join": PlannedCall(("a", "b"), origin="a"),
        "last": PlannedCall(("join",), 0.5),
    },
    "three": {
        "a": PlannedCall(),
        "b": PlannedCall(),
        "c": PlannedCall(("b",)),
        "join": PlannedCall(("a", "b", "c"), origin="a"),
        "beside": PlannedCall(("a", "c")),
        "last": PlannedCall(("join", "b"), 0.5),
    },
    "one after the other": {
        "a": PlannedCall(),
        "b": PlannedCall(),
        "join": PlannedCall(("a", "b"), origin="a"),
        "c": PlannedCall(("a",)),
        "second": PlannedCall(("join", "c"), origin="join"),
        "last": PlannedCall(("second",), 0.5),
    },
    "origin before another one": {
        "a": PlannedCall(),
        "b": PlannedCall(),
        "middle": PlannedCall(("a", "b")),
        "join": PlannedCall(("middle",), origin="a"),
        "last": PlannedCall(("join",), 0.5),
    },
}
"""Calls that join. Where `a` fails, `last` follows a call that is given up."""


@pytest.mark.parametrize(
    ("calls", "ends"),
    [
        ("two", [("-a", []), ("b", ["last"])]),
        ("two", [("b", []), ("-a", ["last"])]),
        ("two", [("a", []), ("-b", ["join"])]),
        ("three", [("-a", []), ("b", ["c"]), ("c", ["beside", "last"])]),
        ("three", [("-a", []), ("-b", ["c"]), ("-c", ["beside", "last"])]),
        ("three", [("b", ["c"]), ("-a", []), ("c", ["beside", "last"])]),
        ("three", [("b", ["c"]), ("c", []), ("-a", ["beside", "last"])]),
        ("one after the other", [("-a", ["c"]), ("b", []), ("c", ["last"])]),
        ("one after the other", [("-a", ["c"]), ("c", []), ("b", ["last"])]),
        ("one after the other", [("a", ["c"]), ("b", ["join"]), ("-join", []), ("c", ["last"])]),
        ("origin before another one", [("-a", []), ("b", ["middle"]), ("middle", ["last"])]),
    ],
)
def test_what_follows_a_call_that_is_given_up_waits_for_all_that_one_waited_for(
    calls: str, ends: list[tuple[str, list[str]]]
) -> None:
    """Every row: what ends, with a minus where it fails, and what is due then."""
    walk = Walk(JOINS[calls])
    walk.begin(0.0)
    for now, (name, due) in enumerate(ends):
        found = walk.fail(name[1:], now) if name.startswith("-") else walk.end(name, now)
        assert sorted(names(found)) == due, name
        assert all(one.at_s == now + 0.5 for one in found if one.name == "last")
        assert not walk.over


@given(st.data())
def test_with_failures_no_call_is_due_before_its_time_and_every_walk_ends(data: st.DataObject) -> None:
    calls: dict[int, PlannedCall[int]] = {}
    for index in range(data.draw(st.integers(1, 12))):
        after = sorted(data.draw(st.sets(st.integers(0, index - 1), max_size=3))) if index else []
        calls[index] = PlannedCall(tuple(after), origin=data.draw(st.sampled_from([None, *after])))
    walk = Walk(calls)
    waiting, ended, failed = names(walk.begin(0.0)), set[int](), set[int]()

    def over(index: int) -> bool:
        return index in ended or (index in failed and all(map(over, calls[index].after)))

    while waiting:
        one = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        ended.add(one)
        if data.draw(st.booleans()):
            failed.add(one)
            for index, call in calls.items():
                if call.origin in failed:
                    failed.add(index)
            found = walk.fail(one, 1.0)
        else:
            found = walk.end(one, 1.0)
        assert all(over(before) for due in names(found) for before in calls[due].after)
        assert not failed & set(names(found))
        waiting += names(found)
    assert walk.over


def test_a_session_that_nobody_spawns_is_left_out() -> None:
    assert session_walk([FORKING[2]]).over


ONE = (Turn((1,), 1),)


def spawns(*sessions: str) -> tuple[Turn, ...]:
    return (Turn((1,), 1, spawns=sessions),)


WRONG_PLANS = {
    "after a name that no session has": (
        [Session("a", "a", ONE, after="b")],
        "session 'a': after = 'b' is not allowed, no session has this name",
    ),
    "no turns": ([Session("a", "a", ())], r"session 'a': turns = \(\) is not allowed, give it at least one"),
    "after a session without turns": (
        [Session("a", "a", ONE, after="b"), Session("b", "b", ())],
        r"session 'b': turns = \(\) is not allowed",
    ),
    "after itself": (
        [Session("a", "a", ONE, after="a")],
        "after = 'a' is not allowed, it waits for itself: name another",
    ),
    "after each other": (
        [Session("a", "a", ONE, after="c"), Session("b", "b", ONE, after="a"), Session("c", "c", ONE, after="b")],
        "session 'a': after = 'c' is not allowed, the sessions 'a', 'b', 'c' wait for each other: name another session",
    ),
    "a circle beside what can run": (
        [
            Session("free", "free", ONE),
            Session("late", "late", ONE, after="b"),
            Session("a", "a", ONE, after="b"),
            Session("b", "b", ONE, after="a"),
        ],
        "session 'a': after = 'b' is not allowed, the sessions 'a', 'b' wait",
    ),
    "after what it spawns": (
        [Session("a", "a", (*spawns("x"), *ONE), after="x"), Session("x", "a", ONE, forked=True)],
        "session 'a': after = 'x' is not allowed, the sessions .* wait for each other",
    ),
    "after a forked session that no turn spawns": (
        [Session("a", "a", ONE, after="x"), Session("x", "x", ONE, forked=True)],
        "session 'a': after = 'x' is not allowed, no turn spawns that forked session",
    ),
    "a forked session that is to wait for another one": (
        [Session("a", "a", spawns("x")), Session("b", "b", ONE), Session("x", "x", ONE, forked=True, after="b")],
        "session 'x': after = 'b' is not allowed, the turn that spawns a forked session starts it",
    ),
    "spawns a name that no session has": (
        [Session("a", "a", spawns("x"))],
        "session 'a': spawns = 'x' is not allowed, no session has this name",
    ),
    "spawns a session that starts by itself": (
        [Session("a", "a", spawns("b")), Session("b", "b", ONE)],
        "session 'a': spawns = 'b' is not allowed, that session starts by itself",
    ),
    "two turns spawn one session": (
        [Session("a", "a", spawns("x")), Session("b", "b", spawns("x")), Session("x", "x", ONE, forked=True)],
        "session 'b': spawns = 'x' is not allowed, session 'a' spawns it already",
    ),
    "sessions that spawn each other": (
        [Session("x", "x", spawns("y"), forked=True), Session("y", "y", spawns("x"), forked=True)],
        "session 'x': spawns = 'y' is not allowed, this session never starts",
    ),
    "spawned by what no turn spawns": (
        [Session("x", "x", spawns("y"), forked=True), Session("y", "y", ONE, forked=True)],
        "session 'x': spawns = 'y' is not allowed, this session never starts",
    ),
    "one name twice": (
        [Session("a", "a", ONE), Session("a", "b", ONE)],
        "session 'a': name = 'a' is not allowed, another session has this name",
    ),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_sessions_that_do_not_fit_together_are_refused_before_anything_is_sent(name: str) -> None:
    sessions, message = WRONG_PLANS[name]
    with pytest.raises(WorkloadError, match=message):
        session_walk(sessions)
    with pytest.raises(WorkloadError, match=message):
        longest_context(sessions)
    with pytest.raises(WorkloadError, match=message):
        Replay(StreamingClient("http://127.0.0.1:1"), sessions)


@pytest.mark.parametrize("parents", [(1,), (2,), (7,), (-1,)])
def test_a_call_waits_for_earlier_calls_only(parents: tuple[int, ...]) -> None:
    with pytest.raises(WorkloadError, match=r"call 1: parents = .* is no earlier call: name calls before it"):
        program_walk((CallShape(1, 0, 1), CallShape(1, 0, 1, 0.0, parents), CallShape(1, 0, 1, 0.0, (1,))))


def test_contexts_follow_forks() -> None:
    assert contexts(FORKING) == {
        ("p", 0): 10,
        ("x", 0): 16,
        ("y", 0): 15,
        ("y", 1): 17,
        ("z", 0): 18,
        ("p", 1): 15,
        ("q", 0): 2,
    }


@pytest.mark.parametrize("seed", range(5))
def test_programs_join(seed: int) -> None:
    """Whichever of two calls ends last: the call that joins them is due then."""
    walk = program_walk(
        (
            CallShape(1, 0, 1),
            CallShape(1, 2, 1, 0.5, (0,)),
            CallShape(1, 2, 1, 0.0, (0,)),
            CallShape(1, 2, 1, 2.0, (1, 2)),
        )
    )
    assert walk.begin(7.0) == [DueCall(0, 7.0)]
    assert walk.end(0, 8.0) == [DueCall(1, 8.5), DueCall(2, 8.0)]
    first, second = random.Random(seed).sample((1, 2), 2)
    assert walk.end(first, 9.0) == []
    assert walk.end(second, 10.0) == [DueCall(3, 12.0)]


@given(st.data())
def test_every_call_is_due_once_after_those_it_waits_for(data: st.DataObject) -> None:
    calls: list[CallShape] = []
    for index in range(data.draw(st.integers(1, 12))):
        parents = data.draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        calls.append(CallShape(1, 0, 1, 0.0, tuple(sorted(parents))))
    walk: Walk[int] = program_walk(calls)
    waiting, ended, now = names(walk.begin(0.0)), list[int](), 0.0
    while waiting:
        now += 1.0
        one = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        assert set(calls[one].parents) <= set(ended)
        ended.append(one)
        waiting += names(walk.end(one, now))
    assert sorted(ended) == list(range(len(calls)))
    assert walk.over
