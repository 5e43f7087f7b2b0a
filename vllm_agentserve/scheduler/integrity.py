"""Whether the state of the scheduler is consistent: KV blocks, the queue, prefills, programs, the lane.

The torture rig asks after every episode. In production, with the option `integrity_check_interval_s`, an engine without
requests is checked now and then; what is wrong is logged and counted, and nothing is done about it.
"""

from collections.abc import Callable, Iterable, Mapping
from logging import Logger
from time import monotonic
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from vllm_agentserve.policy.call import Call
from vllm_agentserve.policy.program import Stage
from vllm_agentserve.scheduler.stats import StatsCollector
from vllm_agentserve.vllm_compat.integrity import block_faults

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

SHOWN = 5
"""Of the faults of one check, how many the log names."""


def stage_faults(scheduler: "Scheduler", calls: Iterable[Call]) -> list[str]:
    """Which calls are not in the stage of their program that their request is in; O(n)."""
    running = set(scheduler.running)
    found = []
    for call in calls:
        request, part = call.request, call.program
        if part is None:
            continue
        stages, does = tuple(Stage), ""
        if request in running:
            computes = call.served_as is not None
            stages = (Stage.COLD, Stage.RESUME) if computes else (Stage.DECODING,)
            does = "computes its prompt" if computes else "decodes"
        elif request.status is RequestStatus.WAITING_FOR_STREAMING_REQ:
            stages, does = (Stage.PAUSED,), "waits for input"
        elif request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            stages, does = (Stage.WAITING, Stage.COLD, Stage.RESUME), "waits"
        if part.stage not in stages:
            found.append(f"{call.name!r} is in stage {part.stage.name} of its program, and {does}")
    return found


class Integrity:
    """Args:
    scheduler: which is checked, between two steps.
    calls: its calls, by id of the request.
    checks: give what does not agree in the parts of the scheduler, from all calls there are.
    every_s: how often `when_idle` looks at most; None: never.
    """

    def __init__(
        self,
        scheduler: "Scheduler",
        calls: Mapping[str, Call],
        checks: Iterable[Callable[[Iterable[Call]], list[str]]],
        every_s: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._calls = calls
        self._checks = tuple(checks)
        self._every_s = every_s
        self._next = 0.0

    def faults(self) -> list[str]:
        """What does not agree; empty where all is well. O(blocks + requests + programs). Raises nothing: state that cannot be
        read is a fault, and no reason to end an engine."""
        try:
            return self._faults()
        except Exception as error:
            return [f"the state cannot be read ({error!r})"]

    def _faults(self) -> list[str]:
        known = self._scheduler.requests
        running = [request.request_id for request in self._scheduler.running]
        waiting = [request.request_id for request in self._scheduler.waiting]
        found = block_faults(self._scheduler)
        found += [f"{name!r} both runs and waits" for name in sorted(set(running) & set(waiting))]
        if len(set(running)) != len(running):
            found.append("a request runs twice")
        places = {"runs": running, "waits": waiting, "is remembered": self._calls}
        for what, names in places.items():
            found += [f"{name!r} {what}, and is gone" for name in names if name not in known]
        found += [
            f"{name!r} is not remembered"
            for name, request in known.items()
            if name not in self._calls and not request.is_finished()
        ]
        found += stage_faults(self._scheduler, self._calls.values())
        for check in self._checks:
            found += check(self._calls.values())
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
