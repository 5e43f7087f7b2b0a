"""Two sets of answers to the same requests: equal, unequal at a tie, or wrong."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_agentserve.gpucheck.scripted_requests import Answer, Answers, ScriptedRequest

EXACT = 2e-4
"""Log-probabilities that differ by less are the same in float32, in whatever chunks they were computed."""
ROUNDING = 2**-6
"""One unit in the last place of bfloat16 between 2 and 4, where the toy's logits lie: rounding is never taken for less."""


@dataclass(frozen=True)
class Difference:
    """The first token that differs between two answers to one request.

    Args:
        position: index of the token; the contexts before it are the same.
        margin: log-probability of the reference's token less that of the other one, both as the reference gave them; None
            where the other token is not among those it kept, or an answer is missing or too short.
    """

    job: str
    position: int
    margin: float | None


@dataclass(frozen=True)
class AnswerComparison:
    """One arm against the reference.

    Args:
        compared: requests; equal: of these, the ones with the same tokens.
        noise: largest difference of a chosen token's log-probability where the contexts were the same.
        mean: of these differences, over `positions` of them: it sees what is a little wrong everywhere.
    """

    compared: int
    equal: int
    noise: float
    differences: list[Difference] = field(default_factory=list)
    mean: float = 0.0
    positions: int = 0

    @property
    def exact(self) -> bool:
        return self.equal == self.compared


def compare(reference: Answers, other: Answers, jobs: Iterable[ScriptedRequest]) -> AnswerComparison:
    """Compares token by token; an aborted request counts as far as both had come, which is at least one token.

    Raises:
        ValueError: the reference lacks a request.
    """
    compared = equal = 0
    apart: list[float] = []
    differences = []
    for job in jobs:
        if job.name not in reference:
            raise ValueError(f"the reference has no answer to {job.name}")
        compared += 1
        ours, theirs = other.get(job.name, Answer([], [])), reference[job.name]
        length = max(len(theirs.tokens), len(ours.tokens))
        if job.abort_after is not None:
            length = max(min(len(theirs.tokens), len(ours.tokens)), 1)
        position = first_difference(theirs.tokens, ours.tokens, length)
        apart += [chosen_apart(theirs, ours, index) for index in range(min(position + 1, length))]
        if position == length:
            equal += 1
        else:
            differences.append(Difference(job.name, position, margin_at(theirs, ours, position)))
    mean = sum(apart) / len(apart) if apart else 0.0
    return AnswerComparison(compared, equal, max(apart, default=0.0), differences, mean, len(apart))


def first_difference(one: Sequence[int], other: Sequence[int], length: int) -> int:
    """Index of the first token that differs or is missing; `length` when the first `length` are the same."""
    for index in range(length):
        if index >= len(one) or index >= len(other) or one[index] != other[index]:
            return index
    return length


def chosen_apart(reference: Answer, other: Answer, index: int) -> float:
    """By how much two runs differ in the log-probability of the reference's token; 0 where one of them did not keep it."""
    if index >= len(reference.tokens) or index >= len(other.tokens):
        return 0.0
    token = reference.tokens[index]
    theirs, ours = reference.logprobs[index].get(token), other.logprobs[index].get(token)
    return abs(theirs - ours) if theirs is not None and ours is not None else 0.0


def margin_at(reference: Answer, other: Answer, index: int) -> float | None:
    """See `Difference.margin`."""
    if index >= len(reference.tokens) or index >= len(other.tokens):
        return None
    kept = reference.logprobs[index]
    instead = kept.get(other.tokens[index])
    return None if instead is None else kept[reference.tokens[index]] - instead


def wrong(comparison: AnswerComparison, control: AnswerComparison | None) -> str | None:
    """Why an arm is not the reference up to rounding; None if it is.

    The control is the reference against itself with other chunks: what rounding alone does on this machine. Where it changes
    no token, none may change. Where it does, every first difference must be a tie: a margin that rounding can turn. In both
    cases log-probabilities may be no further apart than three times what rounding made of them, and on average twice.

    Args:
        control: None when it was not run: then no token may differ.
    """
    if control is None or control.exact:
        if not comparison.exact:
            return f"{comparison.compared - comparison.equal} of {comparison.compared} requests have other tokens"
        allowed = max(EXACT, 3 * control.noise) if control is not None else EXACT
    else:
        rounding = max(control.noise, ROUNDING)
        lost = [one for one in comparison.differences if one.margin is None or abs(one.margin) > 2 * rounding]
        if lost:
            return f"{lost[0].job} differs at token {lost[0].position}, and not by a tie (margin {lost[0].margin})"
        allowed = 3 * rounding
    if comparison.noise > allowed:
        return f"log-probabilities differ by up to {comparison.noise:.2g}, rounding allows {allowed:.2g}"
    if control is not None and comparison.mean > (usual := max(2 * control.mean, EXACT)):
        return f"log-probabilities differ by {comparison.mean:.2g} on average, rounding allows {usual:.2g}"
    return None
