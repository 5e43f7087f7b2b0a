"""vllm_agentserve: an agent-aware scheduler for stock vLLM.

    vllm serve MODEL --scheduler-cls vllm_agentserve.AgentScheduler

Importing the package is light: neither torch nor vLLM is imported before `AgentScheduler` is asked for.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AgentScheduler", "__version__"]

if TYPE_CHECKING:
    from vllm_agentserve.scheduler.scheduler import AgentScheduler


def __getattr__(name: str) -> Any:
    if name == "AgentScheduler":
        from vllm_agentserve.vllm_compat import require_supported_vllm

        require_supported_vllm()
        from vllm_agentserve.scheduler.scheduler import AgentScheduler

        return AgentScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
