"""Takes the place of a running call for a waiting one of a better level, now and then."""

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.engine import EnginePolicy
from vllm_agentserve.policy.order import DECIDE_STEPS, Urgency
from vllm_agentserve.policy.preemption import victim
from vllm_agentserve.policy.program_order import ProgramOrder
from vllm_agentserve.policy.waiting import WaitingList
from vllm_agentserve.scheduler.features import Feature
from vllm_agentserve.vllm_compat import scheduler as compat
from vllm_agentserve.vllm_compat.host import NoHost

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


class Preemption(Feature):
    """Decides every `DECIDE_STEPS` steps with waiting requests.

    The call that gives up its place waits at its own level. It keeps what it has generated; of its KV what is still in the
    prefix cache or in host memory when its turn comes.

    Args:
        scheduler: whose running requests give up their places.
        policy: of its calls, with an order by programs.
        waiting: those that wait.
        programs: price what is lost, and keep the account.
        calls: by id of the request.
        counts: gets `program_preemptions`.
        host: memory behind the KV cache.
    """

    def __init__(
        self,
        scheduler: "Scheduler",
        policy: EnginePolicy,
        waiting: WaitingList,
        programs: ProgramOrder,
        calls: Mapping[str, Call],
        counts: MutableMapping[str, float],
        host: NoHost,
    ) -> None:
        self._scheduler = scheduler
        self._policy = policy
        self._waiting = waiting
        self._programs = programs
        self._calls = calls
        self._counts = counts
        self._host = host
        self._aside: Call | None = None

    def before_plan(self) -> None:
        """Makes room for the first waiting call, if that is to be; those that compute a prompt keep their places."""
        scheduler, waiting, policy = self._scheduler, self._waiting, self._policy
        if not waiting.open or scheduler.current_step % DECIDE_STEPS:
            return
        first = waiting.first_that_can_run()
        if first is None or first.key is None or first.key.urgency == Urgency.PREEMPTED:
            return
        if not compat.finds_no_place(scheduler, first.request):
            return
        running = (
            self._calls[request.request_id]
            for request in scheduler.running
            if compat.may_be_preempted(scheduler, request)
        )
        ranked = ((policy.rank(call), call) for call in running if call.served_as is None)
        chosen = victim(policy.rank(first), ranked)
        if chosen is None:
            return
        # Host memory has stored what it computed, and copies it back beside steps; what is dropped there until then counts later.
        kept = self._host.restorable_tokens(chosen.request, 0)
        worst_ms = self._programs.prompt_ms(chosen.request.num_tokens - kept, kept)
        if not self._programs.account.allows(worst_ms):
            return
        self._programs.account.preempt(chosen, worst_ms)
        self._counts["program_preemptions"] += 1
        compat.preempt(scheduler, chosen.request)
        # vLLM must not admit it in the same step: its worker is told that it has left in this one.
        waiting.remove(chosen)
        self._aside = chosen

    def after_schedule(self) -> None:
        if self._aside is not None:
            self._waiting.add(self._aside)
            self._aside = None
