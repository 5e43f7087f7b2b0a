"""The budget of a step from what waits and what is being read, and whether another cold prompt can begin in it."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from vllm_agentserve.policy.budget import StepBudget
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.order import LOOK_AHEAD
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.policy.target import NOTHING, Backlog

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_agentserve.scheduler.queues import AgentQueue
    from vllm_agentserve.scheduler.steps import Prefill


def count_decodes(running: "Collection[Request]", prefills: "Collection[str]", may_be_empty: bool) -> int:
    """The sequences whose streams would notice a long step.

    Args:
        running: all that run.
        prefills: the ids of those that are being read.
        may_be_empty: whether steps are in flight although none should be: what they carry has nothing to decode before they
            are back.
    """
    if may_be_empty:
        return sum(request.num_tokens > request.num_computed_tokens for request in running) - len(prefills)
    return len(running) - len(prefills)


def tokens_left(prefills: "Collection[Prefill]", queue: "AgentQueue | None") -> int:
    """Prompt tokens still to be computed in steps, of prompts that are being read and of those that wait."""
    return sum(prefill.left for prefill in prefills) + (queue.tokens if queue is not None else 0)


def backlog_of(prefills: "Collection[Prefill]", queue: "AgentQueue | None") -> Backlog:
    """The prompts for which a longer step is worth something: those that are being read and those that somebody waits for. Those
    that wait for a place or for KV blocks too: these come free the sooner the less time is lost between chunks."""
    waiting = queue.backlog() if queue is not None else NOTHING
    left = sum(prefill.left for prefill in prefills)
    return Backlog(waiting.prompts + len(prefills), waiting.tokens + left, waiting.waited_ms)


def plan_step(
    controller: BudgetController,
    prefills: "Collection[Prefill]",
    queue: "AgentQueue | None",
    decodes: int,
    context: int,
    max_tokens: int,
    places: int,
    waits: bool,
    beside_lane: bool,
) -> StepBudget:
    """Asks the controller for the budget of the next step.

    Args:
        controller: knows the target and what steps take.
        prefills: the prompts that are being read.
        queue: the prompts that wait; None where vLLM orders them.
        decodes: sequences that decode in the step.
        context: their summed context, in tokens.
        max_tokens: prompt tokens the step can take at most, at least 1.
        places: requests that can be admitted.
        waits: whether any request waits.
        beside_lane: whether a prefill lane has part of the device.
    """
    phases = {prefill.served_as for prefill in prefills}
    waiting_resumes = 0
    if queue is not None and queue.blocked:
        # In the last step none could be admitted: the KV cache has no room, or as many run as may.
        places = 0
    if queue is not None and places > 0:
        waiting_resumes = queue.waiting_resume_tokens(min(places, LOOK_AHEAD))
    # A cold prompt may be asked first although it runs beside them.
    waiting_resumes += sum(prefill.left for prefill in prefills if prefill.served_as is Phase.RESUME_PREFILL)
    return controller.plan(
        decodes,
        context,
        max_tokens,
        resumes=waiting_resumes > 0 or Phase.RESUME_PREFILL in phases,
        colds=Phase.COLD_PREFILL in phases or (queue.has_cold() if queue is not None else waits),
        waiting_resume_tokens=waiting_resumes,
        admits=waits and not prefills,
        beside_lane=beside_lane,
        backlog=backlog_of(prefills, queue),
    )


def a_cold_prompt_goes_on(prefills: "Collection[Prefill]", budget: StepBudget) -> bool:
    """Whether a cold prompt that is being read will not be through in this step: then no other can begin in it."""
    return any(
        prefill.served_as is Phase.COLD_PREFILL
        and not budget.finishes(prefill.left, prefill.request.num_computed_tokens)
        for prefill in prefills
    )


def close_line(queue: "AgentQueue", request: "Request", cold: bool, granted: int, wanted: int) -> bool:
    """Closes the queue, or its cold part, for the rest of a step in which a waiting request was granted less than it wanted;
    returns whether a cold prompt was granted nothing."""
    queue.tried = request if granted else None
    if cold and not granted and request in queue and not queue.key(request.request_id).cold:
        # What it had cached when it came is gone.
        queue.stale = request.request_id
    if cold and granted < wanted:
        queue.colds_wait = True
    # Nothing is left for those behind it, whom vLLM 0.33 would ask for one by one.
    queue.closed = not granted or not queue
    return cold and not granted
