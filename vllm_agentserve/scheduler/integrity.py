"""Whether everything the scheduler keeps books of balances: KV blocks, the queue, prefills, programs, the lane.

The torture rig asks after every episode. In production, with the option `integrity_check_interval_s`, an engine without
requests is checked now and then; what is wrong is logged and counted, and nothing is done about it.
"""

from collections.abc import Callable, Iterable
from logging import Logger
from time import monotonic
from typing import TYPE_CHECKING

from vllm_agentserve.lanes.connector_scheduler import LaneConnectorScheduler
from vllm_agentserve.scheduler.programs import ProgramTracker
from vllm_agentserve.scheduler.queues import AgentQueue
from vllm_agentserve.scheduler.stats import StatsCollector
from vllm_agentserve.vllm_compat.integrity import block_faults, writing_faults

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

SHOWN = 5
"""Of the faults of one check, how many the log names."""


class Integrity:
    """Args:
    scheduler: which is checked, between two steps.
    prefills: gives the ids of the requests whose prompts are being computed in steps.
    queue: None where vLLM's own is used.
    programs: None where programs are not told apart.
    lane: None where there is none.
    every_s: how often `when_idle` looks at most; None: never.
    """

    def __init__(
        self,
        scheduler: "Scheduler",
        prefills: Callable[[], Iterable[str]],
        queue: AgentQueue | None = None,
        programs: ProgramTracker | None = None,
        lane: LaneConnectorScheduler | None = None,
        every_s: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._prefills = prefills
        self._queue = queue
        self._programs = programs
        self._lane = lane
        self._every_s = every_s
        self._next = 0.0

    def faults(self) -> list[str]:
        """What does not balance; empty where all is well. O(blocks + requests + programs). Raises nothing: books that cannot be
        read are a fault, and no reason to end an engine."""
        try:
            return self._faults()
        except Exception as error:
            return [f"they cannot be read ({error!r})"]

    def _faults(self) -> list[str]:
        known = self._scheduler.requests
        running = [request.request_id for request in self._scheduler.running]
        waiting = [request.request_id for request in self._scheduler.waiting]
        found = block_faults(self._scheduler)
        found += [f"{name!r} both runs and waits" for name in sorted(set(running) & set(waiting))]
        if len(set(running)) != len(running):
            found.append("a request runs twice")
        places = {"runs": running, "waits": waiting, "has a prefill in steps": self._prefills()}
        if self._lane is not None:
            places["is in the lane"] = self._lane.in_flight
            found += writing_faults(self._scheduler, self._lane.starts)
        for what, names in places.items():
            found += [f"{name!r} {what}, and is gone" for name in names if name not in known]
        if self._queue is not None:
            found += self._queue.faults(known)
        if self._programs is not None:
            found += self._programs.table.faults(known)
        return found

    def when_idle(self, stats: StatsCollector, logger: Logger) -> None:
        """Called after every step: counts and logs faults when there is no request left and the last look was long ago."""
        if self._every_s is None or self._scheduler.requests or monotonic() < self._next:
            return
        self._next = monotonic() + self._every_s
        found = self.faults()
        stats.counts["integrity_faults"] += len(found)
        for fault in found[:SHOWN]:
            logger.error("agentserve: the scheduler's state is inconsistent: %s. Please report this.", fault)
