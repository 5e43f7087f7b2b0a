"""Whether the state of the scheduler is consistent: KV blocks, the queue, prefills, programs, the lane.

The torture rig asks after every episode. In production, with the option `integrity_check_interval_s`, an engine without
requests is checked now and then; what is wrong is logged and counted, and nothing is done about it.
"""

from collections.abc import Callable, Iterable, Mapping
from logging import Logger
from time import monotonic
from typing import TYPE_CHECKING

from vllm_agentserve.policy.call import Call
from vllm_agentserve.scheduler.stats import StatsCollector
from vllm_agentserve.vllm_compat.integrity import block_faults

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

SHOWN = 5
"""Of the faults of one check, how many the log names."""


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
