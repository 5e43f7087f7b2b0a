"""In which order programs began: what is remembered of it, and for how long."""

from vllm_agentserve.policy.program import Beginnings


def test_a_program_keeps_its_number() -> None:
    beginnings = Beginnings()
    assert [beginnings.number(key) for key in ("a", "b", "a", "c", "b")] == [1, 2, 1, 3, 2]


def test_the_longest_unseen_begin_anew() -> None:
    beginnings = Beginnings(capacity=2)
    for key in ("a", "b", "a", "c"):
        beginnings.number(key)
    assert len(beginnings) == 2
    # "b" was forgotten for "c", and comes after it now; then "a" was unseen for longest.
    assert [beginnings.number(key) for key in ("b", "c", "a")] == [4, 3, 5]


def test_a_client_with_ever_new_sessions_fills_no_memory() -> None:
    beginnings = Beginnings()
    for number in range(20_000):
        beginnings.number(str(number))
    assert len(beginnings) == 16_384
