"""Who is admitted first: the key by which waiting requests are sorted, and the bound on being overtaken.

First preempted requests (they had a place already), then overdue ones, then all others but those that wait for KV blocks that are
not kept for programs, and these last. Within each of these: interactive ones before batch, by the
level of their program (one level for all where programs are not told apart), by the priority and then by the deadline that a
client named. Among equals come resume prefills, the shortest first, then cold prefills: those of the program that began first,
then by arrival. Shortest first minimises the mean time to the next token of agents that wait for a tool result to be read. The
oldest program first matters where contexts do not fit into the KV cache, so that returning calls are cold too: fewer programs
take turns then, and each ends sooner. The overdue class keeps all of this, the levels and the hints of clients from starving
anybody.
"""

import enum
from collections import OrderedDict
from math import inf
from typing import Generic, NamedTuple, TypeVar

from vllm_agentserve.policy.phase import Phase

DECIDE_STEPS = 16
"""Levels of waiting requests are looked at once per so many steps, and places change hands."""
LOOK_AHEAD = 64
"""How many waiting requests are looked at beyond the first, per step and per re-tagging."""
BYPASS_STEPS = 64
PATIENT_BYPASS_STEPS = 4096
"""After how many steps a request goes first whatever its key: the second where requests are to wait for each other longer than
for a step or two, with levels of programs and for batch work."""


class Urgency(enum.IntEnum):
    PREEMPTED = 0
    OVERDUE = 1
    NORMAL = 2
    UNKEPT = 3
    """It waits for KV blocks that are not kept for programs; who needs none of these goes before it."""


class AdmissionKey(NamedTuple):
    """Sorts waiting requests; smaller is admitted earlier.

    Args:
        urgency: of the request.
        batch: whether its client said that nobody waits for it.
        level: of its program.
        priority: that its client named, negated: the larger one goes first.
        due: when its client wants it through, on one clock for all; infinite where it did not say. For requests that go ahead
            of their class and level (`ahead`): when they came.
        cold: whether it stands in line with the cold prefills.
        uncached: tokens of a resume prefill; 0 for others.
        program: when its program began, as the number of that program; 0 for resume prefills.
        arrival: when it came, in any unit that grows with time.
        tokens: of its prompt that are not computed; not part of the order, since no two requests have the same arrival.
    """

    urgency: int
    batch: bool = False
    level: int = 0
    priority: int = 0
    due: float = inf
    cold: bool = False
    uncached: int = 0
    program: int = 0
    arrival: float = 0.0
    tokens: int = 0


def admission_key(
    phase: Phase,
    uncached_tokens: int,
    arrival: float,
    resume_budget: float,
    level: int = 0,
    batch: bool = False,
    due: float = inf,
    priority: int = 0,
    program: int = 0,
) -> AdmissionKey:
    """The sort key of a waiting request that has not run yet.

    Args:
        phase: what the request is, were it admitted now.
        uncached_tokens: prompt tokens it would have to compute.
        arrival: when it came, in any unit that grows with time.
        resume_budget: a resume prefill with more uncached tokens than this stands in line with the cold ones.
        level: of its program, 0 is the first.
        batch: nobody waits for it.
        due: when it should be through; earlier ones go first among those of one class, level and priority.
        priority: larger ones go first among those of one class and level.
        program: number of its program, in the order in which programs began; of two cold prefills the older one's goes first.
    """
    cold = phase is not Phase.RESUME_PREFILL or uncached_tokens > resume_budget
    uncached = 0 if cold else uncached_tokens
    program = program if cold else 0
    return AdmissionKey(Urgency.NORMAL, batch, level, -priority, due, cold, uncached, program, arrival, uncached_tokens)


def ahead(key: AdmissionKey, urgency: Urgency, arrival: float) -> AdmissionKey:
    """The key of a request that goes before its class and level: in order of arrival, but still known for what it is."""
    return key._replace(urgency=urgency, batch=False, level=0, priority=0, due=arrival)


Waiter = TypeVar("Waiter")


class Patience(Generic[Waiter]):
    """Tells which waiting requests have waited too many steps, oldest first; amortised O(1) per request.

    Args:
        steps: how many steps a request may be overtaken before it is overdue; infinite for no bound.
    """

    def __init__(self, steps: float) -> None:
        self._steps = steps
        self._since: OrderedDict[Waiter, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._since)

    def enter(self, waiter: Waiter, step: int) -> None:
        """The request waits from this step on, which is no earlier than any before it; what it waited earlier is forgotten."""
        self._since.pop(waiter, None)
        self._since[waiter] = step

    def leave(self, waiter: Waiter) -> None:
        """The request will not wait any more."""
        self._since.pop(waiter, None)

    def overdue(self, step: int) -> list[Waiter]:
        """Returns, once each, those that entered `steps` steps ago or earlier, in the order they entered."""
        ready = []
        for waiter, since in self._since.items():
            if since + self._steps > step:
                break
            ready.append(waiter)
        for waiter in ready:
            del self._since[waiter]
        return ready
