"""The worker class of two lanes on a GPU (`--worker-cls`); imports vLLM's, so only a worker's process imports it."""

import os
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker import workspace
from vllm.v1.worker.gpu_worker import Worker

from vllm_agentserve.policy.reserve import MIB, Reserve
from vllm_agentserve.vllm_compat import LaneError, cuda
from vllm_agentserve.vllm_compat.cuda_memory import captured_without_slots, reserve_for, sampler_surplus
from vllm_agentserve.vllm_compat.lanes import local_worker_half

logger = init_logger("vllm.agentserve")


class LaneGpuWorker(Worker):
    """vLLM's GPU worker with scratch memory for a second lane, less KV cache for the sake of its chunks, and a runner that
    the connector finds. What the lane takes is estimated before the KV cache is sized, from the forward pass that vLLM
    profiles, and measured after warm-up.

    Retired by: an option for the number of workspace lanes, and connectors that can reserve memory and are given the runner.
    """

    _lane_reserve, _activation = Reserve(), 0
    """Nothing where the size of the KV cache was given."""

    def init_device(self) -> None:
        # Streams on disjoint multiprocessors still wait for one another when they share one of the default eight queues.
        os.environ.setdefault(cuda.QUEUES_VARIABLE, cuda.QUEUES)
        super().init_device()

    def _make_model_runner(self) -> Any:
        # vLLM has just made the workspaces, one lane each, and they are unused.
        made = workspace.current_workspace_manager()
        lanes = max(made._num_lanes, cuda.WORKSPACE_LANE + 1)
        workspace._manager = workspace.WorkspaceManager(made._device, made._num_ubatches, lanes, made._alloc_context)
        runner = super()._make_model_runner()
        cuda.remember_runner(runner)
        return runner

    def determine_available_memory(self) -> int:
        given = self.cache_config.kv_cache_memory_bytes
        with sampler_surplus(self.model_runner, torch.cuda) as surplus:
            available = int(super().determine_available_memory())
        if given or self.cache_config.kv_cache_memory_bytes:
            # The user's own size, or that of a startup plan, which was saved with the reserve taken off.
            return available
        graphs = int(self.cudagraph_memory_estimate)
        counted = graphs if envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS else 0
        capability = current_platform.get_device_capability()
        self._activation = max(int(self.peak_activation_memory) - counted, 0)
        self._lane_reserve = reserve_for(
            self.vllm_config,
            max(self._activation - sum(surplus), 0),
            graphs,
            capability.major if capability is not None else 9,
        )
        reserved = self._lane_reserve.total
        logger.info(
            "agentserve: %.0f MiB are kept free for the prefill lane (%s), %.0f MiB are left for the KV cache.",
            reserved / MIB,
            ", ".join(f"{name} {size / MIB:.0f}" for name, size in vars(self._lane_reserve).items()),
            (available - reserved) / MIB,
        )
        if available <= reserved:
            raise LaneError(
                f"the prefill lane needs {reserved / MIB:.0f} MiB, and only {available / MIB:.0f} MiB are left for it and the "
                "KV cache: raise --gpu-memory-utilization, lower --max-num-batched-tokens or 'lane_chunk_tokens', or use mode "
                "'time-sliced'"
            )
        # vLLM suggests a --kv-cache-memory, and saves a startup plan, from this figure.
        self.peak_activation_memory += reserved
        return available - reserved

    def compile_or_warm_up_model(self) -> Any:
        with captured_without_slots(self.model_runner):
            times = super().compile_or_warm_up_model()
        half = local_worker_half()
        if half is not None:
            half.warmed_up(self._lane_reserve.total, self._activation)
        return times
