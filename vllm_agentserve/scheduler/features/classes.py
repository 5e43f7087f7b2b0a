"""Waiting times, first tokens and deadlines by class of calls, in `/metrics`."""

from collections.abc import Callable, MutableMapping
from math import inf

from vllm.v1.request import RequestStatus

from vllm_agentserve.policy.call import Call
from vllm_agentserve.scheduler.class_stats import FIRST_TOKEN, WAIT, count_deadline, count_time
from vllm_agentserve.scheduler.features import Feature

WITHOUT_ANSWER = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED)
"""How requests end that met no deadline."""


class ClassTimes(Feature):
    """Args:
    counts: gets the histograms and counters of `class_stats.py`.
    clock: that of deadlines, in s.
    """

    def __init__(self, counts: MutableMapping[str, float], clock: Callable[[], float]) -> None:
        self._counts = counts
        self._clock = clock

    def arrived(self, call: Call) -> None:
        call.arrived_s = self._clock()

    def admitted(self, call: Call) -> None:
        if call.admitted or call.arrived_s is None:
            return  # again, after a preemption, or not through `add_request`
        call.admitted = True
        count_time(self._counts, WAIT, call.hints.batch, self._clock() - call.arrived_s)

    def answered(self, call: Call) -> None:
        if call.arrived_s is not None:
            count_time(self._counts, FIRST_TOKEN, call.hints.batch, self._clock() - call.arrived_s)

    def freed(self, call: Call) -> None:
        if call.due < inf:
            in_time = self._clock() <= call.due
            if not in_time or call.request.status not in WITHOUT_ANSWER:
                count_deadline(self._counts, call.hints.batch, in_time)
