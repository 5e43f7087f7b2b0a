"""Control calls of vLLM's engine that need a quiet prefill lane: they reach a lane of a worker in another process, or are refused
before the engine has changed anything."""

from typing import TYPE_CHECKING, Any

from vllm_agentserve.policy.jobs import Drained
from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.lanes import local_worker_half
from vllm_agentserve.vllm_compat.scheduler import has_lane_connector
from vllm_agentserve.vllm_compat.weights import may_have_lane, refusal

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore


def guard_control_calls() -> None:
    """Wraps two methods of `EngineCore` in this process; engines without the lane's connector are as before.

    - `reset_prefix_cache`, which `pause`, `sleep` and clients call: the scheduler can ask the worker for the jobs of the lane.
      vLLM has paused the engine before it resets the cache, and a paused engine takes no step in which the lane could report.
    - `sleep`: vLLM pauses the engine and ends its requests before the worker refuses, so it is refused here.

    Retired by: hooks of connectors before the prefix cache is reset and before the engine sleeps.
    """
    from vllm.v1.engine.core import EngineCore

    stock_reset, stock_sleep = EngineCore.reset_prefix_cache, EngineCore.sleep
    if getattr(stock_reset, "agentserve", False):
        return

    def reset_prefix_cache(
        self: "EngineCore", reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if has_lane_connector(self.scheduler):
            self.scheduler.connector.half.drain_worker = lambda: drained(self.model_executor)
        return stock_reset(self, reset_running_requests, reset_connector)

    def sleep(self: "EngineCore", level: int = 1, mode: Any = "abort") -> Any:
        lanes = level >= 1 and has_lane_connector(self.scheduler)
        if lanes and any(self.model_executor.collective_rpc(worker_may_have_lane)):
            raise LaneError(refusal("sleep"))
        return stock_sleep(self, level, mode)

    reset_prefix_cache.agentserve = True  # type: ignore[attr-defined]
    EngineCore.reset_prefix_cache = reset_prefix_cache
    EngineCore.sleep = sleep


def drained(executor: Any) -> Drained:
    """Has every worker take its lane's jobs back. A job has ended when no worker has it any more."""
    found = executor.collective_rpc(drain_here)
    left = frozenset().union(*(one.left for one in found))
    return Drained(frozenset().union(*(one.ended for one in found)) - left, left)


def drain_here(worker: Any) -> Drained:
    """Runs in the worker."""
    half = local_worker_half()
    return Drained() if half is None else half.drain()


def worker_may_have_lane(worker: Any) -> bool:
    """Runs in the worker."""
    return may_have_lane()
