"""Programs as graphs of calls: what each call computes, what it waits for, whose context it goes on from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.bench.walk import PlannedCall, Walk

LEAST_TOKENS = 4
"""Scaled lengths do not fall below this."""


@dataclass(frozen=True)
class CallShape:
    """One call: what it computes, and what has to end before it.

    Args:
        uncached: prompt tokens to compute.
        context: tokens before them.
        output: tokens to decode, at least 1.
        tool_s: time between the end of the last parent and this call.
        parents: indices of earlier calls of the program; empty for the first ones. A call with several parents joins threads
            that forked from one context, and goes on from that context.
    """

    uncached: int
    context: int
    output: int
    tool_s: float = 0.0
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class ProgramShape:
    name: str
    arrival_s: float
    calls: tuple[CallShape, ...]


def origin(calls: Sequence[CallShape], index: int) -> int | None:
    """The call whose prompt and answer this one's prompt begins with: its parent, or for a join the one that the threads of its
    parents forked from; None for a call with a new prompt."""
    parents = calls[index].parents
    if len(parents) < 2:
        return parents[0] if parents else None
    shared = set.intersection(*(ancestors(calls, parent) for parent in parents))
    return max(shared, default=None)


def ancestors(calls: Sequence[CallShape], index: int) -> set[int]:
    """The calls that have to end before a call, and before those."""
    found: set[int] = set()
    left = [index]
    while left:
        new = {*calls[left.pop()].parents} - found
        found |= new
        left += new
    return found


def forks(calls: Sequence[CallShape], index: int) -> bool:
    """Whether the call is one of several that go on from the same call beside each other."""
    parents = calls[index].parents
    return len(parents) == 1 and sum(call.parents == parents for call in calls) > 1


def program_walk(calls: Sequence[CallShape]) -> Walk[int]:
    """The calls of a program, by index, as a walk; it begins when the program arrives.

    Raises:
        WorkloadError: a call waits for one that is not before it.
    """
    for index, call in enumerate(calls):
        for parent in call.parents:
            if not 0 <= parent < index:
                raise WorkloadError(
                    f"call {index}: parents = {call.parents!r} is not allowed, {parent} is no earlier call: name calls before it"
                )
    return Walk(
        {index: PlannedCall(call.parents, call.tool_s, origin(calls, index)) for index, call in enumerate(calls)}
    )


def scaled(calls: Sequence[CallShape], scale: float) -> tuple[CallShape, ...]:
    """The same calls with all lengths and tool times times `scale`: waiting for tools stays as large a part of a program."""

    def length(tokens: int) -> int:
        return max(round(tokens * scale), LEAST_TOKENS)

    done: list[CallShape] = []
    for index, call in enumerate(calls):
        before = origin(calls, index)
        context = 0 if before is None else done[before].context + done[before].uncached + done[before].output
        done.append(CallShape(length(call.uncached), context, length(call.output), call.tool_s * scale, call.parents))
    return tuple(done)


def in_blocks(calls: Sequence[CallShape], block: int) -> tuple[CallShape, ...]:
    """The same calls as an engine computes them whose prefix cache keeps full blocks of so many tokens: the rest of the
    context is computed again, and so is the last token of the answer before, which was never computed."""
    done = []
    for call in calls:
        cached = max(call.context - 1, 0) // block * block
        done.append(replace(call, uncached=call.uncached + call.context - cached, context=cached))
    return tuple(done)


def tool_chain_s(shape: ProgramShape) -> float:
    """The longest sum of tool times along a path through the program's calls."""
    longest: list[float] = []
    for call in shape.calls:
        longest.append(call.tool_s + max((longest[parent] for parent in call.parents), default=0.0))
    return max(longest)
