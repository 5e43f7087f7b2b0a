"""A pytest plugin for vLLM's own tests: makes their `create_scheduler()` build our class, or every block pool have our queue."""

import os

import tests.v1.core.utils as core_utils

if os.environ.get("AGENTSERVE_SUITE") == "ours":
    from vllm_agentserve.scheduler.scheduler import AgentScheduler, AsyncAgentScheduler

    core_utils.Scheduler = AgentScheduler
    # Named, not chosen: on CPU vLLM turns asynchronous scheduling off in the configuration these tests make.
    core_utils.AsyncScheduler = AsyncAgentScheduler

if os.environ.get("AGENTSERVE_SUITE") == "retaining":
    from typing import Any

    from vllm.v1.core.block_pool import BlockPool

    from vllm_agentserve.policy.retention import Retention
    from vllm_agentserve.vllm_compat.free_blocks import RetainingQueue

    make_pool = BlockPool.__init__

    def with_our_queue(self: Any, *given: Any, **named: Any) -> None:
        make_pool(self, *given, **named)
        self.free_block_queue = RetainingQueue(
            self.free_block_queue, self.hash_block_size, Retention(self.num_gpu_blocks)
        )

    BlockPool.__init__ = with_our_queue  # type: ignore[method-assign]
