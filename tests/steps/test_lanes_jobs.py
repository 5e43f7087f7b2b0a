"""Every job that the worker half has taken is answered, whatever becomes of the lane; on vLLM's real scheduler."""

from typing import Any

import pytest

from tests.support.lane_driver import both, counts
from tests.support.lane_worker import FollowedLane, KvContents, WorkerDriver, at_work, no_waiting
from tests.support.schedulers import make_request
from vllm_agentserve.lanes import connector_scheduler, connector_worker
from vllm_agentserve.lanes.lane import LaneReport, Outcome


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    no_waiting(monkeypatch)


def idle(kv: KvContents) -> FollowedLane:
    """A lane that computes nothing by itself; those that follow it do."""
    lane = FollowedLane(kv, chunk=10**6 if hasattr(kv, "second") else 0)
    kv.second = True  # type: ignore[attr-defined]
    return lane


def ends(driver: WorkerDriver, scheduler: Any, *names: str) -> None:
    for _ in range(200):
        if not scheduler.requests.keys() & set(names):
            break
        driver.step()
    assert not scheduler.requests.keys() & set(names)
    assert driver.kv.wrong == []
    assert scheduler.integrity.faults() == []


@both
def test_a_lane_that_dies_after_it_was_asked(asynchronous: bool) -> None:
    scheduler, driver = at_work(asynchronous, idle)
    scheduler.add_request(make_request("a", 400, max_tokens=3))
    driver.step()
    driver.step()
    lane = driver.lanes[0]
    poll = lane.poll

    def dies_after(patience_s: float = 0.0) -> list[Outcome]:
        found = poll(patience_s)
        lane.up = False
        lane.poll = poll
        return found

    lane.poll = dies_after
    ends(driver, scheduler, "a")
    assert len(driver.lanes) == 2


@both
def test_a_lane_that_is_ended_because_jobs_fail_answers_its_others(asynchronous: bool) -> None:
    scheduler, driver = at_work(asynchronous, idle, options={"lane_max_requests": 4})
    for name in "abcd":
        scheduler.add_request(make_request(name, 400, max_tokens=3))
    driver.step()
    driver.step()
    for name in "abc":
        driver.lanes[0].fail(name)
    ends(driver, scheduler, *"abcd")
    assert len(driver.lanes) == 2
    done = counts(scheduler)
    assert (done["lane_failed_requests"], done["lane_requests"]) == (4, 4), "what failed once goes through steps"
    assert not any(call.lane.failed for call in scheduler.calls.values())


@both
def test_a_job_that_comes_when_there_is_no_lane_any_more(asynchronous: bool) -> None:
    """With asynchronous scheduling a step may carry a job that was sent before the failure was heard of."""
    scheduler, driver = at_work(asynchronous, idle, restarts=0)
    scheduler.add_request(make_request("a", 400, max_tokens=3))
    driver.step()
    driver.step()
    driver.lanes[0].up = False
    scheduler.add_request(make_request("b", 400, max_tokens=3))
    driver.step()
    ends(driver, scheduler, "a", "b")


@both
def test_a_lane_that_dies_without_jobs_gets_none(asynchronous: bool) -> None:
    scheduler, driver = at_work(asynchronous, idle, restarts=0)
    driver.lanes[0].up = False
    driver.step()
    driver.step()
    assert not scheduler._lane.dispatch.policy.ready
    scheduler.add_request(make_request("a", 400, max_tokens=3))
    ends(driver, scheduler, "a")
    done = counts(scheduler)
    assert (done.get("lane_requests", 0), done["step_lane_down_requests"]) == (0, 1)


@both
def test_a_lane_that_dies_while_it_is_drained(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, driver = at_work(asynchronous, idle, restarts=0)
    monkeypatch.setattr(connector_scheduler, "local_worker_half", lambda: driver.worker)
    scheduler.add_request(make_request("a", 400, max_tokens=3))
    driver.step()
    driver.step()
    driver.lanes[0].up = False
    while driver.in_flight:
        driver.finish()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    driver.step()
    driver.step()
    scheduler.add_request(make_request("later", 500, max_tokens=3))
    ends(driver, scheduler, "a", "later")


class StuckLane(FollowedLane):
    """Lets go of nothing while it is stuck, also when it is ended."""

    stuck = True

    def poll(self, patience_s: float = 0.0) -> list[Outcome]:
        return [] if self.stuck else super().poll(patience_s)


@both
@pytest.mark.parametrize("lets_go", [(), ("b",)])
def test_a_reset_is_refused_where_the_lane_does_not_let_go(
    asynchronous: bool, lets_go: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which a chunk takes more than ten seconds, and the end of its process as long. vLLM would preempt what runs
    and then fail. A prompt that the lane has let go of is computed again."""
    monkeypatch.setattr(connector_worker, "DRAIN_LIMIT_S", 0.01)
    monkeypatch.setattr(connector_worker, "DRAIN_PATIENCE_S", 0.001)
    scheduler, driver = at_work(asynchronous, lambda kv: StuckLane(kv, chunk=0))
    monkeypatch.setattr(connector_scheduler, "local_worker_half", lambda: driver.worker)
    lane = driver.lanes[0]
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, 400, max_tokens=3))
        driver.step()
    driver.step()
    assert sorted(lane.jobs()) == ["a", "b"]
    while driver.in_flight:
        driver.finish()
    running = list(scheduler.running)
    held = lane.poll

    def poll(patience_s: float = 0.0) -> list[Outcome]:
        return [lane.let_go(name) for name in lets_go if name in lane.jobs()] or held(patience_s)

    monkeypatch.setattr(lane, "poll", poll)
    with pytest.raises(RuntimeError, match=rf"the prefill lane has not let go of {2 - len(lets_go)} prompts in time"):
        scheduler.reset_prefix_cache(reset_running_requests=True)
    assert running
    assert scheduler.running == running
    assert scheduler.integrity.faults() == []
    lane.stuck = False
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert scheduler.kv_cache_manager.usage == 0.0
    ends(driver, scheduler, "a", "b")


@both
def test_a_lane_that_loads_gets_no_jobs_and_those_on_their_way_go_through_steps(asynchronous: bool) -> None:
    first = True

    def make(kv: KvContents) -> FollowedLane:
        nonlocal first
        lane, first = FollowedLane(kv, chunk=0, ready=first), False
        return lane

    scheduler, driver = at_work(asynchronous, make)
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, 400, max_tokens=3))
    driver.step()
    driver.lanes[0].up = False
    ends(driver, scheduler, "a", "b")
    scheduler.add_request(make_request("c", 400, max_tokens=3))
    ends(driver, scheduler, "c")
    driver.lanes[1].ready = True
    driver.step()
    driver.step()
    driver.step()
    scheduler.add_request(make_request("d", 400, max_tokens=3))
    driver.step()
    driver.step()
    assert driver.lanes[1].jobs() == ["d"]
    driver.lanes[1].run(1000)
    ends(driver, scheduler, "d")


def test_a_new_lane_begins_with_a_rate_of_its_own() -> None:
    scheduler, driver = at_work()
    lane: Any = scheduler._lane.dispatch
    report = LaneReport((), tokens=100, seconds=10.0, new=False)
    lane.reported(report)
    assert lane.tokens_per_s == pytest.approx(10.0)
    driver.lanes[0].up = False
    for _ in range(3):
        driver.step()
    lane.reported(LaneReport((), tokens=5000, seconds=1.0, new=False))
    assert lane.tokens_per_s == pytest.approx(5000.0)
