"""The worker class of two lanes on a GPU (`--worker-cls`); imports vLLM's, so only a worker's process imports it."""

import os
from typing import Any

from vllm.v1.worker import workspace
from vllm.v1.worker.gpu_worker import Worker

from vllm_agentserve.vllm_compat import cuda


class LaneGpuWorker(Worker):
    """vLLM's GPU worker with scratch memory for a second lane, less KV cache for the sake of its chunks, and a runner that
    the connector finds.

    Retired by: an option for the number of workspace lanes, and connectors that can reserve memory and are given the runner.
    """

    def init_device(self) -> None:
        # Streams on disjoint multiprocessors still wait for one another when they share one of the default eight queues.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        super().init_device()

    def _make_model_runner(self) -> Any:
        # vLLM has just made the workspaces, one lane each, and nobody has used them.
        made = workspace.current_workspace_manager()
        lanes = max(made._num_lanes, cuda.WORKSPACE_LANE + 1)
        workspace._manager = workspace.WorkspaceManager(made._device, made._num_ubatches, lanes, made._alloc_context)
        runner = super()._make_model_runner()
        cuda.remember_runner(runner)
        return runner

    def determine_available_memory(self) -> int:
        # A chunk is no longer than a step, so it needs no more than the profiled step did; nothing where the user has set
        # the size of the KV cache.
        available = int(super().determine_available_memory())
        if self.cache_config.kv_cache_memory_bytes:
            return available
        return available - int(self.peak_activation_memory)
