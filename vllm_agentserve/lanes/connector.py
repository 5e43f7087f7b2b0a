"""The prefill lane as vLLM sees it: a KV connector whose asynchronous loads are computed beside the decode steps.

vLLM allocates the blocks, parks the request, publishes its blocks when they are written, and computes the prompt's last
token itself; so sampling never leaves stock code. The half at the scheduler (`connector_scheduler.py`) decides which prompts go
to the lane, the half at the worker (`connector_worker.py`) owns the lane.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker, lane_provider
from vllm_agentserve.lanes.lane import LaneReport
from vllm_agentserve.policy.jobs import Job
from vllm_agentserve.policy.step_sizes import StepSize
from vllm_agentserve.vllm_compat import require_our_scheduler
from vllm_agentserve.vllm_compat.lanes import CONNECTOR
from vllm_agentserve.vllm_compat.weights import refuse_weight_updates

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass
class LaneMetadata(KVConnectorMetadata):
    """From the scheduler to the worker, every step: new jobs, the size of the step (None: it does not run the model), how the
    device is divided, and the target of a step in ms, 0 while it is not known."""

    jobs: list[Job] = field(default_factory=list)
    size: StepSize | None = None
    slot: int = 0
    target_ms: float = 0.0


@dataclass
class LaneWorkerMetadata(KVConnectorWorkerMetadata):
    """From the worker to the scheduler, when there is something to say."""

    report: LaneReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        raise NotImplementedError("a lane has one worker; more are refused at start")


class Unserved:
    """The scheduler's half until `AgentScheduler` sets it: with another scheduler every use is an error."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(
            "the connector of the prefill lane needs the scheduler that it was made for: --scheduler-cls "
            "vllm_agentserve.AgentScheduler"
        )


class LaneConnector(KVConnectorBase_V1):
    """vLLM makes one of each half: `role` says which.

    Raises:
        LaneError: the engine runs another scheduler.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        require_our_scheduler(vllm_config, f"the KV connector {CONNECTOR!r}")
        super().__init__(vllm_config, role, kv_cache_config)
        self.half: Any = Unserved()
        """At the worker a `LaneConnectorWorker`; at the scheduler a `LaneConnectorScheduler`, set before the first step."""
        if role is KVConnectorRole.WORKER:
            refuse_weight_updates()
            options = AgentServeConfig.from_additional_config(vllm_config.additional_config)
            self.half = LaneConnectorWorker(options, lane_provider(options, vllm_config, kv_cache_config))

    # -- scheduler side -------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.half.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self.half.dispatch(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        tokens = scheduler_output.total_num_scheduled_tokens
        size = StepSize(tokens, len(scheduler_output.num_scheduled_tokens)) if tokens else None
        return LaneMetadata(self.half.take_new(), size, self.half.slot, self.half.target_ms)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        finished = self.half.still_wanted(connector_output.finished_recving or set())
        # vLLM goes on with what is left here.
        connector_output.finished_recving = finished or None
        self.half.ended(finished, finished & (connector_output.failed_recving or set()))
        said = connector_output.kv_connector_worker_meta
        if isinstance(said, LaneWorkerMetadata):
            self.half.reported(said.report)

    # -- worker side ----------------------------------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[None] | None:
        return self.half.kv_cache_memory()

    def register_kv_caches(self, kv_caches: dict[str, "torch.Tensor"]) -> None:
        self.half.start()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # The first call of a step, before its attention metadata are made for a number of threads.
        self.half.begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        # No load is synchronous, so vLLM calls it when the step's own work is launched.
        self.half.launched()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self.half.after_step(finished_req_ids)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self.half.report()
        return LaneWorkerMetadata(report) if report is not None else None

    def shutdown(self) -> None:
        if isinstance(self.half, LaneConnectorWorker):
            self.half.close()
