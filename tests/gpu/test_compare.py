"""The GPU check's comparison of answers: what counts as a difference, as noise, as a tie."""

import json
from dataclasses import replace

import pytest

from tests.support.gpu_kit import answer
from vllm_agentserve.gpucheck.compare import ROUNDING, AnswerComparison, Difference, compare, wrong
from vllm_agentserve.gpucheck.scripted_requests import (
    Answer,
    ScriptedRequest,
    from_json,
    greedy,
    mixed_requests,
    pinned_requests,
    to_json,
)


def request_of(name: str = "a", abort_after: int | None = None) -> ScriptedRequest:
    return ScriptedRequest(name, 0, (1,), greedy(4), abort_after)


@pytest.mark.parametrize(
    ("reference", "other", "abort_after", "equal", "position", "margin"),
    [
        ([1, 2, 3], [1, 2, 3], None, 1, None, None),
        ([1, 2, 3], [1, 99, 3], None, 0, 1, 1.0),
        ([1, 2, 3], [1, 98, 3], None, 0, 1, None),
        ([1, 2, 3], [1, 2], None, 0, 2, None),
        ([1, 2], [1, 2, 3], None, 0, 2, None),
        ([1, 2, 3], [1, 2], 2, 1, None, None),
        ([1, 2, 3], [1, 99], 2, 0, 1, 1.0),
        ([1, 2, 3], [], 2, 0, 0, None),
    ],
)
def test_answers_are_compared_up_to_the_first_difference(
    reference: list[int],
    other: list[int],
    abort_after: int | None,
    equal: int,
    position: int | None,
    margin: float | None,
) -> None:
    found = compare({"a": answer(reference)}, {"a": answer(other)}, [request_of(abort_after=abort_after)])
    assert (found.compared, found.equal) == (1, equal)
    assert [one.position for one in found.differences] == ([] if position is None else [position])
    assert [one.margin for one in found.differences] == ([] if position is None else [margin])


def test_a_request_nobody_answered_is_a_difference() -> None:
    assert compare({"a": answer([1, 2])}, {}, [request_of()]).differences == [Difference("a", 0, None)]


def test_a_reference_without_the_request_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answer to a"):
        compare({}, {}, [request_of()])


def test_noise_is_that_of_equal_contexts() -> None:
    """Behind the first difference the contexts differ, and with them everything."""
    other = Answer([1, 99, 7], [{1: -1.25}, {99: -0.1, 2: -1.5}, {7: -9.0}])
    assert compare({"a": answer([1, 2, 7])}, {"a": other}, [request_of()]).noise == 0.5


def test_the_mean_is_over_all_positions_with_the_same_context() -> None:
    other = Answer([1, 2, 7], [{1: -1.25}, {2: -0.75}, {7: -1.25}])
    found = compare({"a": answer([1, 2, 7])}, {"a": other}, [request_of()])
    assert (found.noise, found.mean, found.positions) == (0.25, 0.25, 3)


EQUAL = AnswerComparison(2, 2, 1e-6)
TIED = AnswerComparison(2, 1, 0.05, [Difference("a", 3, 0.02)])


@pytest.mark.parametrize(
    ("comparison", "control", "words"),
    [
        (EQUAL, None, None),
        (EQUAL, EQUAL, None),
        (EQUAL, TIED, None),
        (TIED, TIED, None),
        (TIED, None, "1 of 2 requests have other tokens"),
        (TIED, EQUAL, "1 of 2 requests have other tokens"),
        (AnswerComparison(2, 1, 0.05, [Difference("a", 3, 0.101)]), TIED, "a differs at token 3, and not by a tie"),
        (AnswerComparison(2, 1, 0.05, [Difference("a", 3, None)]), TIED, "a differs at token 3, and not by a tie"),
        (AnswerComparison(2, 1, 0.0, [Difference("a", 3, 2 * ROUNDING)]), AnswerComparison(2, 1, 0.0, []), None),
        (AnswerComparison(2, 2, 1e-3), EQUAL, "log-probabilities differ by up to 0.001, rounding allows 0.0002"),
        (AnswerComparison(2, 2, 1e-3), AnswerComparison(2, 2, 5e-4), None),
        (AnswerComparison(2, 2, 0.3), TIED, "log-probabilities differ by up to 0.3"),
        (AnswerComparison(2, 2, 0.05, [], 0.004), replace(TIED, mean=0.002), None),
        (
            AnswerComparison(2, 2, 0.05, [], 0.005),
            replace(TIED, mean=0.002),
            "differ by 0.005 on average, rounding allows 0.004",
        ),
    ],
)
def test_an_arm_may_differ_only_where_stock_differs_from_itself(
    comparison: AnswerComparison, control: AnswerComparison | None, words: str | None
) -> None:
    why = wrong(comparison, control)
    assert (why is None) == (words is None)
    assert words is None or words in str(why)


def test_pinned_requests_are_the_same_but_for_their_answers() -> None:
    free = mixed_requests(20, seeded=False)
    pinned = pinned_requests(free)
    assert [one.prompt for one in pinned] == [one.prompt for one in free]
    assert len({tuple(one.parameters["allowed_token_ids"]) for one in pinned}) == 20
    assert not {one.name for one in pinned} & {one.name for one in free}


def test_answers_survive_json() -> None:
    answers = {"a": answer([1, 2], 0.5)}
    assert from_json(json.loads(json.dumps(to_json(answers)))) == answers


def test_the_mix_has_everything() -> None:
    requests = mixed_requests(20, seeded=True)
    assert {"seed" in one.parameters for one in requests} == {True, False}
    assert {one.abort_after is None for one in requests} == {True, False}
    assert sum(requests[0].prompt[:200] == other.prompt[:200] for other in requests) < len(requests)
    long = [one.prompt[:200] for one in requests if len(one.prompt) > 900]
    assert len(set(long)) < len(long)
    assert not any("seed" in one.parameters for one in mixed_requests(20, seeded=False))
