"""The worker's half of the connector: it owns the lane, whichever provider it has, and starts it again when it dies."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.lane import LaneReport, Outcome, PrefillLane
from vllm_agentserve.policy.fence import StepFence
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.vllm_compat import LaneError

if TYPE_CHECKING:
    from vllm_agentserve.lanes.memory import KvMemory

logger = init_logger("vllm.agentserve")

IDLE_PATIENCE_S = 0.005
"""How long a step without tokens waits for the lane, so that an engine with nothing else to do does not spin."""
DRAIN_PATIENCE_S = 0.05
FAILURES_IN_A_ROW = 3
"""A lane on which so many jobs failed one after the other is taken for broken, and started again."""


class LaneWorker:
    """Drives the lane step by step: jobs in, outcomes out.

    Args:
        options: how often a lane is started again.
        memory: where vLLM's KV cache is allocated; None where the lane shares the worker's process.
        start: makes a lane and waits until it is ready; raises `LaneError`.
        restart: makes one without waiting.
    """

    def __init__(
        self,
        options: AgentServeConfig,
        memory: "KvMemory | None",
        start: Callable[[], PrefillLane],
        restart: Callable[[], PrefillLane],
    ) -> None:
        self.options = options
        self.memory = memory
        self.restarts = 0
        self._make = start
        self._make_again = restart
        self._computes = False
        self._failures = 0
        self._announce = False
        self._begun: Any = None
        self._lane: PrefillLane | None = None
        self._fence: StepFence[Job] = StepFence()

    def start(self) -> None:
        """Starts the lane and waits for it. Raises `LaneError`; in mode `auto` it says why everything is time-sliced."""
        try:
            self._lane = self._make()
        except LaneError as error:
            if self.options.mode != "auto":
                raise
            logger.warning("agentserve: mode auto runs time-sliced: %s", error)
            return
        logger.info("agentserve: prefill lane ready: %s.", self._lane.name)

    def begin(self, metadata: Any) -> None:
        """Begins a step once, whoever comes first: the provider, before anything is launched, or vLLM with the metadata."""
        if metadata is not self._begun:
            self._begun = metadata
            self.before_step(metadata.jobs, metadata.computes, metadata.slot)

    def before_step(self, jobs: list[Job], computes: bool, slot: int) -> None:
        """A step begins: its new jobs, whether it runs the model, and how the device is divided."""
        self._computes = computes
        if self._lane is None:
            return
        self._fence.hold(jobs)
        self._lane.begin_step(computes, slot)

    def launched(self) -> None:
        """The worker's step has run, or is launched where the device works on its own; only now the lane hears of its jobs."""
        lane = self._lane
        if lane is None:
            return
        for job in self._fence.step_has_run():
            lane.submit(job)
        lane.launch()

    def after_step(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The jobs that ended; `finished_req_ids` are requests nobody wants any more."""
        lane = self._lane
        if lane is None:
            return KVConnectorTransferResults()
        if not lane.busy:
            if not lane.ready and not lane.alive():
                self._replace(lane)
            return KVConnectorTransferResults()
        for request_id in finished_req_ids:
            lane.cancel(request_id)
        return self._results(lane, lane.poll(0.0 if self._computes else IDLE_PATIENCE_S))

    def _results(self, lane: PrefillLane, outcomes: list[Outcome]) -> KVConnectorTransferResults:
        failed = {outcome.request_id: outcome.error for outcome in outcomes if outcome.error is not None}
        for request_id, error in failed.items():
            logger.error("agentserve: the prefill lane failed on %s, which is computed again: %s", request_id, error)
        if failed:
            self._failures += len(failed)
            # The scheduler sends nothing after a failure until it hears of a lane that can take jobs.
            self._announce = True
        elif outcomes:
            self._failures = 0
        if not lane.alive() or self._failures >= FAILURES_IN_A_ROW:
            self._replace(lane)
        return KVConnectorTransferResults(
            finished_recving={outcome.request_id for outcome in outcomes}, failed_recving=set(failed)
        )

    def drain(self) -> set[str]:
        """Cancels every job and waits until none holds blocks; returns the requests whose blocks are not filled."""
        lane, ended = self._lane, set[str]()
        if lane is None:
            return ended
        for request_id in lane.jobs():
            lane.cancel(request_id)
        while lane.busy:
            ended |= self._results(lane, lane.poll(DRAIN_PATIENCE_S)).finished_recving
            lane.begin_step(False, 0)
            lane.launch()
        return ended

    def report(self) -> LaneReport | None:
        """What the scheduler is to know of the lane, None when there is nothing new."""
        lane = self._lane
        if lane is None:
            return None
        if self._announce and lane.ready:
            self._announce = False
            return LaneReport(lane.slots)
        return lane.report()

    def _replace(self, lane: PrefillLane) -> None:
        """Starts another lane without waiting for it; the scheduler's half sends nothing for a while, or never again."""
        self._failures = 0
        lane.close()
        if self.restarts >= self.options.lane_restarts:
            logger.error(
                "agentserve: the prefill lane died %d times; from now on all is time-sliced.", self.restarts + 1
            )
            self._lane = None
            return
        self.restarts += 1
        logger.warning(
            "agentserve: starting the prefill lane again (%d of %d).", self.restarts, self.options.lane_restarts
        )
        self._lane = self._make_again()

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
            self._lane = None


def lane_worker(options: AgentServeConfig, vllm_config: Any, kv_cache_config: Any) -> LaneWorker:
    """The worker's half for this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_agentserve.lanes.process import ProcessLanes

        lanes = ProcessLanes(options, vllm_config, kv_cache_config)
        return LaneWorker(options, lanes.memory, lanes.start, lanes.restart)
    from vllm_agentserve.lanes.stream import StreamLane

    def start() -> PrefillLane:
        lane = StreamLane.start(options, vllm_config, kv_cache_config)
        lane.follow(worker.begin)
        return lane

    worker = LaneWorker(options, None, start, start)
    return worker
