"""A pytest plugin for vLLM's own scheduler tests: makes their `create_scheduler()` build our class."""

import os

import tests.v1.core.utils as core_utils

if os.environ.get("AGENTSERVE_SUITE") == "ours":
    from vllm_agentserve.scheduler.scheduler import AgentScheduler, AsyncAgentScheduler

    core_utils.Scheduler = AgentScheduler
    # Named, not chosen: on CPU vLLM turns asynchronous scheduling off in the configuration these tests make.
    core_utils.AsyncScheduler = AsyncAgentScheduler
