"""Takes the place of a running call for a waiting one of a better level, now and then."""

from typing import TYPE_CHECKING

from vllm_agentserve.policy.order import DECIDE_STEPS, Urgency
from vllm_agentserve.policy.preemption import PreemptionAccount, victim
from vllm_agentserve.scheduler.admission import Admission
from vllm_agentserve.scheduler.programs import ProgramTracker
from vllm_agentserve.scheduler.queues import AgentQueue
from vllm_agentserve.scheduler.stats import StatsCollector
from vllm_agentserve.vllm_compat import scheduler as compat

if TYPE_CHECKING:
    from collections.abc import Container

    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


class Preempter:
    """Asked before every step with waiting requests, decides every `DECIDE_STEPS` steps.

    The call that gives up its place waits at its own level. It keeps what it has generated; of its KV what is still in the
    prefix cache when its turn comes.

    Args:
        share: of service that may be lost to it.
        scheduler: whose running requests give up their places.
        queue: of the waiting ones.
        admission: knows where everybody stands.
        programs: price what is lost, and keep the account.
        stats: counts preemptions.
    """

    def __init__(
        self,
        share: float,
        scheduler: "Scheduler",
        queue: AgentQueue,
        admission: Admission,
        programs: ProgramTracker,
        stats: StatsCollector,
    ) -> None:
        self.account = programs.account = PreemptionAccount(share)
        self._scheduler = scheduler
        self._queue = queue
        self._admission = admission
        self._programs = programs
        self._stats = stats
        self._aside: Request | None = None

    def before_step(self, prefilling: "Container[str]") -> None:
        """Makes room for the first waiting request, if that is to be; those that compute a prompt keep their places."""
        scheduler, queue = self._scheduler, self._queue
        if not queue or scheduler.current_step % DECIDE_STEPS:
            return
        first = queue.peek_request()
        if queue.key(first.request_id).urgency == Urgency.PREEMPTED or not compat.finds_no_place(scheduler, first):
            return
        running = {
            request.request_id: request
            for request in scheduler.running
            if request.request_id not in prefilling and compat.may_be_preempted(scheduler, request)
        }
        rank = self._admission.rank
        chosen = victim(rank(first.request_id), ((rank(name), name) for name in running))
        if chosen is None:
            return
        request = running[chosen]
        worst_ms = self._programs.prompt_ms(request.num_tokens, 0)
        if not self.account.allows(worst_ms):
            return
        self.account.preempt(chosen, worst_ms)
        self._stats.counts["program_preemptions"] += 1
        compat.preempt(scheduler, request)
        # vLLM must not admit it in the same step: its worker is told that it has left in this one.
        queue.remove_request(request)
        self._aside = request

    def after_step(self) -> None:
        if self._aside is not None:
            self._queue.add_request(self._aside)
            self._aside = None
