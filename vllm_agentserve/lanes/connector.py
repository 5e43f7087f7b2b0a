"""The prefill lane as vLLM sees it: a KV connector whose asynchronous loads are computed beside the decode steps.

vLLM allocates the blocks, parks the request, publishes its blocks when they are written, and computes the prompt's last
token itself; so sampling never leaves stock code. The half at the scheduler decides who goes to the lane, the half at the
worker owns the lane.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.logger import init_logger

from vllm_agentserve import vllm_compat
from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.cores import Cores
from vllm_agentserve.lanes.lane import Job
from vllm_agentserve.lanes.memory import KvMemory
from vllm_agentserve.lanes.process import ProcessLane
from vllm_agentserve.lanes.runner import Setup
from vllm_agentserve.policy.slots import LanePolicy, Route, split_cores

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.agentserve")

IDLE_PATIENCE_S = 0.005
"""How long a step without tokens waits for the lane, so that an engine with nothing else to do does not spin."""


@dataclass
class LaneMetadata(KVConnectorMetadata):
    """From the scheduler to the worker, every step: new jobs, and whether this step computes anything itself."""

    jobs: list[Job] = field(default_factory=list)
    computes: bool = False


class LaneConnector(KVConnectorBase_V1):
    """vLLM makes one of each half: `role` says which."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = AgentServeConfig.from_additional_config(vllm_config.additional_config)
        self.half: Any
        if role is KVConnectorRole.SCHEDULER:
            self.half = LaneDispatch(options, int(vllm_config.cache_config.block_size))
        else:
            self.half = LaneWorker(options, vllm_config, kv_cache_config)

    # -- scheduler side -------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.half.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self.half.dispatch(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return LaneMetadata(self.half.take_new(), scheduler_output.total_num_scheduled_tokens > 0)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self.half.ended(connector_output.finished_recving or set(), connector_output.failed_recving or set())

    # -- worker side ----------------------------------------------------------------------------------------------------

    def get_mem_pool_context(self) -> AbstractContextManager[None]:
        return self.half.memory.allocation()

    def register_kv_caches(self, kv_caches: dict[str, "torch.Tensor"]) -> None:
        self.half.start()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # The first call of a step, before its attention metadata are made for a number of threads.
        self.half.before_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: jobs went to the lane before the step, which costs the time of a pipe's write."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self.half.after_step(finished_req_ids)

    def shutdown(self) -> None:
        if isinstance(self.half, LaneWorker):
            self.half.close()


