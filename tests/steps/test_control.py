"""Control calls of vLLM's engine while a prompt is in the lane of a worker in another process, which `LaneDriver` plays."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import RequestStatus

from tests.support.lane_driver import PARKED, AheadDriver, LaneDriver, both, started
from tests.support.schedulers import make_request
from vllm_agentserve.policy.jobs import Drained
from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.control import drain_here, drained, worker_may_have_lane


class Executor(SimpleNamespace):
    """That of an engine whose worker is in another process; the worker is the driver."""

    driver: LaneDriver
    has_lane: bool

    def collective_rpc(self, method: str | Callable[..., Any]) -> list[Any]:
        if method is drain_here:
            jobs, self.driver.jobs = frozenset(self.driver.jobs), {}
            return [Drained(jobs)]
        if method is worker_may_have_lane:
            return [self.has_lane]
        return [None]

    def sleep(self, level: int) -> None:
        pass


def engine_of(scheduler: Any, driver: LaneDriver, has_lane: bool = True) -> Any:
    """The part of an engine that these calls need."""
    core: Any = EngineCore.__new__(EngineCore)
    core.scheduler, core.model_executor = scheduler, Executor(driver=driver, has_lane=has_lane)
    core.reset_mm_cache = core.reset_encoder_cache = lambda: None
    return core


def with_a_prompt_in_the_lane(asynchronous: bool, driver_type: type[LaneDriver] = LaneDriver) -> tuple[Any, Any]:
    scheduler, driver = started(asynchronous, driver_type)
    scheduler.add_request(make_request("lane", 600, max_tokens=3))
    while "lane" not in driver.jobs:
        driver.step()
    while driver.in_flight:
        driver.finish()
    assert scheduler.requests["lane"].status is PARKED
    return scheduler, driver


@both
@pytest.mark.parametrize("call", ["pause", "reset"])
def test_jobs_are_taken_back_across_processes(asynchronous: bool, call: str) -> None:
    scheduler, driver = with_a_prompt_in_the_lane(asynchronous)
    engine = engine_of(scheduler, driver)
    if call == "pause":
        engine.pause_scheduler("keep")
        assert engine.is_scheduler_paused()
        engine.resume_scheduler()
    else:
        assert engine.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.integrity.faults() == []
    driver.until("lane")
    assert scheduler.integrity.faults() == []


@pytest.mark.parametrize("fails", [False, True], ids=["computed", "failed"])
@pytest.mark.parametrize("gone", [False, True], ids=["waits", "aborted"])
def test_jobs_whose_report_is_on_its_way_are_taken_back(gone: bool, fails: bool) -> None:
    """With asynchronous scheduling the job ends in a step without tokens that is under way when the call comes. The prompt goes
    to the lane again before the scheduler hears of that, and under its own name another one may come."""
    scheduler, driver = with_a_prompt_in_the_lane(True, AheadDriver)
    engine = engine_of(scheduler, driver)
    scheduler.finish_requests("stream", RequestStatus.FINISHED_ABORTED)
    (driver.fail if fails else driver.end)("lane")
    driver.step()
    assert "lane" not in driver.jobs
    assert driver.in_flight
    assert scheduler._lane.busy
    if gone:
        scheduler.finish_requests("lane", RequestStatus.FINISHED_ABORTED)
    assert engine.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.kv_cache_manager.usage == 0.0
    assert scheduler.integrity.faults() == []
    scheduler.add_request(make_request("stream", 30, max_tokens=60))
    if gone:
        assert "lane" not in scheduler.requests
        scheduler.add_request(make_request("lane", 700, max_tokens=3))
    while "lane" not in driver.jobs and scheduler.requests["lane"].num_output_tokens == 0:
        driver.step()
    while driver.in_flight:
        driver.finish()
    assert scheduler.integrity.faults() == []
    driver.end("lane")
    driver.until("lane")
    while "lane" in scheduler.requests:
        driver.step()
    assert scheduler.integrity.faults() == []


def test_a_reset_under_a_step_that_is_under_way_is_refused_before_anything_has_changed() -> None:
    """vLLM would preempt what runs and then fail, since their blocks are freed when the step is over."""
    scheduler, driver = with_a_prompt_in_the_lane(True, AheadDriver)
    engine = engine_of(scheduler, driver)
    driver.step()
    assert driver.in_flight
    running = list(scheduler.running)
    with pytest.raises(RuntimeError, match=r"a step is under way .* pause it \(POST /pause\?mode=keep\)"):
        engine.reset_prefix_cache(reset_running_requests=True)
    assert running
    assert scheduler.running == running
    assert scheduler.requests["lane"].status is PARKED
    assert "lane" in driver.jobs
    while driver.in_flight:
        driver.finish()
    assert engine.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.integrity.faults() == []


@both
@pytest.mark.parametrize("mode", ["abort", "keep"])
def test_sleep_is_refused_before_anything_has_changed(asynchronous: bool, mode: str) -> None:
    scheduler, driver = with_a_prompt_in_the_lane(asynchronous)
    engine = engine_of(scheduler, driver)
    with pytest.raises(LaneError, match="sleep is refused"):
        engine.sleep(1, mode)
    assert scheduler.pause_state is PauseState.UNPAUSED
    assert set(scheduler.requests) == {"stream", "lane"}
    assert "stream" in driver.step()


def test_a_job_that_one_worker_still_has_has_not_ended() -> None:
    found = [Drained(frozenset("ab")), Drained(frozenset("b"), frozenset("a"))]
    assert drained(SimpleNamespace(collective_rpc=lambda method: found)) == Drained(frozenset("b"), frozenset("a"))


def test_sleep_works_where_the_lane_has_been_given_up() -> None:
    scheduler, driver = started()
    engine_of(scheduler, driver, has_lane=False).sleep(1)
    assert scheduler.pause_state is PauseState.PAUSED_NEW


def test_a_pause_without_sleep_is_no_sleep() -> None:
    scheduler, driver = with_a_prompt_in_the_lane(False)
    engine_of(scheduler, driver).sleep(0, "keep")
    assert scheduler.pause_state is PauseState.PAUSED_ALL
