"""Where every waiting request stands: what its client said of it, its phase, and the level of its program."""

from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.hints import NONE, Hints, read_hints
from vllm_agentserve.policy.order import AdmissionKey, Urgency, admission_key, ahead
from vllm_agentserve.policy.phase import Phase, SessionTable, classify
from vllm_agentserve.policy.preemption import Rank
from vllm_agentserve.scheduler.log_messages import LogMessages
from vllm_agentserve.scheduler.programs import ProgramTracker
from vllm_agentserve.scheduler.queues import AgentQueue
from vllm_agentserve.scheduler.stats import StatsCollector
from vllm_agentserve.vllm_compat import scheduler as compat

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


class Admission:
    """Told of every request from its arrival to its end.

    Args:
        scheduler: whose prefix cache tells phases.
        controller: knows the resume budget.
        stats: counts wrong hints.
        programs: gives levels; None where programs are not told apart.
        said: warns of wrong hints, once per kind.
    """

    def __init__(
        self,
        scheduler: "Scheduler",
        controller: BudgetController,
        stats: StatsCollector,
        programs: ProgramTracker | None,
        said: LogMessages,
    ) -> None:
        self.sessions = SessionTable()
        self._scheduler = scheduler
        self._controller = controller
        self._stats = stats
        self._programs = programs
        self._said = said
        self._hints: dict[str, tuple[Hints, float]] = {}

    def has_waited(self, request_id: str) -> bool:
        """Whether a request has waited for room in the prefill lane for too long."""
        queue = self._scheduler.waiting
        return isinstance(queue, AgentQueue) and queue.has_waited(request_id)

    def arrives(self, request: "Request") -> None:
        if request.request_id in self._scheduler.requests:
            return  # another part of a prompt that is streamed
        parameters = request.sampling_params
        hints, errors = read_hints(parameters.extra_args if parameters is not None else None)
        self._stats.counts["invalid_hints"] += len(errors)
        for error in errors:
            self._said.invalid_hint(error)
        if hints is not NONE:
            due = inf if hints.deadline_ms is None else monotonic() + hints.deadline_ms / 1000
            self._hints[request.request_id] = hints, due
        if self._programs is not None:
            self._programs.arrives(request, hints)

    def key(self, request: "Request", number: int) -> AdmissionKey:
        """The sort key of a waiting request; `number` counts arrivals."""
        request_id = request.request_id
        hints, due = self._hints.get(request_id, (NONE, inf))
        cached = compat.cached_prefix_tokens(self._scheduler, request)
        programs = self._programs
        level = programs.level(request_id) if programs is not None else 0
        phase, uncached = self.phase(request, cached), request.num_tokens - cached
        key = admission_key(phase, uncached, number, self._controller.resume_tokens, level, hints.batch, due)
        if request.status == RequestStatus.PREEMPTED and not (programs is not None and programs.yielded(request_id)):
            return ahead(key, Urgency.PREEMPTED, number)
        return key

    def phase(self, request: "Request", computed: int) -> Phase:
        """What a request is that has so many tokens computed or cached."""
        return classify(computed, request.num_tokens - computed, known_session=request.session_id in self.sessions)

    def rank(self, request_id: str) -> Rank:
        """Where a request stands that waits no more."""
        hints, _ = self._hints.get(request_id, (NONE, inf))
        return Rank(hints.batch, self._programs.table.standing(request_id) if self._programs is not None else 0)

    def forget(self, request: "Request") -> None:
        if request.num_computed_tokens > 0:
            self.sessions.touch(request.session_id)
        if self._programs is not None:
            self._programs.ends(request)
        self._hints.pop(request.request_id, None)
