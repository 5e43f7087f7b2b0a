"""An engine with two lanes in this process, and what its tests look at."""

import os
import time
from typing import Any

import pytest
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.support.mix import cold_requests, run_requests, scheduler_of
from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.gpucheck.compare import differences
from vllm_agentserve.gpucheck.scripted_requests import Completions, ScriptedRequest
from vllm_agentserve.lanes.connector_worker import LaneConnectorWorker
from vllm_agentserve.lanes.lane import NoLane
from vllm_agentserve.policy.jobs import Job

KILLS = int(os.environ.get("AGENTSERVE_LANE_KILLS", "2"))
"""How often the lane is killed under load: `make torture` says 50, each takes as long as a lane takes to start."""
LANES = {
    "mode": "lanes",
    "tpot_slo_ms": 30,
    "lane_min_tokens": 48,
    "lane_chunk_tokens": 64,
    "lane_restarts": 3 + KILLS,
}
lanes_run_here = pytest.mark.skipif(
    has_nvidia_driver() or len(os.sched_getaffinity(0)) < 2, reason="needs a CPU build of vLLM and two cores"
)


def worker() -> LaneConnectorWorker:
    return get_kv_transfer_group().half


def counts(llm: LLM) -> dict[str, int]:
    return dict(scheduler_of(llm).counts)


def run_cold(
    llm: LLM, before_step: Any = lambda step: None, requests: list[ScriptedRequest] | None = None
) -> Completions:
    """Runs `cold_requests()`, or others, from an empty prefix cache."""
    assert scheduler_of(llm).reset_prefix_cache()
    return run_requests(llm, requests or cold_requests(), before_step)


def wrong(stock: Completions, answers: Completions) -> list[str]:
    return differences(cold_requests(), stock, answers)


def lane_is_idle(llm: LLM) -> None:
    """Steps an engine without requests until the lane has let go of everything."""
    deadline = time.monotonic() + 30
    while scheduler_of(llm)._lane.busy and time.monotonic() < deadline:
        llm.llm_engine.step()
    assert not worker()._lane.busy


def lane_is_up(llm: LLM) -> None:
    """Waits until a lane that was started again is ready, and lets the policy use it at once."""
    lane = worker()._lane
    if not lane.ready:
        lane.wait_until_ready()
    scheduler_of(llm)._lane.dispatch.policy.started()


def plant_jobs_sent_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plants a fault: the lane gets its jobs when a step begins, also those behind blocks that this step is to write."""
    original = LaneConnectorWorker.before_step

    def too_early(self: LaneConnectorWorker, jobs: list[Job], computes: bool, slot: int) -> None:
        for job in jobs if not isinstance(self._lane, NoLane) else []:
            self._lane.submit(job)
        original(self, [], computes, slot)

    monkeypatch.setattr(LaneConnectorWorker, "before_step", too_early)
