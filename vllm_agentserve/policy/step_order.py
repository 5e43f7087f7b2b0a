"""Who goes before whom among the prompts of one step: those that are being computed, and those that wait and are better.

The order is that of waiting calls (`order.py`) without its first rule: class, level, priority, deadline, resume prefills with
the least left first, cold ones by arrival; overdue calls before all of them. Of two cold ones that differ in nothing but the age
of their programs and their arrival, the one that has begun goes on: neither an older program nor an earlier arrival puts it off.
vLLM asks for running requests in the order in which they were admitted. So a prompt that is asked for before a better one leaves
it the tokens that it needs.
"""

from collections.abc import Iterable

from vllm_agentserve.policy.budget import BY_ITSELF, Standing
from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.order import AdmissionKey, Urgency, ahead
from vllm_agentserve.policy.phase import Phase

Kind = tuple[bool, int, float, bool]
"""Class, priority, deadline, and whether it is cold: prompts of one kind share a step that nobody decodes in."""


def place(call: Call) -> AdmissionKey:
    """By which a call whose prompt is being computed is sorted now; it keeps the level that it was admitted with."""
    assert call.place is not None
    cold = call.served_as is Phase.COLD_PREFILL
    key = call.place
    if not (cold and key.cold):
        key = key._replace(cold=cold, uncached=0 if cold else call.left)
    return overdue_first(call, by_arrival(key))


def by_arrival(key: AdmissionKey) -> AdmissionKey:
    """The key of a call among the prompts of a step, whatever the age of its program."""
    return key._replace(program=0) if key.program else key


def not_begun(key: AdmissionKey) -> AdmissionKey:
    """The key of a call that waits, among the prompts of a step: behind the cold ones that have begun and are as good."""
    return key._replace(program=1) if key.cold else key


def overdue_first(call: Call, key: AdmissionKey) -> AdmissionKey:
    """The key of a call that goes before all others once it is overdue."""
    return ahead(key, Urgency.OVERDUE, call.wait_number) if call.overdue else key


def kind(call: Call, key: AdmissionKey) -> Kind:
    """What has to be alike so that nobody minds a prompt beside it."""
    return call.hints.batch, call.hints.precedence, call.due, key.cold


class NoOrder:
    """No prompt of the step has to leave anything to another. Also the interface of `StepOrder`."""

    def standing(self, call: Call, waits: bool) -> Standing:
        """Where a prompt stands that the step is asked for now; `waits`: whether it is about to be admitted."""
        return BY_ITSELF

    def asked(self, call: Call) -> None:
        """The step has been asked for this prompt."""


NO_ORDER = NoOrder()


class StepOrder(NoOrder):
    """The prompts of one step. What a prompt has before it is known from the best ones: hundreds may be admitted in a step.

    Args:
        computed: those that are being computed.
        longest_chunk: tokens that a prompt gets in one step at most.
    """

    def __init__(self, computed: Iterable[Call], longest_chunk: float) -> None:
        self._longest_chunk = longest_chunk
        self._places: dict[Call, AdmissionKey] = {}
        self._best: dict[Kind, AdmissionKey] = {}
        """The first of each kind."""
        self._first: list[tuple[AdmissionKey, Kind]] = []
        """The first two of these."""
        self._first_cold: AdmissionKey | None = None
        for call in computed:
            self._put(call, place(call))
        self._coming = {call: min(call.left, longest_chunk) for call in self._places}
        """Tokens of those that the step will still be asked for."""
        self._going_on = dict.fromkeys(self._places)
        """Those of them that are being computed."""

    def _put(self, call: Call, key: AdmissionKey) -> None:
        self._places[call] = key
        own = kind(call, key)
        best = self._best.get(own)
        if best is None or key < best:
            self._best[own] = key
            others = [(other, its) for other, its in self._first if its != own]
            self._first = sorted([*others, (key, own)])[:2]
        if key.cold and (self._first_cold is None or key < self._first_cold):
            self._first_cold = key

    def last(self) -> AdmissionKey:
        """The place of the last of those that are being computed."""
        return max(self._places.values(), default=AdmissionKey(Urgency.PREEMPTED))

    def join(self, call: Call, key: AdmissionKey) -> None:
        """A call that waits goes before one of those that are being computed, if it is admitted."""
        self._put(call, key)
        self._coming[call] = min(key.tokens, self._longest_chunk)

    def kinds(self, waiting: Iterable[Call]) -> int:
        """How many kinds of prompts there are, with these that wait."""
        return len(self._best.keys() | {kind(call, call.key) for call in waiting if call.key is not None})

    def standing(self, call: Call, waits: bool) -> Standing:
        own = self._places.get(call)
        if own is None:
            own = place(call)
            self._put(call, own)
        followed = any(other.served_as is not None and self._places[other] > own for other in self._going_on)
        if not self._first[0][0] < own:
            return Standing(behind=False, followed=followed)
        its = kind(call, own)
        behind = any(first < own and other != its for first, other in self._first)
        if waits:
            # vLLM asks for those that wait last, and in order: who is better was asked for before.
            return Standing(behind=behind, followed=followed)
        # What better resume prefills need of a cold one is reserved in the budget.
        yields = not own.cold or (self._first_cold is not None and self._first_cold < own)
        if not yields:
            return Standing(0, False, behind, followed)
        better = [(self._places[other], tokens) for other, tokens in self._coming.items() if self._places[other] < own]
        resumes = sum(tokens for key, tokens in better if not key.cold) if not own.cold else 0
        colds = sum(tokens for key, tokens in better if key.cold)
        return Standing(int(resumes + colds), True, behind, followed, int(resumes))

    def asked(self, call: Call) -> None:
        self._coming.pop(call, None)
        self._going_on.pop(call, None)
