"""The `vllm.general_plugins` entry point. vLLM calls it in every process, and may call it more than once."""

import logging

from vllm_agentserve import vllm_compat
from vllm_agentserve.scheduler.vllm_hooks import VllmHooks
from vllm_agentserve.vllm_compat import hooks, nixl

logger = logging.getLogger("vllm.agentserve")


def register() -> None:
    """Prepares this process for `AgentScheduler`; without effect on a vLLM outside the supported window.

    A stock run beside the installed plugin stays stock: an unsupported vLLM is refused where the scheduler is asked for.
    """
    reason = vllm_compat.unsupported_reason(vllm_compat.installed_vllm())
    if reason is not None:
        logger.debug("vllm_agentserve is not active: %s", reason)
        return
    hooks.add_stats_field()
    hooks.check_options_early(VllmHooks)
    hooks.refuse_invalid_hints(VllmHooks)
    hooks.add_middleware(VllmHooks)
    hooks.add_stat_logger(VllmHooks)
    nixl.pause_progress_thread()
