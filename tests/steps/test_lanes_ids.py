"""Request ids that are used again, and those of requests that nobody wants any more: lane jobs are not mixed up."""

import logging

import pytest
from vllm.v1.request import RequestStatus

from tests.support.lane_driver import both
from tests.support.lane_worker import FollowedLane, at_work, make_request
from vllm_agentserve.lanes import connector_worker as worker_module


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "IDLE_PATIENCE_S", 0.0)
    monkeypatch.setattr(logging.getLogger("vllm.agentserve"), "disabled", True)


@both
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("tokens", [60, 200, 400])
def test_the_end_of_a_request_is_not_the_end_of_the_next_one_of_its_name(
    asynchronous: bool, ran: bool, tokens: int
) -> None:
    """Aborted while it waits or runs, and sent again before the next step: that step tells the worker of the end of the old
    request and brings the job of the new one."""
    scheduler, driver = at_work(asynchronous, make=lambda kv: FollowedLane(kv, 0))
    scheduler.add_request(make_request("p", 60, max_tokens=9))
    if ran:
        driver.step()
    scheduler.finish_requests(["p"], RequestStatus.FINISHED_ABORTED)
    while "p" in scheduler.requests:
        driver.step()
    scheduler.add_request(make_request("p", tokens, max_tokens=9))
    for step in range(30):
        if step > 2 and driver.lanes:
            driver.lanes[-1].run(10**6)
        driver.step()
    assert driver.kv.wrong == []
    assert "p" not in scheduler.requests
    assert scheduler.integrity.faults() == []


def test_a_lane_that_fails_on_requests_that_have_ended_remembers_none_of_them() -> None:
    scheduler, driver = at_work(make=lambda kv: FollowedLane(kv, 0))
    scheduler.add_request(make_request("p", 400))
    driver.step()
    driver.step()
    lane = driver.lanes[-1]
    assert lane.jobs() == ["p"]
    scheduler.finish_requests(["p"], RequestStatus.FINISHED_ABORTED)
    lane.cancel = lambda request_id: None  # it ends before it hears of it
    lane.up = False
    for _ in range(3):
        driver.step()
    assert "p" not in scheduler.requests
    assert (list(scheduler.calls), scheduler._lane.dispatch.in_flight) == (["s"], [])
