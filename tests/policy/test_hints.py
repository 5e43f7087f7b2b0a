"""Hints: which are taken, which are refused and in what words, and that nothing a client sends does harm."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.policy.attribution import Families
from vllm_agentserve.policy.hints import KNOWN, LONGEST_DEADLINE_MS, MOST_ERRORS, Hints, read_hints


@pytest.mark.parametrize(
    ("given_", "hints"),
    [
        (None, Hints()),
        ({}, Hints()),
        ({"agent_parent": "a"}, Hints(parent="a")),
        ({"agent_thread": "t" * 256}, Hints(thread="t" * 256)),
        ({"agent_deadline_ms": 1}, Hints(deadline_ms=1.0)),
        ({"agent_deadline_ms": 86_400_000}, Hints(deadline_ms=LONGEST_DEADLINE_MS)),
        ({"agent_class": "batch"}, Hints(batch=True)),
        ({"agent_class": "interactive"}, Hints(batch=False)),
        ({"agent_priority": -3}, Hints(priority=-3)),
        ({"agent_critical": True}, Hints(critical=True)),
        ({"agent_critical": 0}, Hints(critical=False)),
        ({"session_id": 5, "kv_transfer_params": {}, "agents": 1}, Hints()),
    ],
)
def test_right_hints_are_taken(given_: dict[str, Any] | None, hints: Hints) -> None:
    assert read_hints(given_) == (hints, [])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "agent_parent",
            "",
            "vllm_xargs['agent_parent'] = '' is not allowed: it must be a string of 1 to 256 printable",
        ),
        ("agent_parent", 7, "= 7 is not allowed: it must be a string of 1 to 256 printable characters"),
        ("agent_thread", "x" * 257, f"= '{'x' * 40}'... is not allowed"),
        ("agent_thread", "a\nb", "= 'a\\nb' is not allowed"),
        ("agent_thread", ["a"], "= a list is not allowed"),
        ("agent_deadline_ms", 0, "= 0 is not allowed: it must be a number above 0, at most 86400000"),
        ("agent_deadline_ms", -1.5, "= -1.5 is"),
        ("agent_deadline_ms", 86_400_001, "= 86400001 is"),
        ("agent_deadline_ms", float("nan"), "= nan is"),
        ("agent_deadline_ms", float("inf"), "= inf is"),
        ("agent_deadline_ms", True, "= True is"),
        ("agent_deadline_ms", "100", "= '100' is"),
        ("agent_deadline_ms", 10**400, "= a huge number is"),
        ("agent_class", "urgent", "= 'urgent' is not allowed: it must be 'interactive' or 'batch'"),
        ("agent_class", None, "= None is"),
        ("agent_priority", 1.5, "= 1.5 is not allowed: it must be a whole number"),
        ("agent_priority", True, "= True is"),
        ("agent_priority", "3", "= '3' is"),
        ("agent_critical", "yes", "= 'yes' is not allowed: it must be true or false"),
        ("agent_critical", 2, "= 2 is"),
        ("agent_priority", 1 << 31, "= 2147483648 is"),
        ("agent_clas", "batch", "['agent_clas'] = 'batch' is not allowed: it must be named agent_parent, agent_thread"),
        ("agent_" + "x" * 10_000, 1, "is not allowed: it must be named"),
    ],
)
def test_invalid_hints_are_named_and_the_others_hold(name: str, value: Any, message: str) -> None:
    hints, errors = read_hints({name: value} | {key: right for key, right in RIGHT.items() if key != name})
    assert len(errors) == 1
    assert message in str(errors[0])
    assert len(str(errors[0])) < 300
    field = KNOWN[name][0] if name in KNOWN else None
    assert hints == Hints(**{k: v for k, v in EXPECTED.items() if k != field})


RIGHT = {"agent_parent": "p", "agent_thread": "t", "agent_deadline_ms": 50, "agent_class": "batch"}
EXPECTED = {"parent": "p", "thread": "t", "deadline_ms": 50.0, "batch": True}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=400) | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(list(KNOWN)) | st.text(max_size=20) | st.text(max_size=300).map(lambda text: "agent_" + text)


@given(st.dictionaries(names, values, max_size=30))
def test_nothing_a_client_sends_does_harm(sent: dict[str, Any]) -> None:
    hints, errors = read_hints(sent)
    assert len(errors) <= MOST_ERRORS
    for error in errors:
        text = str(error)
        assert len(text) < 1000
        assert text.isprintable()
    assert hints.parent is None or 0 < len(hints.parent) <= 256
    assert hints.thread is None or 0 < len(hints.thread) <= 256
    assert hints.deadline_ms is None or 0 < hints.deadline_ms <= LONGEST_DEADLINE_MS


def test_families() -> None:
    known = Families()
    assert known.root("a", None) == "a"
    assert known.root("b", "a") == "a"
    assert known.root("c", "b") == "a"
    assert known.root("d", "d") == "d"
    # What a session said first holds.
    assert known.root("b", "z") == "a"
    assert known.root("b", None) == "a"
    # Two that name each other end somewhere.
    assert known.root("x", "y") == "y"
    assert known.root("y", "x") == "y"


def test_families_are_bounded() -> None:
    known = Families(capacity=10)
    for n in range(100):
        known.root(f"child-{n}", "parent")
    assert len(known) == 10
    assert known.root("child-99", None) == "parent"
    assert known.root("child-1", None) == "child-1"


def test_of_families_the_longest_unseen_is_forgotten() -> None:
    known = Families(capacity=2)
    known.root("a", "parent")
    known.root("b", "parent")
    known.root("a", None)
    known.root("c", "parent")
    assert [known.root(name, None) for name in "abc"] == ["parent", "b", "parent"]


def test_critical_calls_go_before_every_priority() -> None:
    ordered = [
        Hints(critical=True, priority=(1 << 31) - 1),
        Hints(critical=True),
        Hints(critical=True, priority=1 - (1 << 31)),
        Hints(priority=(1 << 31) - 1),
        Hints(),
        Hints(priority=-1),
    ]
    assert sorted(ordered, key=lambda hints: -hints.precedence) == ordered
    assert len({hints.precedence for hints in ordered}) == len(ordered)
