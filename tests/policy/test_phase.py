"""Phases and admission order, as tables."""

import pytest

from vllm_agentserve.policy.order import AdmissionKey, Patience, Urgency, admission_key, ahead
from vllm_agentserve.policy.phase import Phase, SessionTable, classify

COLD, RESUME, DECODE = Phase.COLD_PREFILL, Phase.RESUME_PREFILL, Phase.DECODE


@pytest.mark.parametrize(
    ("cached", "uncached", "known", "decoding", "phase"),
    [
        (0, 3000, False, False, COLD),  # a new agent
        (0, 3000, True, False, COLD),  # a known agent whose context was evicted
        (2992, 100, False, False, RESUME),  # a new agent on a cached system prompt
        (2992, 100, True, False, RESUME),  # a tool result
        (1600, 3000, True, False, RESUME),  # a long tool result of a known agent
        (1600, 3000, False, False, COLD),  # a stranger that shares the smaller part
        (1600, 1600, False, False, RESUME),  # exactly half
        (16, 4000, False, False, COLD),  # a shared chat template is no context
        (1, 1, False, False, RESUME),
        (1, 40, True, False, RESUME),
        (4000, 2, False, True, RESUME),  # two tokens are a prompt's
        (4000, 1, False, False, RESUME),  # all but the last token is cached
        (4000, 1, False, True, DECODE),
        (0, 1, False, False, COLD),  # a prompt of one token
        (4000, 30, False, True, RESUME),  # preempted after decoding, most of it cached
        (0, 4030, False, True, COLD),  # preempted after decoding, nothing cached
    ],
)
def test_classify(cached: int, uncached: int, known: bool, decoding: bool, phase: Phase) -> None:
    assert classify(cached, uncached, known, decoding) is phase


def test_sessions_are_forgotten_oldest_first() -> None:
    table = SessionTable(capacity=2)
    for name in ("a", "b", "a", "c", None):
        table.touch(name)
    assert [name in table for name in ("a", "b", "c", None)] == [True, False, True, False]
    assert len(table) == 2


@pytest.mark.parametrize(
    ("phase", "uncached", "given", "key"),
    [
        (COLD, 4000, {}, AdmissionKey(Urgency.NORMAL, cold=True, arrival=7, tokens=4000)),
        (RESUME, 100, {}, AdmissionKey(Urgency.NORMAL, uncached=100, arrival=7, tokens=100)),
        (RESUME, 256, {}, AdmissionKey(Urgency.NORMAL, uncached=256, arrival=7, tokens=256)),
        # Longer than the budget: in line with the cold ones.
        (RESUME, 257, {}, AdmissionKey(Urgency.NORMAL, cold=True, arrival=7, tokens=257)),
        (COLD, 9, {"level": 3, "batch": True}, AdmissionKey(Urgency.NORMAL, True, 3, cold=True, arrival=7, tokens=9)),
        (COLD, 9, {"program": 4}, AdmissionKey(Urgency.NORMAL, cold=True, program=4, arrival=7, tokens=9)),
        (RESUME, 257, {"program": 4}, AdmissionKey(Urgency.NORMAL, cold=True, program=4, arrival=7, tokens=257)),
        (RESUME, 9, {"program": 4}, AdmissionKey(Urgency.NORMAL, uncached=9, arrival=7, tokens=9)),
        (RESUME, 9, {"due": 5.0}, AdmissionKey(Urgency.NORMAL, due=5.0, uncached=9, arrival=7, tokens=9)),
        (RESUME, 9, {"priority": 4}, AdmissionKey(Urgency.NORMAL, priority=-4, uncached=9, arrival=7, tokens=9)),
    ],
)
def test_admission_key(phase: Phase, uncached: int, given: dict, key: AdmissionKey) -> None:
    assert admission_key(phase, uncached, 7, resume_budget=256, **given) == key


def test_the_order_of_keys() -> None:
    """Every line goes before the next, whatever follows in the key."""
    rising = [
        ahead(admission_key(COLD, 9, 98, 256, level=3, batch=True), Urgency.PREEMPTED, 98),
        ahead(admission_key(RESUME, 9, 99, 256), Urgency.PREEMPTED, 99),
        ahead(admission_key(COLD, 9, 97, 256, due=5.0), Urgency.OVERDUE, 97),
        ahead(admission_key(RESUME, 9, 97, 256, priority=-8), Urgency.OVERDUE, 97.5),
        ahead(admission_key(RESUME, 1, 98, 256, due=0.0), Urgency.OVERDUE, 98),
        admission_key(COLD, 9, 99, 256, priority=2),
        admission_key(COLD, 9, 99, 256, due=9.0, priority=1),
        admission_key(RESUME, 256, 97, 256, due=1.0),
        admission_key(COLD, 9, 96, 256, due=2.0),
        admission_key(RESUME, 8, 95, 256),
        admission_key(RESUME, 9, 1, 256),
        admission_key(COLD, 9, 2, 256),
        admission_key(COLD, 9, 3, 256),
        admission_key(COLD, 9, 5, 256, program=1),
        admission_key(COLD, 9, 6, 256, program=1),
        admission_key(COLD, 9, 4, 256, program=2),
        admission_key(RESUME, 1, 0, 256, due=0.0, priority=-1),
        admission_key(RESUME, 1, 0, 256, level=1, due=0.0, priority=9),
        admission_key(RESUME, 1, 0, 256, batch=True, due=0.0, priority=9),
        admission_key(RESUME, 1, 0, 256, due=0.0)._replace(urgency=Urgency.UNKEPT),
    ]
    assert sorted(reversed(rising)) == rising


def test_patience_names_each_request_once_and_in_order() -> None:
    patience = Patience(3)
    patience.enter("a", 0)
    patience.enter("b", 1)
    assert [patience.overdue(step) for step in range(6)] == [[], [], [], ["a"], ["b"], []]
    assert len(patience) == 0


def test_a_sequence_is_a_new_one_unless_something_is_known() -> None:
    assert classify(10, 1) is RESUME
    assert classify(10, 20) is COLD


def test_who_goes_ahead_leaves_class_and_level_behind() -> None:
    key = ahead(admission_key(RESUME, 9, 98, 256, level=3, batch=True, due=4.0), Urgency.OVERDUE, 98)
    assert key == AdmissionKey(Urgency.OVERDUE, False, 0, due=98, uncached=9, arrival=98, tokens=9)
    assert isinstance(key.batch, bool)


def test_two_that_are_overdue_at_once_keep_their_names() -> None:
    patience = Patience(3)
    for name in "abc":
        patience.enter(name, 0)
    assert patience.overdue(9) == ["a", "b", "c"]


def test_as_many_sessions_are_known_as_may_be() -> None:
    table = SessionTable()
    for number in range(65_537):
        table.touch(str(number))
    assert (len(table), "0" in table, "1" in table) == (65_536, False, True)
