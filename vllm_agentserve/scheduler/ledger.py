"""The prompts on their way through the prefill lane: counted, charged, and their phases kept until they come back."""

from typing import TYPE_CHECKING

from vllm_agentserve.lanes.connector_scheduler import LaneConnectorScheduler
from vllm_agentserve.policy.controller import BudgetController
from vllm_agentserve.policy.phase import Phase
from vllm_agentserve.scheduler.stats import StatsCollector

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_agentserve.scheduler.admission import Admission
    from vllm_agentserve.scheduler.programs import ProgramTracker


class LaneLedger:
    """Follows what `LaneConnectorScheduler` decides.

    Args:
        lane: the scheduler's half of the connector; gets the rates it decides by.
        controller: knows them.
        stats: counts prompts, tokens, failures and reasons.
        admission: tells the phase of a prompt, and where it stands.
        programs: charged for what the lane computes; None where programs are not told apart.
    """

    def __init__(
        self,
        lane: LaneConnectorScheduler,
        controller: BudgetController,
        stats: StatsCollector,
        admission: "Admission",
        programs: "ProgramTracker | None",
    ) -> None:
        self._lane = lane
        self._stats = stats
        self._programs = programs
        self._phases: dict[str, Phase] = {}
        lane.rates = controller
        lane.on_dispatch = self.dispatched
        lane.on_failure = self.failed
        lane.phase_of = admission.phase
        lane.rank_of = admission.rank
        lane.has_waited = admission.has_waited
        lane.is_wanted = self._phases.__contains__
        stats.lane = lane

    def __len__(self) -> int:
        return len(self._phases)

    def dispatched(self, request: "Request", start: int, phase: Phase) -> None:
        """A prompt goes to the lane, which computes everything from `start` to its last token."""
        uncached = request.num_tokens - start
        self._phases[request.request_id] = phase
        self._stats.counts["lane_requests"] += 1
        self._stats.counts["lane_tokens"] += uncached - 1
        self._decided(request.request_id)
        if self._programs is not None:
            self._programs.runs(request, start)
            self._programs.computes(request, phase, uncached - 1, start)

    def failed(self) -> None:
        self._stats.counts["lane_failed_requests"] += 1

    def phase_of(self, request_id: str) -> Phase | None:
        """The phase of a prompt that comes back; None for one that was not in the lane."""
        return self._phases.get(request_id)

    def admitted(self, request_id: str) -> None:
        """A step computes the prompt, or what the lane left of it."""
        self._phases.pop(request_id, None)
        self._decided(request_id)

    def _decided(self, request_id: str) -> None:
        """Counts why a prompt goes where it goes, once; one that nobody asked about resumes after a preemption."""
        reason = self._lane.reasons.pop(request_id, None)
        if reason is not None:
            self._stats.counts[reason.value] += 1
            self._lane.decided(reason)

    def forget(self, request_id: str) -> None:
        self._lane.failed.discard(request_id)
        self._phases.pop(request_id, None)
        self._lane.reasons.pop(request_id, None)
