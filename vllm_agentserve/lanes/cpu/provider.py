"""CPU: what makes the lanes of a worker: the KV memory that they share with it, their cores, the length of their chunks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from vllm_agentserve.config import AgentServeConfig
from vllm_agentserve.lanes.cpu.cores import Cores
from vllm_agentserve.lanes.cpu.memory import KvMemory
from vllm_agentserve.lanes.cpu.process import ProcessLane
from vllm_agentserve.lanes.cpu.runner import Setup
from vllm_agentserve.policy.slots import core_ladder
from vllm_agentserve.policy.step_sizes import KernelSizes, step_sizes
from vllm_agentserve.vllm_compat import LaneError, cpu

CHUNK_TOKENS = 256
"""Default of `lane_chunk_tokens` here: about a tenth of a second on one core."""


class ProcessLaneProvider:
    """Makes the lanes of a CPU worker, the first and those that follow one that died: over one KV cache, on the same cores.

    Args:
        options: length of chunks, and the user's own split of the cores.
        vllm_config: the worker's.
        kv_cache_config: the worker's.
    """

    def __init__(self, options: AgentServeConfig, vllm_config: Any, kv_cache_config: Any) -> None:
        self._kv_memory = KvMemory()
        self._options = options
        self._configs = vllm_config, kv_cache_config
        largest = vllm_config.scheduler_config.max_num_batched_tokens
        self._kernels = KernelSizes(step_sizes(largest, options.chunk_granularity_tokens))
        self._cores: Cores | None = None
        """None until the first lane is made: vLLM has pinned the worker's OpenMP threads by then, or never will."""

    @property
    def restarts(self) -> bool:
        return True

    def kv_cache_memory(self) -> AbstractContextManager[None]:
        return self._kv_memory.allocation()

    def start(self, begin: Callable[[Any], None] = lambda metadata: None) -> ProcessLane:
        """Starts a lane and waits for it: it loads on all cores, since the worker does nothing meanwhile. Raises `LaneError`, and
        what `ProcessLane` does."""
        lane = self._lane(alone=True)
        lane.wait_until_ready()
        return lane

    def restart(self) -> ProcessLane:
        """Starts one without waiting. Raises what `start` does."""
        return self._lane(alone=False)

    def _lane(self, alone: bool) -> ProcessLane:
        every = cpu.worker_cores()
        if len(every) < 2:
            raise LaneError(
                f"two lanes need two cores, and vLLM's worker has {len(every)}: see VLLM_CPU_OMP_THREADS_BIND, or serve in mode "
                "'time-sliced'"
            )
        memory = self._kv_memory.memory
        if memory is None:
            raise LaneError("vLLM has not allocated its KV cache in the memory that the lane shares")
        vllm_config, kv_cache_config = self._configs
        most = cpu.largest_chunk(vllm_config)
        slots = tuple(every[decode:] for decode in core_ladder(len(every), self._options.lane_decode_share))
        setup = Setup(
            vllm_config=cpu.second_worker_config(vllm_config),
            kv_cache_config=kv_cache_config,
            memory=(memory.size, memory.descriptor),
            chunk_tokens=min(self._options.lane_chunk_tokens or CHUNK_TOKENS, most),
            most_tokens=most,
            slot_cores=slots,
            all_cores=every,
            load_cores=every if alone else slots[-1],
            warm_up_s=self._options.warm_up_s,
        )
        if self._cores is None:
            self._cores = Cores()
        return ProcessLane(setup, self._cores, self._kernels, self._options.lane_start_timeout_s)
