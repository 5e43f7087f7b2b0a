"""Two sets of answers to the same requests: equal, unequal at a tie, or wrong. Tests and torture rig use it too."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_agentserve.gpucheck.scripted_requests import Answer, Answers, Completions

EXACT = 2e-4
"""Log-probabilities that differ by less are the same in float32, in whatever chunks they were computed."""
ROUNDING = 2**-6
"""One unit in the last place of bfloat16 between 2 and 4, where the toy's logits lie: rounding is never taken for less."""


class Compared(Protocol):
    """What is needed of a request, as `ScriptedRequest` has it."""

    @property
    def name(self) -> str: ...

    @property
    def abort_after(self) -> int | None: ...


@dataclass(frozen=True)
class Difference:
    """The first token that differs between two answers to one request.

    Args:
        position: index of the token; the contexts before it are the same.
        margin: log-probability of the reference's token less that of the other one, both as the reference gave them; None
            where the other token is not among those it kept, or an answer is missing or too short.
    """

    request: str
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


def compare(reference: Answers, other: Answers, requests: Iterable[Compared]) -> AnswerComparison:
    """Compares token by token; an aborted request counts as far as both had come, which is at least one token.

    Raises:
        ValueError: the reference lacks a request.
    """
    compared = equal = 0
    apart: list[float] = []
    differences = []
    for request in requests:
        if request.name not in reference:
            raise ValueError(f"the reference has no answer to {request.name}")
        compared += 1
        ours, theirs = other.get(request.name, Answer([], [])), reference[request.name]
        length = max(len(theirs.tokens), len(ours.tokens))
        if request.abort_after is not None:
            length = max(min(len(theirs.tokens), len(ours.tokens)), 1)
        position = first_difference(theirs.tokens, ours.tokens, length)
        apart += [chosen_apart(theirs, ours, index) for index in range(min(position + 1, length))]
        if position == length:
            equal += 1
        else:
            differences.append(Difference(request.name, position, margin_at(theirs, ours, position)))
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
    if index >= min(len(reference.tokens), len(other.tokens), len(reference.logprobs)):
        return None
    kept = reference.logprobs[index]
    own, instead = kept.get(reference.tokens[index]), kept.get(other.tokens[index])
    return None if own is None or instead is None else own - instead


def differences(requests: Iterable[Compared], reference: Completions, answers: Completions) -> list[str]:
    """What is not as the reference has it, where nothing may differ: tokens, texts, reasons to stop, log-probabilities. Of
    aborted requests only the part counts that both have."""
    found = []
    for request in requests:
        theirs, ours = reference[request.name], answers[request.name]
        if request.abort_after is None and theirs.keys() != ours.keys():
            found.append(f"{request.name}: completions {sorted(theirs)} and {sorted(ours)}")
        for index in theirs.keys() & ours.keys():
            one, other = theirs[index], ours[index]
            length = max(len(one.tokens), len(other.tokens))
            if request.abort_after is not None and one.tokens:
                length = min(len(one.tokens), len(other.tokens))
            if first_difference(one.tokens, other.tokens, length) < length:
                found.append(f"{request.name}/{index}: tokens differ")
                continue
            if request.abort_after is None and (one.text, one.stop_reason) != (other.text, other.stop_reason):
                found.append(f"{request.name}/{index}: text or reason to stop differ")
            for at, (x, y) in enumerate(zip(one.logprobs[:length], other.logprobs[:length], strict=True)):
                if logprobs_differ(x, y):
                    found.append(f"{request.name}/{index}: log-probabilities of token {at} differ")
                    break
    return found


def logprobs_differ(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Of one position: whether a token, or a rank, has another log-probability. Which of two equal tokens is in may differ."""
    pairs = [(one[token], other[token]) for token in one.keys() & other.keys()]
    pairs += zip(sorted(one.values(), reverse=True), sorted(other.values(), reverse=True), strict=False)
    return any(abs(a - b) > EXACT for a, b in pairs)


def is_tie(reference: Mapping[int, Answer], other: Mapping[int, Answer]) -> bool:
    """Whether tokens of a request differ, and every difference begins where the reference found both tokens as likely, as near
    as float32 tells."""
    tied = False
    for index in reference.keys() & other.keys():
        one, ours = reference[index], other[index]
        shared = min(len(one.tokens), len(ours.tokens))
        at = first_difference(one.tokens, ours.tokens, shared)
        tied |= one.tokens != ours.tokens
        if at == shared:
            continue
        margin = margin_at(one, ours, at)
        if margin is None or abs(margin) > EXACT:
            return False
    return tied


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
            return f"{lost[0].request} differs at token {lost[0].position}, and not by a tie (margin {lost[0].margin})"
        allowed = 3 * rounding
    if comparison.noise > allowed:
        return f"log-probabilities differ by up to {comparison.noise:.2g}, rounding allows {allowed:.2g}"
    if control is not None and comparison.mean > (usual := max(2 * control.mean, EXACT)):
        return f"log-probabilities differ by {comparison.mean:.2g} on average, rounding allows {usual:.2g}"
    return None
