"""A lane without a model: plays worker and lane for vLLM's real scheduler; jobs end when the test says so."""

from collections import deque
from typing import Any

import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

from tests.support.schedulers import Driver, make_request, make_scheduler
from vllm_agentserve.lanes.connector import LaneWorkerMetadata
from vllm_agentserve.lanes.lane import LaneReport, Slot
from vllm_agentserve.policy.jobs import Job

PARKED = RequestStatus.WAITING_FOR_REMOTE_KVS
both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


class LaneDriver(Driver):
    """A lane whose jobs end when `end()` or `fail()` is called; cancelled ones end with the next step."""

    def __init__(self, scheduler: Any, depth: int = 1) -> None:
        super().__init__(scheduler, depth)
        self.jobs: dict[str, Job] = {}
        self.slots: list[int] = []
        self.report: LaneReport | None = LaneReport((Slot(1, 1),))
        self._ended: set[str] = set()
        self._failed: set[str] = set()

    def end(self, *names: str) -> None:
        self._ended |= set(names)

    def fail(self, *names: str) -> None:
        self._ended |= set(names)
        self._failed |= set(names)

    def transfers(self, output: SchedulerOutput) -> KVConnectorOutput:
        metadata: Any = output.kv_connector_metadata
        self.slots.append(metadata.slot)
        self.jobs |= {job.request_id: job for job in metadata.jobs}
        ended = (self._ended | output.finished_req_ids) & self.jobs.keys()
        failed = self._failed & ended
        for name in ended:
            del self.jobs[name]
        self._ended -= ended
        self._failed -= failed
        said, self.report = self.report, None
        return KVConnectorOutput(
            finished_recving=ended or None,
            failed_recving=failed or None,
            kv_connector_worker_meta=LaneWorkerMetadata(said) if said is not None else None,
        )

    def until(self, name: str, limit: int = 40) -> list[dict[str, int]]:
        """Steps until a row has this request; returns all rows."""
        rows = [self.step()]
        while name not in rows[-1]:
            assert len(rows) < limit, rows
            rows.append(self.step())
        return rows


class AheadDriver(LaneDriver):
    """Its worker runs each step before the engine looks at what came of it, as real ones do with asynchronous scheduling."""

    def __init__(self, scheduler: Any, depth: int = 1) -> None:
        super().__init__(scheduler, depth)
        self._reports: deque[KVConnectorOutput] = deque()

    def runs(self, output: SchedulerOutput) -> None:
        self._reports.append(super().transfers(output))

    def transfers(self, output: SchedulerOutput) -> KVConnectorOutput:
        return self._reports.popleft()


def started(
    asynchronous: bool = False, driver_type: type[LaneDriver] = LaneDriver, **given: Any
) -> tuple[Any, LaneDriver]:
    """A scheduler with lanes and one stream that decodes."""
    options = {"mode": "lanes", "lane_min_tokens": 100, "lane_max_requests": 2} | given.pop("options", {})
    scheduler: Any = make_scheduler(asynchronous=asynchronous, options=options, lanes=True, **given)
    driver = driver_type(scheduler, depth=2 if asynchronous else 1)
    scheduler.add_request(make_request("stream", 20))
    for _ in range(3):
        driver.step()
    return scheduler, driver


def status(scheduler: Any, name: str) -> RequestStatus:
    return scheduler.requests[name].status


def counts(scheduler: Any) -> dict[str, int]:
    return {name: count for name, count in scheduler.counts.items() if count}
