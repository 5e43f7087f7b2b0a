"""The connector's half at the worker: it owns the lane, whichever provider makes it, and starts it again when it dies."""

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.lane import LaneProvider, LaneReport, NoLane, Outcome, PrefillLane
from vllm_agentserve.policy.fence import StepFence
from vllm_agentserve.policy.jobs import Drained, Job
from vllm_agentserve.policy.step_sizes import StepSize
from vllm_agentserve.vllm_compat import LaneError

logger = init_logger("vllm.agentserve")

IDLE_PATIENCE_S = 0.005
"""How long a step without tokens waits for the lane, so that an engine with nothing else to do does not spin."""
DRAIN_PATIENCE_S = 0.05
DRAIN_LIMIT_S = 10.0
"""How long `drain` waits for a chunk to end before it ends the lane, and then for the lane to be gone."""
FAILURES_IN_A_ROW = 3
"""A lane on which so many jobs failed one after the other is taken for broken, and ended."""


class LaneConnectorWorker:
    """Drives the lane step by step: jobs in, outcomes out. Every job taken gets its outcome, whatever becomes of the lane.

    Args:
        options: how often a lane is started again.
        provider: makes the lanes of this worker.
    """

    def __init__(self, options: AgentServeConfig, provider: LaneProvider) -> None:
        self.options = options
        self.restarts = 0
        self._provider = provider
        self._computes = False
        self._failures = 0
        self._announce = False
        self._say_down = False
        self._new = True
        """Whether the lane has not reported its slots yet."""
        self._begun: Any = None
        self._lane: PrefillLane = NoLane()
        self._tried = False
        self._retired: PrefillLane = NoLane()
        """A lane that has ended and is closed with the engine only, since it shares the device with the steps."""
        self._fence: StepFence[Job] = StepFence()
        self._sent: set[str] = set()
        """The requests whose jobs came with the step that has just run."""
        self._cancelled: set[str] = set()
        """Cancelled jobs that the lane still has: that they end without an error says nothing about the lane."""
        self._refused: list[Outcome] = []
        """Jobs that no lane took, until their outcome is reported."""

    def kv_cache_memory(self) -> AbstractContextManager[None] | None:
        """Within it, vLLM allocates the worker's KV cache; None leaves that to vLLM."""
        return self._provider.kv_cache_memory()

    def start(self) -> None:
        """Starts the lane and waits for it. Raises `LaneError`; in mode `auto` it says why everything is time-sliced."""
        try:
            self._lane = self._provider.start(self.begin)
        except (LaneError, OSError) as error:
            if self.options.mode != "auto":
                raise
            logger.warning("agentserve: mode auto runs time-sliced: %s", error)
            return
        finally:
            self._tried = True
        logger.info("agentserve: prefill lane ready: %s.", self._lane.name)

    def warmed_up(self, reserved: int, step: int) -> None:
        """vLLM's own warm-up is over, see `PrefillLane.warmed_up`. Raises `LaneError`."""
        self._lane.warmed_up(reserved, step)

    @property
    def may_have_lane(self) -> bool:
        """False when none was made and none will be, or the last one has ended with all its jobs."""
        return not self._tried or not isinstance(self._lane, NoLane)

    def begin(self, metadata: Any) -> None:
        """Begins a step once, whoever comes first: the provider, before anything is launched, or vLLM with the metadata."""
        if metadata is not self._begun:
            self._begun = metadata
            self.before_step(metadata.jobs, metadata.size, metadata.slot)

    def before_step(self, jobs: list[Job], size: StepSize | None, slot: int) -> None:
        """A step begins: its new jobs, its size (None when it does not run the model), and how the device is divided."""
        self._computes = size is not None
        self._fence.begin_step(jobs)
        self._lane.begin_step(size, slot)

    def warms_up(self, size: StepSize) -> None:
        """Called before each step of the warm-up. There are no requests yet, so the lane has no jobs."""
        self._lane.begin_step(size, 0)

    def launched(self) -> None:
        """The worker's step has run, or is launched where the device works on its own; only now the lane gets its jobs."""
        lane, jobs = self._lane, self._fence.step_has_run()
        self._sent = {job.request_id for job in jobs}
        for job in jobs:
            if lane.ready:
                lane.submit(job)
            else:
                self._refused.append(Outcome(job.request_id, "there is no lane that is ready"))
        lane.launch()

    def after_step(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The jobs that ended.

        Args:
            finished_req_ids: requests that have ended, all before the step was scheduled. A job of this step with such an id
                belongs to another request, which came later under the same id.
        """
        lane = self._lane
        outcomes: list[Outcome] = []
        for request_id in finished_req_ids - self._sent:
            self._cancel(request_id)
        waits = lane.busy and not self._computes and not self._refused
        if lane.busy or not lane.ready:
            outcomes = lane.poll(IDLE_PATIENCE_S if waits else 0.0)
        return self._results(outcomes)

    def _results(self, outcomes: list[Outcome]) -> KVConnectorTransferResults:
        self._count(outcomes)
        outcomes, self._refused = [*outcomes, *self._refused], []
        failed = {outcome.request_id: outcome.error for outcome in outcomes if outcome.error is not None}
        for request_id, error in failed.items():
            logger.error("agentserve: the prefill lane failed on %s, which is computed again: %s", request_id, error)
        # After a failure the scheduler sends nothing until a report says that a lane can take jobs.
        self._announce |= bool(failed)
        self._keep_a_lane()
        return KVConnectorTransferResults(
            finished_recving={outcome.request_id for outcome in outcomes}, failed_recving=set(failed)
        )

    def _cancel(self, request_id: str) -> None:
        if request_id in self._lane.jobs():
            self._cancelled.add(request_id)
            self._lane.cancel(request_id)

    def _count(self, outcomes: list[Outcome]) -> None:
        """Counts failures of the lane in a row; a job that was cancelled is none, and no success."""
        judged = [
            outcome for outcome in outcomes if outcome.error is not None or outcome.request_id not in self._cancelled
        ]
        self._cancelled.difference_update(outcome.request_id for outcome in outcomes)
        failed = sum(outcome.error is not None for outcome in judged)
        if failed:
            self._failures += failed
        elif judged:
            self._failures = 0

    def _keep_a_lane(self) -> None:
        """The one place where a lane ends: it is ended, its jobs get their outcomes from `poll`, and then another one is made."""
        lane = self._lane
        if self._failures >= FAILURES_IN_A_ROW and lane.alive():
            lane.end(f"{self._failures} jobs failed, one after the other")
        if lane.gone:
            self._replace(lane)

    def _replace(self, lane: PrefillLane) -> None:
        """Starts another lane without waiting for it; the scheduler's half sends nothing for a while, or never again."""
        self._failures = 0
        self._say_down = True
        self._lane = NoLane()
        if not self._provider.restarts:
            self._retired = lane
            logger.error("agentserve: the prefill lane has ended; from now on everything is time-sliced.")
            return
        lane.close()
        if self.restarts >= self.options.lane_restarts:
            logger.error(
                "agentserve: the prefill lane died %d times; from now on everything is time-sliced.", self.restarts + 1
            )
            return
        self.restarts += 1
        logger.warning(
            "agentserve: starting the prefill lane again (%d of %d).", self.restarts, self.options.lane_restarts
        )
        try:
            self._lane, self._new = self._provider.restart(), True
        except Exception as error:
            logger.error(
                "agentserve: the prefill lane cannot be started; from now on everything is time-sliced: %s", error
            )

    def drain(self) -> Drained:
        """Cancels every job and waits until none holds blocks.

        A lane that does not answer is ended. If even that takes too long, its jobs are left for later steps to report.
        """
        ended: set[str] = set()
        self._refused += [Outcome(job.request_id) for job in self._fence.drop()]
        deadline, ending = time.monotonic() + DRAIN_LIMIT_S, False
        lane = self._lane
        for request_id in lane.jobs():
            self._cancel(request_id)
        while lane.busy:
            lane.begin_step(None, 0)
            lane.launch()
            ended |= self._results(lane.poll(DRAIN_PATIENCE_S)).finished_recving or set()
            if time.monotonic() > deadline:
                if ending:
                    break
                lane.end(f"its jobs have not ended within {DRAIN_LIMIT_S:g} s")
                deadline, ending = time.monotonic() + DRAIN_LIMIT_S, True
        ended |= self._results([]).finished_recving or set()
        return Drained(frozenset(ended), frozenset(lane.jobs()))

    def report(self) -> LaneReport | None:
        """What the scheduler is to know about the lane, None when there is nothing new."""
        lane = self._lane
        if self._say_down:
            self._say_down = False
            return LaneReport(down=True)
        report = lane.report()
        if self._announce and lane.ready:
            self._announce = False
            report = replace(report or LaneReport(), slots=lane.slots)
        if report is not None and report.slots:
            report, self._new = replace(report, new=self._new), False
        return report

    def close(self) -> None:
        for lane in (self._lane, self._retired):
            lane.close()
        self._lane, self._retired = NoLane(), NoLane()


def lane_provider(options: AgentServeConfig, vllm_config: Any, kv_cache_config: Any) -> LaneProvider:
    """The provider for this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_agentserve.lanes.cpu.provider import ProcessLaneProvider

        return ProcessLaneProvider(options, vllm_config, kv_cache_config)
    from vllm_agentserve.lanes.cuda.provider import StreamLaneProvider

    return StreamLaneProvider(options, vllm_config, kv_cache_config)