class LaneDispatch:
    """The scheduler's half: who goes to the lane, and which blocks it fills.

    `AgentScheduler` sets `decodes`, and is told of every prompt that goes.
    """

    def __init__(self, options: AgentServeConfig, block_size: int) -> None:
        self.policy = LanePolicy(options.lane_min_tokens, options.lane_jobs, options.lane_restarts)
        self.block_size = block_size
        self.decodes = 0
        self.on_dispatch: Callable[[Any, int], None] = lambda request, start: None
        self.on_failure: Callable[[], None] = lambda: None
        self._new: list[Job] = []
        self._in_flight: dict[str, tuple[Any, ...]] = {}
        self._filling: set[Any] = set()
        """Hashes of the blocks the lane is filling: who needs one of them waits, and then finds it in the prefix cache."""

    def matched(self, request: "Request", computed: int) -> tuple[int | None, bool]:
        """What vLLM asks at admission: (tokens the lane will compute, True), (0, False) for a step, (None, False) to wait."""
        uncached = request.num_tokens - 1 - computed
        if self._filling and uncached > 0:
            block = computed // self.block_size
            if block < len(request.block_hashes) and request.block_hashes[block] in self._filling:
                return None, False
        route = self.policy.route(uncached, self.decodes, len(self._in_flight), time.monotonic())
        if route is Route.STEP or vllm_compat.lane_obstacle(request) is not None:
            return 0, False
        return (None, False) if route is Route.HOLD else (uncached, True)

    def dispatch(self, request: "Request", block_ids: tuple[list[int], ...], tokens: int) -> None:
        start = request.num_tokens - 1 - tokens
        self._new.append(Job(request.request_id, list(request.all_token_ids), block_ids, start))
        # Whole blocks only: the last one gets its last token in vLLM's own step.
        hashes = tuple(request.block_hashes[start // self.block_size : (start + tokens) // self.block_size])
        self._in_flight[request.request_id] = hashes
        self._filling.update(hashes)
        if request.prefill_stats is not None and request.num_preemptions <= 0:
            # vLLM takes them for found elsewhere; they are computed, and no client is told otherwise.
            request.prefill_stats.set(request.num_prompt_tokens, min(start, request.num_prompt_tokens), 0)
        self.on_dispatch(request, start)

    def take_new(self) -> list[Job]:
        new, self._new = self._new, []
        return new

    def ended(self, finished: set[str], failed: set[str]) -> None:
        for request_id in finished:
            self._in_flight.pop(request_id, None)
        if finished:
            # A prefix may be in two jobs when its first block was in nobody's: rebuilt, for there are few jobs.
            self._filling = {one for hashes in self._in_flight.values() for one in hashes}
        if failed:
            self.policy.failed(time.monotonic())
            for _ in failed:
                self.on_failure()


class LaneWorker:
    """The worker's half: the lane, its memory and the cores of the decode steps."""

    def __init__(self, options: AgentServeConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        self.options = options
        self.configs = vllm_config, kv_cache_config
        self.memory = KvMemory()
        self.restarts = 0
        self._computes = False
        self._setup: Setup | None = None
        self._lane: ProcessLane | None = None
        self._cores: Cores | None = None

    def start(self) -> None:
        """Starts the lane and waits for it; raises `LaneError`."""
        every = vllm_compat.worker_cores()
        decode, prefill = split_cores(every)
        memory = self.memory.memory
        assert memory is not None
        vllm_config, kv_cache_config = self.configs
        self._setup = Setup(
            vllm_config=vllm_compat.second_worker_config(vllm_config),
            kv_cache_config=kv_cache_config,
            memory=(memory.size, memory.descriptor),
            chunk_tokens=self.options.lane_chunk_tokens,
            own_cores=prefill,
            all_cores=every,
        )
        self._cores = Cores(decode, every)
        self._lane = ProcessLane(self._setup)
        self._lane.wait_until_ready()
        logger.info(
            "agentserve: prefill lane ready: process %d on cores %s beside decode on %s, all %d for a lane that is alone.",
            self._lane.pid,
            prefill,
            decode,
            len(every),
        )

    def before_step(self, metadata: LaneMetadata) -> None:
        self._computes = metadata.computes
        if self._lane is None:
            return
        for job in metadata.jobs:
            self._lane.submit(job)
        if metadata.computes and self._cores is not None:
            self._lane.decodes()
            self._cores.take(alone=not self._lane.busy)

    def after_step(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        lane = self._lane
        if lane is None or not lane.busy:
            return KVConnectorTransferResults()
        for request_id in finished_req_ids:
            lane.cancel(request_id)
        outcomes = lane.poll(0.0 if self._computes else IDLE_PATIENCE_S)
        failed = {outcome.request_id: outcome.error for outcome in outcomes if outcome.error is not None}
        for request_id, error in failed.items():
            logger.error("agentserve: the prefill lane failed on %s, which is computed again: %s", request_id, error)
        if failed and not lane.alive():
            self._replace()
        return KVConnectorTransferResults(
            finished_recving={outcome.request_id for outcome in outcomes}, failed_recving=set(failed)
        )

    def _replace(self) -> None:
        """Starts another lane without waiting for it; the scheduler's half sends nothing for a while, or never again."""
        if self._lane is not None:
            self._lane.close()
        if self.restarts >= self.options.lane_restarts:
            logger.error(
                "agentserve: the prefill lane died %d times; from now on all is time-sliced.", self.restarts + 1
            )
            self._lane = None
            if self._cores is not None:
                self._cores.take(alone=True)
            return
        self.restarts += 1
        logger.warning(
            "agentserve: starting the prefill lane again (%d of %d).", self.restarts, self.options.lane_restarts
        )
        assert self._setup is not None
        self._lane = ProcessLane(self._setup)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
            self._lane = None
