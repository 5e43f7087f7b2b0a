"""Who goes before whom among the prompts of one step: those that are being computed, and those that wait and are better.

The order is that of waiting calls (`order.py`) without its first rule: class, level, priority, deadline, resume prefills with
the least left first, cold ones by arrival; overdue calls before all of them. The age of programs does not count: a prompt that
has begun is not put off for one of an older program. vLLM asks for running requests in the order in which they were admitted. So
a prompt that is asked for before a better one leaves it the tokens that it needs.
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
    key = by_arrival(key)
    return ahead(key, Urgency.OVERDUE, call.wait_number) if call.overdue else key


def by_arrival(key: AdmissionKey) -> AdmissionKey:
    """The key of a call among the prompts of a step."""
    return key._replace(program=0) if key.program else key


def kind(call: Call, key: AdmissionKey) -> Kind:
    """What has to be alike so that nobody minds a prompt beside it."""
    return call.hints.batch, call.hints.priority, call.due, key.cold


class NoOrder:
    """No prompt of the step has to leave anything to another. Also the interface of `StepOrder`."""

    def standing(self, call: Call, waits: bool) -> Standing:
        """Where a prompt stands that the step is asked for now; `waits`: whether it is about to be admitted."""
        return BY_ITSELF

    def asked(self, call: Call) -> None:
        """The step has been asked for this prompt."""


NO_ORDER = NoOrder()


class StepOrder(NoOrder):
    """The prompts of one step.

    Args:
        computed: those that are being computed.
        longest_chunk: tokens that a prompt gets in one step at most.
    """

    def __init__(self, computed: Iterable[Call], longest_chunk: float) -> None:
        self._longest_chunk = longest_chunk
        self._places = {call: place(call) for call in computed}
        self._coming = {call: min(call.left, longest_chunk) for call in self._places}
        """Tokens of those that the step will still be asked for."""

    def last(self) -> AdmissionKey:
        """The place of the last of those that are being computed."""
        return max(self._places.values(), default=AdmissionKey(Urgency.PREEMPTED))

    def join(self, call: Call, key: AdmissionKey) -> None:
        """A call that waits goes before one of those that are being computed, if it is admitted."""
        self._places[call] = key
        self._coming[call] = min(key.tokens, self._longest_chunk)

    def kinds(self, waiting: Iterable[Call]) -> int:
        """How many kinds of prompts there are, with these that wait."""
        kinds = {kind(call, key) for call, key in self._places.items()}
        return len(kinds | {kind(call, call.key) for call in waiting if call.key is not None})

    def standing(self, call: Call, waits: bool) -> Standing:
        own = self._places.get(call)
        if own is None:
            own = self._places[call] = place(call)
        better = [other for other, key in self._places.items() if key < own]
        followed = any(other.served_as is not None and self._places[other] > own for other in self._coming)
        if not better:
            return Standing(behind=False, followed=followed)
        behind = any(kind(other, self._places[other]) != kind(call, own) for other in better)
        if waits:
            # vLLM asks for those that wait last, and in order: who is better was asked for before.
            return Standing(behind=behind, followed=followed)
        # What better resume prefills need of a cold one is reserved in the budget.
        rivals = [other for other in better if self._places[other].cold or not own.cold]
        return Standing(int(sum(self._coming.get(other, 0) for other in rivals)), bool(rivals), behind, followed)

    def asked(self, call: Call) -> None:
        self._coming.pop(call, None)
