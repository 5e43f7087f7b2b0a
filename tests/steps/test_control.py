"""Control calls of vLLM's engine while a prompt is in the lane of a worker in another process, which `LaneDriver` plays."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCore

from tests.support.lane_driver import PARKED, LaneDriver, both, started
from tests.support.schedulers import make_request
from vllm_agentserve.vllm_compat import LaneError
from vllm_agentserve.vllm_compat.control import drain_here, worker_may_have_lane


class Executor(SimpleNamespace):
    """That of an engine whose worker is in another process; the worker is the driver."""

    driver: LaneDriver
    has_lane: bool

    def collective_rpc(self, method: str | Callable[..., Any]) -> list[Any]:
        if method is drain_here:
            jobs, self.driver.jobs = set(self.driver.jobs), {}
            return [jobs]
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


def with_a_prompt_in_the_lane(asynchronous: bool) -> tuple[Any, Any]:
    scheduler, driver = started(asynchronous)
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


def test_sleep_works_where_the_lane_has_been_given_up() -> None:
    scheduler, driver = started()
    engine_of(scheduler, driver, has_lane=False).sleep(1)
    assert scheduler.pause_state is PauseState.PAUSED_NEW


def test_a_pause_without_sleep_is_no_sleep() -> None:
    scheduler, driver = with_a_prompt_in_the_lane(False)
    engine_of(scheduler, driver).sleep(0, "keep")
    assert scheduler.pause_state is PauseState.PAUSED_ALL
